"""What a trainer is told while it rehearses a step on fake tensors (see `simulation.py`).

Where its code looks into numbers, or would do the same thing many times over, it gets a stand-in
that costs the same memory and counts the same work.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..metering.patch import fused_head_within, patched
from ..ppo.rollout import Passes
from .account import FakeAccount, StepAccount

FEW = 2
"""Passes that stand for many alike: the first, and one that finds what the first left behind."""


@contextmanager
def stand_ins(account: FakeAccount, *, gpu: bool, padded: bool) -> Iterator[None]:
    """All that any trainer needs; `gpu`: kernels of a GPU, `padded`: what masks answer."""
    with ExitStack() as stack:
        # A fake tensor cannot be moved or cast in place, and need not be.
        stack.enter_context(patched(nn.Module, "_apply", lambda module, *_, **__: module))
        stack.enter_context(_masks_answered(padded))
        stack.enter_context(head_labelled(account))
        if gpu:
            stack.enter_context(_triton_head(account))
        yield


@contextmanager
def _masks_answered(padded: bool) -> Iterator[None]:
    """transformers looks into masks as it does outside tracing; the answer is `padded`."""
    from transformers import masking_utils

    with (
        patched(masking_utils, "is_tracing", lambda *_: False),
        patched(masking_utils, "fast_all", lambda _: not padded),
    ):
        yield


def head_labelled(account: StepAccount) -> AbstractContextManager:
    """What TRL's fused head makes beside its tiles of logits is workspace."""
    import trl.kernels.chunked_logprob  # noqa: F401  here already, if a trainer is

    return fused_head_within(lambda: account.labelled("workspace"))


@contextmanager
def _triton_head(account: StepAccount) -> Iterator[None]:
    """TRL's fused head as on a GPU: only scored positions, tiles changed in place by kernels, and
    products added to fp32 gradients without a copy."""
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    def add_product(total, a, b) -> None:
        account.count(2 * a.shape[0] * a.shape[1] * b.shape[1])

    with (
        patched(utils, "_use_triton", lambda _: True),
        patched(chunked_logprob, "_forward_tile", lambda *_, **__: None),
        patched(chunked_logprob, "_backward_tile", lambda *_, **__: None),
        patched(chunked_logprob, "_addmm_fp32", add_product),
    ):
        yield


# --------------------------------------------------------------------------------------------- PPO


@contextmanager
def few_passes(account: FakeAccount, prompt: int, response: int, window: int = 0) -> Iterator[None]:
    """PPO's loops over tokens and rows, shortened. `window`: of sliding attention, 0 without."""
    from ..ppo import losses, rollout, trainer

    generate = _few_tokens(account, prompt, response, window)
    passes = _few_passes(account)
    with (
        patched(rollout, "range", lambda *_: generate.visits),
        patched(trainer, "generate", generate),
        patched(rollout, "map_chunks", passes),
        patched(rollout, "length_buckets", _equal_passes),  # all rows are as long
        patched(trainer, "length_buckets", _equal_passes),
        patched(rollout, "width_of", lambda mask: mask.shape[1]),
        patched(rollout, "places_of", lambda said: torch.arange(said.numel())),
        patched(losses, "range", lambda n: range(min(n, FEW))),  # GAE goes token by token
    ):
        yield


def _equal_passes(mask: Tensor, rows: int, least: int = 0) -> Passes:
    """`rollout.length_buckets` where all rows are as long."""
    return list(torch.arange(len(mask)).split(rows))


def _few_passes(account: FakeAccount) -> Callable[..., Tensor]:
    """`rollout.map_chunks` that runs the first pass for all but the last, and the last."""

    def map_chunks(function: Callable[..., Tensor], passes: Passes, *tensors: Tensor) -> Tensor:
        pieces = list(zip(*(t.split(len(passes[0])) for t in tensors), strict=True))
        done: list[Tensor] = []
        if len(pieces) > 1:
            with account.standing_for(len(pieces) - 1):
                done.append(function(*pieces[0]))
            done += [torch.empty_like(done[0]) for _ in pieces[2:]]
        return torch.cat([*done, function(*pieces[-1])])

    return map_chunks


def _few_tokens(account: FakeAccount, prompt: int, response: int, window: int) -> Callable:
    """`rollout.generate` that decodes the first and the last token; the work of the rest is summed.

    A decoding pass costs a fixed amount and one that grows with the positions it looks at, so the
    passes between two are an arithmetic series (up to a sliding window, and from there on).
    """
    from ..ppo import rollout

    last, real = response, rollout.generate
    visits = sorted({1, 2, last, window - prompt + 1} & set(range(1, last + 1)))

    def generate(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        spent: dict[int, int] = {}

        def call(**inputs: Any) -> Any:
            visit = visits[len(spent)]
            seen = prompt + visit - 2  # positions in the cache before this pass
            if visit > 1:
                before = account.call("policy", "kv_cache")
                _grow(inputs["past_key_values"], seen)
                account.call(*before)
                mask = inputs["attention_mask"]
                inputs["attention_mask"] = mask.new_ones(len(mask), seen + 1)
            before = account.flops["rollout", "policy"]
            out = model(**inputs)
            spent[visit] = account.flops["rollout", "policy"] - before
            return out

        out = real(call, *args, **kwargs)
        for one, two in zip(visits[1:], visits[2:], strict=False):
            account.count((spent[one] + spent[two]) * (two - one - 1) // 2)
        return out

    generate.visits = visits
    return generate


def _grow(cache, length: int) -> None:
    """Let a transformers cache hold keys and values of `length` positions."""
    for layer in cache.layers:
        most = layer.sliding_window - 1 if layer.is_sliding else length
        if layer.is_sliding:
            layer.cumulative_length = length
        if layer.keys.shape[-2] < min(length, most):
            for name in ("keys", "values"):
                old = getattr(layer, name)
                shape = (*old.shape[:-2], min(length, most), old.shape[-1])
                setattr(layer, name, old.new_empty(shape))


# ------------------------------------------------------------------------------- before and after


@contextmanager
def left_alone() -> Iterator[None]:
    """accelerate's shared state, random numbers and logging are as before afterwards."""
    import numpy
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers.utils import logging

    from ..launch.machine import prepare_process

    prepare_process()
    states = [(s, dict(s._shared_state)) for s in (AcceleratorState, GradientState, PartialState)]
    seeds, verbosity = (random.getstate(), numpy.random.get_state()), logging.get_verbosity()
    logging.set_verbosity_error()
    AcceleratorState._reset_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        logging.set_verbosity(verbosity)
        random.setstate(seeds[0])
        numpy.random.set_state(seeds[1])
        for state, kept in states:
            state._shared_state.clear()
            state._shared_state.update(kept)
