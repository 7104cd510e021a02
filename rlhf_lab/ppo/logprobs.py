"""From hidden states to log-probabilities and entropy, with one tensor of logits and no other.

A pass of the update holds the logits of its response tokens, (n, vocab), from its forward to its
backward pass. Written with torch's own functions five tensors of that size would be made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..models.structure import check_head
from .compiled import compiled, is_compiled
from .losses import to_fp32, token_logprobs

AnyModel = Any
"""A language, reward or value model: of transformers, of peft, or a `layouts.RoleView` of one."""

BLOCK = 2**20
"""Logits that are worked on at a time: 4 MiB, so that a CPU's cache holds them."""
PIECE = 2**25
"""Logits that a scoring pass makes at a time: 128 MiB, and products still large enough."""


MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
"""What families call a number that their logits are multiplied by (Cohere, Muse, Falcon-H1)."""


def language_head(model: AnyModel, hidden: Tensor) -> Tensor:
    """Logits of hidden states, as transformers' own forward pass makes them. (…, h) → (…, vocab).

    What families put between the last product and the logits: some multiply or divide them, Gemma
    caps them. Raises ValueError for families that do more (`check_head`).
    """
    config = model.config.get_text_config()
    check_head(config.model_type)
    model = model.get_base_model() if hasattr(model, "peft_config") else model
    logits: Tensor = model.get_output_embeddings()(hidden)
    for scale in (getattr(config, name, None) for name in MULTIPLIERS):
        if isinstance(scale, float | int) and config.model_type != "mpt":  # which reads no such
            logits = logits * scale
    if scale := getattr(config, "logits_scaling", None):  # HyperCLOVA X multiplies, Granite divides
        logits = logits * scale if config.model_type == "hyperclovax" else logits / scale
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits


def scored_logprobs(model: AnyModel, hidden: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """log π of each token where no gradient is wanted, without ever holding all logits.

    hidden: (n, h), tokens: (n,) → (n,), fp32.
    """
    rows = max(1, PIECE // model.config.get_text_config().vocab_size)
    fused = is_compiled(model)

    def piece(hidden: Tensor, tokens: Tensor) -> Tensor:
        logits = language_head(model, hidden)
        if fused and len(logits) > 1:
            logprobs: Tensor = compiled(_fused)(logits, tokens.unsqueeze(-1), temperature)[0]
            return logprobs.squeeze(-1)
        blocks = _blocks(logits, tokens)
        return torch.cat([token_logprobs(z, token, temperature) for z, token in blocks])

    pieces = zip(hidden.split(rows), tokens.split(rows), strict=True)
    return torch.cat([piece(*part) for part in pieces])


def logprobs_and_entropy(
    logits: Tensor, tokens: Tensor, temperature: float, fused: bool = False
) -> tuple[Tensor, Tensor]:
    """log π of each token and the entropy of its distribution. (n, vocab), (n,) → (n,), (n,), fp32;
    or of k tokens in each place: (n, vocab), (n, k) → (n, k), (n,).

    Only log π has a gradient. The backward pass turns `logits` into their gradient in place, so
    nothing else may use them. `fused`: by compiled code, where it is one token in each place.
    """
    apply: Callable[..., tuple[Tensor, Tensor]] = _LogProbs.apply
    if tokens.dim() == logits.dim():
        return apply(logits, tokens, temperature)
    fused = fused and len(logits) > 1
    logprobs, entropy = apply(logits, tokens.unsqueeze(-1), temperature, fused)
    return logprobs.squeeze(-1), entropy


def top_logprobs(
    model: AnyModel, hidden: Tensor, k: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """log π of the k likeliest tokens, and which they are, without ever holding all logits.
    hidden: (n, h) → (n, k) fp32, (n, k)."""
    vocabulary = model.config.get_text_config().vocab_size
    found = [
        torch.log_softmax(to_fp32(z) / temperature, -1).topk(min(k, vocabulary))
        for piece in hidden.split(max(1, PIECE // vocabulary))
        for (z,) in _blocks(language_head(model, piece))
    ]
    values, tokens = (torch.cat(x) for x in zip(*found, strict=True))
    return values, tokens


class _Context(FunctionCtx):
    """What the backward pass of `_LogProbs` needs."""

    temperature: float
    fused: bool
    saved_tensors: tuple[Tensor, ...]


class _LogProbs(torch.autograd.Function):
    """log softmax(z/T)[token], whose gradient in z is (onehot(token) − π)/T, block by block.

    logits: (n, vocab), tokens: (n, k) → log-probability of each, (n, k), and entropies, (n,)."""

    @staticmethod
    def forward(
        ctx: _Context, logits: Tensor, tokens: Tensor, temperature: float, fused: bool = False
    ) -> tuple[Tensor, Tensor]:
        blocks = [compiled(_fused)(logits, tokens, temperature)] if fused else []
        for z, token in _blocks(logits, tokens) if not fused else ():
            z = to_fp32(z) / temperature
            logp = torch.log_softmax(z, -1)
            logprob, z = (x.gather(-1, token) for x in (logp, z))
            norm = (z - logprob)[:, :1]
            blocks.append((logprob, -logp.exp().mul_(logp).sum(-1), norm))
        logprobs, entropy, norm = (torch.cat(x) for x in zip(*blocks, strict=True))
        ctx.temperature, ctx.fused = temperature, fused
        ctx.save_for_backward(logits, tokens, norm)  # norm: log Σ e^z
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: _Context, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        logits, tokens, norm = ctx.saved_tensors
        if ctx.fused:
            compiled(_fused_backward)(logits, tokens, norm, grad, ctx.temperature)
            return logits, None, None, None
        grad = grad / ctx.temperature
        for z, token, n, g in _blocks(logits, tokens, norm, grad):
            pi = (to_fp32(z) / ctx.temperature).sub_(n).exp_()
            z.copy_(pi.mul_(-g.sum(-1, keepdim=True)).scatter_add_(-1, token, g))
        return logits, None, None, None


def _fused(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """log π of the tokens, entropies, and log Σ e^z of z = logits/T. (n, vocab), (n, 1) → (n, 1),
    (n,), (n, 1)."""
    z = to_fp32(logits) / temperature
    most = z.amax(-1, keepdim=True)
    weights = (z - most).exp()
    total = weights.sum(-1, keepdim=True)
    norm = most + total.log()
    entropy = norm.squeeze(-1) - (weights * z).sum(-1) / total.squeeze(-1)
    return to_fp32(logits.gather(-1, tokens)) / temperature - norm, entropy, norm


def _fused_backward(
    logits: Tensor, tokens: Tensor, norm: Tensor, grad: Tensor, temperature: float
) -> None:
    """Logits (n, vocab) become their gradient. tokens, norm, grad: (n, 1)."""
    pi = (to_fp32(logits) / temperature - norm).exp()
    here = torch.arange(logits.shape[-1], device=logits.device) == tokens
    logits.copy_((here.to(pi.dtype) - pi) * (grad / temperature))


def _blocks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The rows of tensors, `BLOCK` logits at a time. (n, vocab), (n,) …"""
    rows = max(1, BLOCK // logits.shape[-1])
    return zip(*(x.split(rows) for x in (logits, *others)), strict=True)
