"""Solutions that the lab has no function for, since it gets them from TRL or from its planner.

Tests compare them with TRL's losses, transformers, peft and the planner. Shapes: b rows of s
tokens, n answers or pairs, p prompts of k responses each.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def next_token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log π of every token but the first, given what stands before it. The logits at a position
    are about the token after it. logits: (b, s, vocab), tokens: (b, s) → (b, s − 1)."""
    logp = torch.log_softmax(logits[:, :-1], dim=-1)
    return logp.gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)


def sft_loss(logits: Tensor, tokens: Tensor, completion_mask: Tensor) -> Tensor:
    """Cross-entropy of the completions, a mean over all of their tokens in the batch, in nats.
    logits: (b, s, vocab), tokens: (b, s), completion_mask: (b, s), True at tokens to learn → ().
    Where there are none it is 0."""
    logp = next_token_logprobs(logits, tokens)
    mask = completion_mask[:, 1:].to(logp.dtype)
    return -(logp * mask).sum() / mask.sum().clamp(min=1)


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
    """−log σ(chosen − rejected − margin), mean over pairs: the chosen answer shall win, by a margin
    (Llama 2, arXiv 2307.09288; without one it is 0). Scores and margins, (n,) each → ()."""
    return -F.logsigmoid(chosen - rejected - margin).mean()


def pair_accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Share of pairs whose chosen answer scores higher; a tie is not won. (n,), (n,) → ()."""
    return (chosen > rejected).double().mean()


def accuracy_ceiling(p_first: Tensor) -> Tensor:
    """The best accuracy that a reward model can expect where the first answer of a pair is labelled
    as better with a known probability: it always says the likelier one. p_first: (n,) → ()."""
    return torch.maximum(p_first, 1 - p_first).mean()


def token_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """−Σ p·log p over the vocabulary, in nats; a mean over real positions, 0 where there are none.
    logits: (b, t, vocab), mask: (b, t) → ()."""
    logp = torch.log_softmax(logits, dim=-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return (entropy * mask).sum() / mask.sum().clamp(min=1)


def dpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """An answer's implicit reward is β·(log π − log π_ref); the margin is that of the chosen answer
    less that of the rejected one; the loss is −log σ(margin), mean over pairs. Log-probabilities of
    whole answers, (n,) each → loss (), margins (n,). Rafailov et al., arXiv 2305.18290."""
    margins = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -F.logsigmoid(margins).mean(), margins


def kto_loss(
    logps: Tensor,
    ref_logps: Tensor,
    kl_logps: Tensor,
    ref_kl_logps: Tensor,
    desirable: Tensor,
    beta: float,
) -> Tensor:
    """1 − σ(±β·(log π − log π_ref − KL)), + for a good answer, − for a bad one; mean over answers.
    logps, ref_logps, desirable: (n,) → (). kl_logps, ref_kl_logps: (n,) of answers to other
    prompts, whose mean log-ratio estimates the KL: at least 0, and no gradient flows through it.
    Ethayarajh et al., arXiv 2402.01306."""
    kl = (kl_logps - ref_kl_logps).mean().clamp(min=0).detach()
    ratios = logps - ref_logps
    signed = torch.where(desirable, ratios - kl, kl - ratios)
    return (1 - torch.sigmoid(beta * signed)).mean()


def rloo_advantages(group_scores: Tensor) -> Tensor:
    """Each score less the mean of the others to the same prompt. group_scores: (p, k) → (p, k).
    Ahmadian et al., arXiv 2402.14740."""
    others = group_scores.sum(1, keepdim=True) - group_scores
    return group_scores - others / (group_scores.shape[1] - 1)


def grpo_advantages(group_scores: Tensor) -> Tensor:
    """Each score less its group's mean, in standard deviations of the group: unbiased ones, to
    which 1e-4 is added, as in TRL. group_scores: (p, k) → (p, k). Shao et al., arXiv 2402.03300."""
    std = group_scores.std(1, keepdim=True)
    return (group_scores - group_scores.mean(1, keepdim=True)) / (std + 1e-4)


def layer_parameters(hidden: int, intermediate: int, heads: int, kv_heads: int, width: int) -> int:
    """Weights of one Llama layer: the matrices q, k, v, o without biases, of heads `width` wide,
    the gated MLP's three (gate, up, down), and two norms of `hidden` numbers each."""
    attention = 2 * hidden * heads * width + 2 * hidden * kv_heads * width
    return attention + 3 * hidden * intermediate + 2 * hidden


def lora_parameters(hidden: int, heads: int, kv_heads: int, width: int, rank: int) -> int:
    """Adapter weights for q, k, v and o of one layer, whose heads are `width` wide: a matrix of
    (out, in) numbers gets two, (rank, in) and (out, rank)."""
    return 2 * rank * (hidden + heads * width) + 2 * rank * (hidden + kv_heads * width)


def training_bytes(trained: int, frozen: int) -> int:
    """Bytes of all weights and what AdamW keeps beside them, in mixed precision (bf16 autocast over
    fp32 weights): of a trained one also its gradient and two moments, 4 bytes each."""
    return 4 * (trained + trained + 2 * trained) + 4 * frozen


def ppo_bytes(policy: int, value: int, reference: int, reward: int, frozen_width: int) -> int:
    """The same for PPO's four models by their numbers of weights: two are trained, two are frozen
    and have `frozen_width` bytes a weight."""
    return 16 * (policy + value) + frozen_width * (reference + reward)


def training_flops(
    parameters: int, tokens: int, layers: int, heads: int, width: int, length: int
) -> int:
    """FLOPs of forward and backward over `tokens` tokens in rows of `length`: 6 a weight and token;
    for attention's two products 12·layers·heads·width·length a token, all pairs of positions
    counted (PaLM, arXiv 2204.02311, appendix B)."""
    return tokens * (6 * parameters + 12 * layers * heads * width * length)


def kv_cache_bytes(layers: int, kv_heads: int, width: int, length: int, rows: int) -> int:
    """Bytes of the keys and values of all positions of all rows, in bf16 (2 bytes a number)."""
    return 2 * layers * kv_heads * width * length * rows * 2


def decode_speed(weight_bytes: float, cache_bytes: float, rows: int, bandwidth: float) -> float:
    """Tokens a second where memory is the limit: for one token of each row the weights are read
    once, and `cache_bytes` of every row. bandwidth: bytes a second."""
    return rows / ((weight_bytes + rows * cache_bytes) / bandwidth)


def ring_bytes(total: int, devices: int) -> float:
    """Bytes that each device sends to sum arrays of `total` bytes over a ring: pieces of
    total / devices, devices − 1 of them to add up, as many to pass on the sums (Patarasuk and Yuan,
    2009)."""
    return 2 * (devices - 1) * total / devices


def sharded_bytes(trained: int, devices: int, zero: int) -> float:
    """Bytes of weights, gradients and AdamW's states on each device under ZeRO-1, 2 or 3 (0: DDP),
    as DeepSpeed keeps them in 16 bits: 2 a weight, 2 a gradient, 12 of states (a copy in fp32 and
    two moments). 1 shares the states, 2 the gradients too, 3 the weights too. Rajbhandari et al.,
    arXiv 1910.02054."""
    states = 12 * trained / (devices if zero >= 1 else 1)
    gradients = 2 * trained / (devices if zero >= 2 else 1)
    weights = 2 * trained / (devices if zero >= 3 else 1)
    return weights + gradients + states


def static_steps(lengths: Tensor, slots: int) -> int:
    """Decode steps of static batching: requests in their order, `slots` at a time; a batch is done
    when its longest is. lengths: (n,), the tokens that each request gets."""
    return sum(int(batch.max()) for batch in lengths.split(slots))


def tokens_per_pass(accepted: float, drafted: int) -> float:
    """Tokens that speculative decoding gains on average from one pass of the large model: `drafted`
    tokens of a draft are checked in it, each accepted with the same probability if all before it
    were; after the last accepted one comes a token of the large model's own. Leviathan et al.,
    arXiv 2211.17192, equation 1."""
    return sum(accepted**tokens for tokens in range(drafted + 1))


def usd_per_million(tokens_per_second: float, price_per_hour: float) -> float:
    """USD for a million tokens from a machine that is paid by the hour."""
    return price_per_hour / 3600 / tokens_per_second * 1_000_000


def leaves_band(curve: Tensor, middle: Tensor, width: Tensor) -> Tensor:
    """The first iteration, from 1, in which a curve is farther than `width` from the middle of a
    band, and in the next one too: one alone may be chance. In the last one, once is enough. 0: it
    never leaves. (n,), (n,), () → ()."""
    out = (curve - middle).abs() > width
    stays = out & torch.cat([out[1:], out[-1:]])
    return torch.where(stays.any(), stays.int().argmax() + 1, 0)


def gold_peak(alpha: float, beta: float) -> float:
    """The KL at which the gold reward is highest, where it follows d(α − β·log d) with d = √KL, as
    for PPO in Gao et al., arXiv 2210.10760: there the derivative by d is 0."""
    return math.exp(2 * (alpha / beta - 1))
