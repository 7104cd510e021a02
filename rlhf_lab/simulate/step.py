"""Simulate one training step of a stage without weights or a GPU: what does it take?

    simulate_step(Setup(stage="sft", model=architecture(config), dtype="bfloat16"), config)

The trainers are the real ones (TRL's for SFT, reward models and DPO, ours for PPO); the tensors
are fake (see `account.py`). With `real` the same step runs on real tensors of random numbers on
this machine's CPU, under the same account or under torch's profiler: how far is the x-ray off? Or
by the clock: how far are a plan's seconds?
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Mapping
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from ..metering.memory_tracker import GPU_BLOCK
from ..metering.meter import Meter
from ..ppo.logprobs import AnyModel
from ..runs.ledger import Ledger
from ..stages import XRAYED
from .account import FakeAccount, StepAccount, materialise
from .models import Config, Step, by_role, models_of
from .shortcuts import TURNS, FirstTurns, fake_answers, head_labelled, left_alone
from .trainers import Trainable, ppo_trainer, trl_trainer
from .xray import XRay, labelled

if TYPE_CHECKING:
    from ..cost.setup import Setup


def simulate_step(
    setup: Setup,
    config: Config,
    roles: Mapping[str, Config] | None = None,
    real: bool | str = False,
) -> XRay:
    """One optimizer step of a stage (PPO: one iteration), the optimizer's state being there.

    `config`: a transformers config as a dict; `roles`, `real`: see `Step`. Of the setup counts
    what one device does: every row is of its `prompt` and `response` tokens. Raises ValueError,
    one line, for what cannot be simulated.
    """
    if setup.stage not in XRAYED:
        raise ValueError(f"stage={setup.stage!r}: choose from {', '.join(XRAYED)}")
    if setup.stage == "ppo" and setup.gradient_checkpointing:
        raise ValueError("PPO has no gradient_checkpointing: its models are in eval mode")
    step = Step(setup, config, roles or {}, real)
    with left_alone(), tempfile.TemporaryDirectory() as folder:
        if real:  # trainers hold themselves in circles: what an earlier one held goes now
            gc.collect()
        if real == "profiler":
            return _profile(step, folder)
        if real == "clock":
            return _clock(step, folder)
        return _measure(step, folder) if real else _simulate(step, folder)


def _trainer(
    step: Step, models: Mapping[str, AnyModel], folder: str, account: StepAccount | None, steps: int
) -> Trainable:
    make = ppo_trainer if step.setup.stage == "ppo" else trl_trainer
    passes = step.setup.gradient_accumulation_steps
    return make(step, models, folder, account, steps, passes)


def _simulate(step: Step, folder: str) -> XRay:
    """The step after the first, on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    setup, passes = step.setup, step.setup.gradient_accumulation_steps
    with torch.device("meta"):
        models = models_of(step)
    account = FakeAccount(GPU_BLOCK if setup.gpu else 1, _widths(step), setup.response)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        fake_answers(account, gpu=setup.gpu, padded=setup.padded),
        account,
    ):
        for model in reversed(models.values()):  # what is trained first: others may be parts of it
            materialise(model)
        with labelled(account, by_role(models), phases=setup.stage != "ppo"):
            if setup.stage == "ppo":
                run = FirstTurns(
                    account,
                    setup.prompt,
                    setup.response,
                    step.config.get("sliding_window") or 0,
                    setup.batch,
                    setup.num_ppo_epochs * setup.num_mini_batches,
                )
                ppo_trainer(step, models, folder, account, 1, passes, executor=run).train()
            else:
                first = min(TURNS, passes)
                trainer = trl_trainer(step, models, folder, account, 1, first)
                with account.standing_for(Fraction(passes, first)):
                    trainer.train()
    return XRay.of(account, setup.stage, "gpu" if setup.gpu else "cpu")


def _measure(step: Step, folder: str) -> XRay:
    """Two steps on real tensors under an account; the x-ray is of the second."""
    models, account = models_of(step), StepAccount(1, _widths(step))
    with head_labelled(account), account:
        with labelled(account, by_role(models), phases=step.setup.stage != "ppo"):
            _trainer(step, models, folder, account, steps=2).train()
    return XRay.of(account, step.setup.stage, "cpu", source="measured")


def _profile(step: Step, folder: str) -> XRay:
    """Two steps on real tensors under torch's profiler: the CPU allocator's own peak, no more."""
    models = models_of(step)
    held = {id(t): t for m in models.values() for t in (*m.parameters(), *m.buffers())}
    base = sum(t.untyped_storage().nbytes() for t in held.values())
    trainer = _trainer(step, models, folder, None, steps=2)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train()
    return XRay(step.setup.stage, Ledger(), base + _allocated(profiler), device="cpu")


def _allocated(profiler: profile) -> int:
    """The highest "Total Allocated" above what was allocated at the beginning, in bytes."""
    from torch._C._profiler import _EventType

    result: AnyModel = profiler.profiler
    allocations, todo = [], list(result.kineto_results.experimental_event_tree())
    while todo:
        event = todo.pop()
        todo += event.children
        if event.tag == _EventType.Allocation:
            extra = event.extra_fields
            allocations.append((event.start_time_ns, extra.total_allocated, extra.alloc_size))
    _, total, size = min(allocations)
    return int(max(total for _, total, _ in allocations) - (total - size))


TIMED = 8
"""Steps that the clock looks at, after one that it does not."""


def _clock(step: Step, folder: str) -> XRay:
    """Steps on real tensors, timed phase by phase and nothing else: medians of the phases."""
    from ..metering.callback import MeterCallback

    stage, passes = step.setup.stage, step.setup.gradient_accumulation_steps
    models, meter = models_of(step), Meter(stage, flops=False, memory=False)
    clock, steps = _StepSeconds(meter), 1 + TIMED
    if stage == "ppo":
        ppo_trainer(step, models, folder, None, steps, passes, [clock], meter).train()
    else:
        callbacks = [MeterCallback(meter), clock]
        trl_trainer(step, models, folder, None, steps, passes, callbacks).train()
    ledger = Ledger()
    for phase, role in meter.seconds:
        ledger.add(
            stage=stage,
            phase=phase,
            role=role,
            quantity="seconds",
            value=statistics.median(clock.of(phase, role)[1:]),
            source="measured",
        )
    return XRay(stage, ledger, 0, device="cpu")


class _StepSeconds(TrainerCallback):
    """What a meter's clock shows after every step."""

    def __init__(self, meter: Meter):
        self.meter = meter
        self.readings: list[dict[tuple[str, str], float]] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        self.readings.append(dict(self.meter.seconds))

    def of(self, phase: str, role: str) -> list[float]:
        """Seconds of each step."""
        sums = [0.0, *(s.get((phase, role), 0.0) for s in self.readings)]
        return [after - before for before, after in pairwise(sums)]


def _widths(step: Step) -> set[int]:
    """Last dimensions of logits: the vocabulary and the tiles of TRL's fused head."""
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as TILE

    vocabulary = int(step.config["vocab_size"])
    return {vocabulary, TILE, vocabulary % TILE} - {0}
