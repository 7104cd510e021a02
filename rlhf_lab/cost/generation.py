"""Sampling: prefill, then one token at a time with a cache of keys and values; and inference."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias

from . import heads
from .architecture import Architecture
from .layers import PassConfig
from .memory import Segment, ending, forward_peak, trunk, works
from .phases import Phase, PhaseList, pass_config
from .setup import Setup
from .states import states
from .tape import Work

SamplingPeak: TypeAlias = tuple[float, float, float]
"""Bytes of activations, of keys and values, and of logits."""


def sampled(s: Setup) -> float:
    """Tokens of a response that are sampled, on average."""
    return s.response if s.mean_response is None else min(s.mean_response, s.response)


def generation(s: Setup) -> tuple[tuple[SamplingPeak, Work], tuple[SamplingPeak, Work]]:
    """→ (prefill, decoding), of each the memory at its peak and its work. The cache grows to the
    whole length."""
    model, n, adapters = s.model, s.rollout_batch, bool(s.lora_r)
    first = pass_config(s, model, n, s.prompt, trained=False, adapters=adapters)
    row = _next_token(model, first)
    itemsize = 2 if s.autocast else s.bytes_per_weight
    # Keys and values of one token of every sequence.
    per_token = 2.0 * model.depth * model.kv_heads * model.head_dim * itemsize * n
    (activations, _, logits), _ = forward_peak(row, heads.resident_bytes(model, first))
    prefill = (activations, per_token * s.prompt, logits), works(row, "forward")
    # The work of a step is linear in the context and in the rows that have not ended: a step at
    # the middle with the average number of rows stands for all.
    rows = max(1, round(n * (sampled(s) - 1) / max(1, s.response - 1)))
    one = pass_config(s, model, rows, 1, trained=False, adapters=adapters)
    middle = replace(one, context=s.prompt + (s.response + 1) // 2)
    step = _next_token(model, middle)
    (activations, _, logits), _ = forward_peak(step, heads.resident_bytes(model, middle))
    decoding = Work()
    decoding.add(works(step, "forward"), s.response - 1)
    length = s.length - 1
    growing = per_token / model.depth / 2 * length  # a layer's keys, old and new, while they grow
    return prefill, ((activations + growing, per_token * length, logits), decoding)


def _next_token(model: Architecture, p: PassConfig) -> tuple[Segment, ...]:
    return *trunk(model, p, grad=False), ending(model, p, heads.next_token, grad=False)


def add_rollout(
    stage: PhaseList, s: Setup, *, workspace: float = 0.0, times: float = 1.0, tokens: float
) -> None:
    """Sampling as one phase, at the higher peak of its two halves."""
    (first, work), (last, decoding) = generation(s)
    work.add(decoding)
    activations, cache, logits = max(first, last, key=sum)
    stage.add(
        "rollout",
        "policy",
        (activations, 0, logits),
        kv_cache=cache,
        workspace=workspace,
        work=work,
        times=times,
        tokens=tokens,
    )


def inference(s: Setup) -> list[Phase]:
    """Generation alone, its two halves apart: one is bound by arithmetic, one by memory."""
    stage, n = PhaseList(s), s.rollout_batch
    stage.hold("policy", states(s, s.model, "lm", trained=False))
    tokens = n * s.prompt, n * sampled(s)
    for name, half, count in zip(("prefill", "decode"), generation(s), tokens, strict=True):
        (activations, cache, logits), work = half
        peak = activations, 0, logits
        stage.add(name, "policy", peak, kv_cache=cache, work=work, tokens=count)
    return stage.phases
