"""A larger model that begins as a trained smaller one and computes the same (Net2Net, Chen et al.,
1511.05641): what was learned is not learned again.

The old model lies in the first dimensions, heads, units and layers of the new one. What is new
reads with random weights and writes nothing yet: its outputs are zero, their gradients are not.
"""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM


@torch.no_grad()
def grow(new: LlamaForCausalLM, old: LlamaForCausalLM) -> None:
    """Write `old` into `new`, whose weights are random. Heads must be as wide, and each head of
    keys and values serves as many new heads of queries as old ones, or a multiple; else ValueError.
    """
    share = _widen_norm(new.model.norm.weight, old.model.norm.weight)
    table = new.model.embed_tokens.weight
    table.zero_()
    table[:, : old.config.hidden_size] = old.model.embed_tokens.weight
    heads = _heads(new, old)
    for number, layer in enumerate(new.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        writers = attention.o_proj.weight, mlp.down_proj.weight
        if number >= len(old.model.layers):
            for weight in writers:
                weight.zero_()
            continue
        before = old.model.layers[number]
        for name in ("input_layernorm", "post_attention_layernorm"):
            _widen_norm(getattr(layer, name).weight, getattr(before, name).weight)
        for weight in writers:
            weight.zero_()
        theirs = before.self_attn
        attention.q_proj.weight[heads, :share] = theirs.q_proj.weight
        attention.o_proj.weight[:share, heads] = theirs.o_proj.weight
        for name in ("k_proj", "v_proj"):
            _corner(getattr(attention, name).weight, getattr(theirs, name).weight)
        for name in ("gate_proj", "up_proj", "down_proj"):
            _corner(getattr(mlp, name).weight, getattr(before.mlp, name).weight)


def _widen_norm(new: torch.Tensor, old: torch.Tensor) -> int:
    """The new dimensions are zero: the mean square falls, so the weights do. → the old width."""
    new.fill_(float(old.mean()))
    new[: len(old)] = old
    new *= (len(old) / len(new)) ** 0.5
    return len(old)


def _corner(new: torch.Tensor, old: torch.Tensor) -> None:
    new[: old.shape[0], : old.shape[1]] = old


def _heads(new: LlamaForCausalLM, old: LlamaForCausalLM) -> torch.Tensor:
    """Rows of the new queries that are the old ones': beside the same keys and values."""
    a, b = old.config, new.config
    was, now = (c.num_attention_heads // c.num_key_value_heads for c in (a, b))
    if a.head_dim != b.head_dim or now % was or a.num_key_value_heads > b.num_key_value_heads:
        old_heads, new_heads = (
            f"{c.num_attention_heads} heads on {c.num_key_value_heads}, {c.head_dim} wide,"
            for c in (a, b)
        )
        raise ValueError(f"{old_heads} do not grow into {new_heads}".rstrip(","))
    first = [h // was * now + h % was for h in range(a.num_attention_heads)]
    return torch.cat([torch.arange(h * b.head_dim, (h + 1) * b.head_dim) for h in first])
