"""Sampling: prefill, then one token at a time with a cache of keys and values; and inference."""

from __future__ import annotations

import math
from itertools import repeat
from typing import TypeAlias

from . import heads
from .architecture import Architecture, Layer
from .layers import PassConfig
from .memory import Segment, ending, forward_peak, trunk, works
from .parallel import all_reduces
from .phases import Phase, PhaseList, pass_config
from .seconds import Sent
from .serving import request_bytes, tokens_per_pass, workspace
from .serving import sampled as sampled  # for the stages that sample
from .setup import Setup
from .sharding import Row, forward, passing
from .states import State, states
from .work import Work

SamplingPeak: TypeAlias = tuple[float, float, float]
"""Bytes of activations, of keys and values, and of logits."""
AROUND_GUESS = 116.0
"""Operations' worth of Python around each time that a draft guesses: transformers calls its
`generate`. Fitted to `mini` as the draft of `small` (benchmarks/drafts.py), not to `tiny`."""


def generation(
    s: Setup, draft: Architecture | None = None
) -> tuple[tuple[SamplingPeak, Work], tuple[SamplingPeak, Work]]:
    """→ (prefill, decoding), of each the memory at its peak and its work, of the model or of its
    `draft`. The cache grows to the whole length, in a layer with a window to that. A prompt is
    there whole until the next token comes: what transformers 5.23 cuts off is a view until then
    (cache_utils.DynamicSlidingWindowLayer). States of layers without keys and values are there too.

    With a draft that guesses k tokens a pass of the model checks k + 1, and the draft makes k
    passes for each of them. What is checked together is counted as rows of their own, each with its
    cache: weights are read once, the cache too often.
    """
    model, n, adapters = draft or s.held, s.rollout_batch, bool(s.lora_r)
    k, passes = s.num_assistant_tokens, (s.response - 1) / tokens_per_pass(s)
    checked = k + 1 if s.draft and not draft else 1
    first = pass_config(s, model, n, s.prompt, trained=False, adapters=adapters)
    first = first._replace(compiled=False)
    first = first._replace(quantized=s.weights_format)
    row = _next_token(model, first)
    itemsize = 2 if s.autocast else s.bytes_per_weight
    activations, _, logits = forward_peak(row, heads.resident_bytes(model, first))[0]
    state = 1.0 * model.state_bytes(itemsize) * n
    filled = 1.0 * model.cached * itemsize * n * s.prompt + state
    prefill = (activations, filled, logits), works(row, "forward")
    # The work of a step is linear in the context and in the rows that have not ended: a step at
    # the middle with the average number of rows stands for all.
    rows = max(1, round(n * (sampled(s) - 1) / max(1, s.response - 1)))
    one = pass_config(s, model, rows * checked, 1, trained=False, adapters=adapters)
    context = math.ceil(s.prompt + s.response / 2 - model.beyond(s.prompt + 1, s.length))
    middle = one._replace(context=context, quantized=s.weights_format)
    step = _next_token(model, middle)
    activations, _, logits = forward_peak(step, heads.resident_bytes(model, middle))[0]
    decoding = Work()
    decoding.add(works(step, "forward"), passes * k if draft else passes)
    if draft:
        decoding.add(Work(called=AROUND_GUESS), passes)
    # A layer's keys, old and new, while they grow.
    growing = max(map(_longest, model.layers, repeat(s.length - 1))) / 2 * itemsize * n
    kept = 1.0 * model.kept(s.length - 1) * itemsize * n + state
    return prefill, ((activations + growing, kept, logits), decoding)


def _longest(layer: Layer, tokens: int) -> int:
    """Numbers in the largest cache of one of these layers."""
    near = max(w for w, _ in layer.windows) if layer.windows else tokens
    some_whole = sum(n for _, n in layer.windows) < layer.count
    return layer.cached * (tokens if some_whole else min(near, tokens))


def _next_token(model: Architecture, p: PassConfig) -> tuple[Segment, ...]:
    return *trunk(model, p, grad=False), ending(model, p, heads.next_token, grad=False)


def add_rollout(
    stage: PhaseList,
    s: Setup,
    *,
    workspace: float = 0.0,
    times: float = 1.0,
    tokens: float,
    role: str = "policy",
) -> None:
    """Sampling by a role as one phase, at the higher peak of its two halves."""
    (first, work), (last, decoding) = generation(s)
    work.add(decoding)
    activations, cache, logits = max(first, last, key=sum)
    whole, sent = _gathered(s, stage.state(role), times)
    stage.add(
        "rollout",
        role,
        (activations, 0, logits),
        kv_cache=cache,
        workspace=workspace,
        communication=whole,
        work=work,
        times=times,
        tokens=tokens,
        sent=sent,
    )


def add_engine(stage: PhaseList, times: float, tokens: float) -> None:
    """Sampling by an engine, which gets whole weights before: it keeps its memory through all of
    training, unless it sleeps (`vllm_enable_sleep_mode`), and computes in its own way
    (`rollout_engine.engine_seconds`)."""
    s, state = stage.s, stage.state("policy")
    weights, rest = s.engine_bytes
    held = {("policy", "parameters"): weights, ("policy", "kv_cache"): rest}
    if not s.vllm_enable_sleep_mode:
        for key, size in held.items():
            stage.resident[key] += size
        held = {}
    sent = passing(s, state, times)._replace(hides=False)
    stage.add("rollout", "policy", others=held, times=times, tokens=tokens, sent=sent)


def _gathered(s: Setup, state: State, times: float) -> tuple[float, Sent]:
    """→ bytes of weights that are whole while responses are sampled, and what gathers them.

    Under ZeRO-3 TRL gathers all of them before (`ds3_gather_for_generation`), and so does our PPO
    under both. Without, and with TRL under FSDP2, each is gathered in every pass, that is for
    every token.
    """
    if s.sharding not in ("zero3", "fsdp2"):
        return 0.0, Sent()
    if s.ds3_gather_for_generation and (s.sharding == "zero3" or s.stage == "ppo"):
        return state.whole, passing(s, state, times)._replace(hides=False)
    row = Row(_next_token(s.model, pass_config(s, s.model, 1, 1, trained=False)), state)
    sent = passing(s, state, times * max(1, s.response))
    if s.sharding == "zero3" and s.stage == "ppo":  # parts are called alone: nothing comes ahead
        return max(row.units), sent
    here, _ = forward(s, [row], 0)
    return here.whole, sent


def inference(s: Setup) -> list[Phase]:
    """Generation alone, its two halves apart: one is bound by arithmetic, one by memory. An engine
    serves both together: its memory is the same in both."""
    stage, n, model = PhaseList(s), s.rollout_batch, s.held
    stage.hold("policy", states(s, model, "lm", trained=False))
    if s.draft:
        stage.hold("draft", states(s, s.draft, "lm", trained=False))
    guessing = generation(s, s.draft) if s.draft else (None, None)
    itemsize = 2 if s.autocast else s.bytes_per_weight
    row = float(n * model.hidden * itemsize)  # one token of every sequence
    halves = (
        ("prefill", s.prompt, (row * s.prompt, 1)),
        ("decode", sampled(s), (row, s.response - 1)),
    )
    for (name, tokens, (size, times)), half, guess in zip(halves, generation(s), guessing):
        (activations, cache, logits), work = half
        if s.engine == "vllm":
            activations, cache, logits = workspace(s), n * request_bytes(s), 0.0
        caches: dict[tuple[str, str], float] = {}
        if guess:  # the draft works first; both caches stay
            (its_own, caches["draft", "kv_cache"], more), extra = guess
            both = {("policy", "kv_cache"): cache, **caches}
            stage.add(name, "draft", (its_own, 0, more), others=both, work=extra)
        stage.add(
            name,
            "policy",
            (activations, 0, logits),
            kv_cache=cache,
            others=caches,
            work=work,
            tokens=n * tokens,
            devices=s.tensor_parallel,
            sums=(size, times * all_reduces(model)),
        )
    return stage.phases
