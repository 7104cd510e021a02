"""The step of an x-ray on real tensors of random numbers, on this machine's CPU: how far is it off?

Under the same account, under torch's profiler, or by the clock (how far are a plan's seconds?).
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from itertools import pairwise

from profiled import allocated_peak
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from rlhf_lab.cost.setup import Setup
from rlhf_lab.metering.callback import MeterCallback
from rlhf_lab.metering.meter import Meter, NoMeter
from rlhf_lab.ppo.compiled import compile_layers
from rlhf_lab.ppo.logprobs import AnyModel
from rlhf_lab.runs.ledger import Ledger
from rlhf_lab.simulate.account import StepAccount
from rlhf_lab.simulate.models import Config, Step, by_role, models_of
from rlhf_lab.simulate.shortcuts import head_labelled, left_alone
from rlhf_lab.simulate.step import StepBegins, logit_widths
from rlhf_lab.simulate.trainers import PhaseMeter, step_trainer
from rlhf_lab.simulate.xray import XRay, labelled

TIMED = 8
"""Steps that the clock looks at, after one that it does not."""


def real_step(setup: Setup, config: Config, by: str) -> XRay:
    """One step of a stage, as `simulate_step` takes it, `by` "account", "profiler" or "clock"."""
    gc.collect()  # trainers hold themselves in circles: what an earlier one held goes now
    with left_alone(), tempfile.TemporaryDirectory() as folder:
        how = {"account": _account, "profiler": _profile, "clock": _clock}[by]
        return how(Step(setup, config), folder)


def _models(step: Step) -> dict[str, AnyModel]:
    """The models of a step, their layers compiled where the setup says so."""
    models = models_of(step)
    if step.setup.torch_compile:
        compile_layers(*by_role(models).values())
    return models


def _account(step: Step, folder: str) -> XRay:
    """Two steps under an account; the x-ray is of the second."""
    models, account = _models(step), StepAccount(1, logit_widths(step))
    ppo = step.setup.stage == "ppo"
    with head_labelled(account), account:
        with labelled(account, by_role(models), phases=not ppo):
            meter = PhaseMeter(account) if ppo else None
            step_trainer(step, models, folder, 2, [StepBegins(account)], meter).train()
    return XRay.of(account, step.setup.stage, "cpu", source="measured")


def _profile(step: Step, folder: str) -> XRay:
    """Two steps under torch's profiler: the CPU allocator's own peak, no more."""
    models = _models(step)
    held = {id(t): t for m in models.values() for t in (*m.parameters(), *m.buffers())}
    base = sum(t.untyped_storage().nbytes() for t in held.values())
    trainer = step_trainer(step, models, folder, 2, [], NoMeter())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train()
    return XRay(step.setup.stage, Ledger(), base + allocated_peak(profiler), device="cpu")


def _clock(step: Step, folder: str) -> XRay:
    """Steps timed phase by phase and nothing else: medians of the phases."""
    stage, models = step.setup.stage, _models(step)
    meter = Meter(stage, flops=False, memory=False)
    clock = _StepSeconds(meter)
    callbacks = [clock] if stage == "ppo" else [MeterCallback(meter), clock]
    step_trainer(step, models, folder, 1 + TIMED, callbacks, meter).train()
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
