"""How a trainer's step is shortened, and what it is given, while its tensors are fake.

Where code looks into numbers it is given an answer (`fake_answers`). PPO's loops, which would do
the same thing many times over, do the first turns, at the same memory, and the work of the others
is counted (`FirstTurns`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from fractions import Fraction
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import masking_utils

from ..data.lengths import LEAST_TOKENS_SAVED
from ..metering.model_memory import fused_head_within
from ..ppo import losses
from ..ppo.checkpoint import random_state, set_random_state
from ..ppo.executor import Buckets, Executor
from ..ppo.logprobs import AnyModel
from ..ppo.sampling import LanguageModel
from ..stages import Setting
from .account import FakeAccount, StepAccount
from .models import Step

TURNS = 2
"""Turns that are made of a loop of equal ones: the first, and one that finds what it left."""


@contextmanager
def fake_answers(account: FakeAccount, *, gpu: bool, padded: bool) -> Iterator[None]:
    """Other people's code under fake tensors. `gpu`: kernels of a GPU; `padded`: what masks answer
    when they are asked whether rows differ in length."""
    with ExitStack() as stack:
        # A fake tensor cannot be moved or cast in place, and need not be.
        stack.enter_context(patch.object(nn.Module, "_apply", lambda module, *_, **__: module))
        # transformers looks into masks as it does outside tracing; the answer is `padded`.
        stack.enter_context(patch.object(masking_utils, "is_tracing", lambda *_: False))
        stack.enter_context(patch.object(masking_utils, "fast_all", lambda _: not padded))
        stack.enter_context(head_labelled(account))
        if gpu:
            stack.enter_context(_triton_head(account))
            stack.enter_context(patch.object(nn.functional, "dropout", _dropout))
        yield


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """As a GPU's kernel, which keeps a byte of each number."""
    return torch.native_dropout(x, p, training)[0] if training and p else x


def head_labelled(account: StepAccount) -> AbstractContextManager[None]:
    """What TRL's fused head makes beside its tiles of logits is workspace."""
    import trl.kernels.chunked_logprob  # noqa: F401  here already, if a trainer is

    return fused_head_within(lambda: account.labelled("workspace"))


@contextmanager
def _triton_head(account: StepAccount) -> Iterator[None]:
    """TRL's fused head as on a GPU: only scored positions, tiles changed in place by kernels, and
    products added to fp32 gradients without a copy."""
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
        account.count(2 * a.shape[0] * a.shape[1] * b.shape[1])

    with (
        patch.object(utils, "_use_triton", lambda _: True),
        patch.object(chunked_logprob, "_forward_tile", lambda *_, **__: None),
        patch.object(chunked_logprob, "_backward_tile", lambda *_, **__: None),
        patch.object(chunked_logprob, "_addmm_fp32", add_product),
    ):
        yield


# --------------------------------------------------------------------------------------------- PPO


class FirstTurns(Executor):
    """Runs the first turns of PPO's loops, and counts the work of the others."""

    def __init__(self, account: StepAccount, step: Step):
        setup = step.setup
        self.account, self.prompt, self.batch = account, setup.prompt, setup.batch
        self.steps = setup.num_ppo_epochs * setup.num_mini_batches  # of an update
        # Decoding costs a fixed amount and one that grows with the positions that are looked at:
        # an arithmetic series between the second token and the last, or the window's end.
        window = step.config.get("sliding_window") or 0
        ends = {1, 2, setup.response, window - setup.prompt + 1}
        self.positions = sorted(ends & set(range(1, setup.response + 1)))
        self.statistics: dict[str, float] | None = None

    def generate(self, model: LanguageModel, *prompts: Tensor, **settings: Setting) -> Tensor:
        """Decodes at `positions`; the passes between two cost their mean."""
        account, flops = self.account, dict[int, int]()

        def call(**inputs: AnyModel) -> object:
            position = self.positions[len(flops)]
            length = self.prompt + position - 2  # positions in the cache before this pass
            if position > 1:
                before = account.call("policy", "kv_cache")
                _grow(inputs["past_key_values"], length)
                account.call(*before)
            counted = account.flops["rollout", "policy"]
            output: object = model(**inputs)
            flops[position] = account.flops["rollout", "policy"] - counted
            return output

        call.config = model.config  # type: ignore[attr-defined]
        responses = super().generate(call, *prompts, **settings, positions=self.positions)
        for one, two in zip(self.positions[1:], self.positions[2:], strict=False):
            account.count((flops[one] + flops[two]) * (two - one - 1) // 2)
        return responses

    def length_buckets(self, mask: Tensor, rows: int, least: int = LEAST_TOKENS_SAVED) -> Buckets:
        """All rows are as long. mask: (b, s)"""
        return list(torch.arange(len(mask)).split(rows))

    def map_chunks(
        self, function: Callable[..., Tensor], buckets: Buckets, *tensors: Tensor
    ) -> Tensor:
        """Runs the first pass, for all but the last, and the last. (b, …) each → (b, …)."""
        pieces = list(zip(*(t.split(len(buckets[0])) for t in tensors), strict=True))
        done: list[Tensor] = []
        if len(pieces) > 1:
            with self.account.counted_as(len(pieces) - 1):
                done.append(function(*pieces[0]))
            done += [torch.empty_like(done[0]) for _ in pieces[2:]]
        return torch.cat([*done, function(*pieces[-1])])

    def compute_gae(
        self, rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
    ) -> tuple[Tensor, Tensor]:
        """Goes through the first tokens only. (b, t) → (b, t), (b, t)."""
        first = range(min(rewards.shape[1], TURNS))
        return losses.compute_gae(rewards, values, mask, gamma, lam, first)

    def run_minibatch(
        self, train: Callable[[Tensor], dict[str, float]], rows: Tensor
    ) -> dict[str, float]:
        """Trains on the first minibatch, for all of them, and on the first passes of that."""
        if self.statistics is None:
            whole, first = len(rows), TURNS * self.batch
            if whole % self.batch == 0 and whole > first:
                rows = rows[:first]
            with self.account.counted_as(Fraction(self.steps * whole, len(rows))):
                self.statistics = train(rows)
        return self.statistics


def _grow(cache: AnyModel, length: int) -> None:
    """Let a transformers cache hold keys and values of `length` positions; states do not grow."""
    for layer in cache.layers:
        if getattr(layer, "keys", None) is None:
            continue
        most = layer.sliding_window - 1 if layer.is_sliding else length
        if layer.is_sliding:
            layer.cumulative_length = length
        for name in ("keys", "values", "indexer_keys"):
            old = getattr(layer, name, None)
            if old is not None and old.shape[-2] < min(length, most):
                shape = (*old.shape[:-2], min(length, most), old.shape[-1])
                setattr(layer, name, old.new_empty(shape))


# ------------------------------------------------------------------------------- before and after


@contextmanager
def left_alone() -> Iterator[None]:
    """accelerate's shared state, random numbers and logging are as before afterwards."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers.utils import logging

    from ..launch.launcher import prepare_process

    prepare_process()
    states = [(s, dict(s._shared_state)) for s in (AcceleratorState, GradientState, PartialState)]
    seeds, verbosity = random_state(), logging.get_verbosity()
    logging.set_verbosity_error()
    AcceleratorState._reset_state()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        set_random_state(seeds)
        for state, before in states:
            state._shared_state.clear()
            state._shared_state.update(before)
