"""The plan of a stage: memory, arithmetic, time and money before anything runs.

    e = estimate("ppo", config, hardware("h100"), {"lora_r": 16, "rows": 20_000})
    e.peak, e.fits, e.hours, e.money, e.ledger

Pure arithmetic: no torch, no transformers, about a millisecond.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeAlias

from ..runs.ledger import Ledger
from ..stages import STAGES, resolve
from .architecture import Architecture, architecture
from .generation import sampled
from .hardware import Hardware, hardware
from .phases import Phase
from .seconds import communication, product_dtype, seconds
from .setup import Setup, make_setup

MEMORY_BAND = 0.94, 1.06
"""The worst case of benchmarks/cost_accuracy.py against the simulated peak."""
TIME_BAND = {"gpu": (0.7, 1.3), "cpu": (0.7, 1.4)}
"""All published times of benchmarks/published.py but one lie within 30 %. On a calibrated CPU
most phases lie within 15 % (benchmarks/cost_accuracy.py, seconds); its own speed drifts more."""
SCORING = "old_logprobs", "reference", "value", "score"
UPDATE = "forward", "backward", "optimizer"
"""Phases of PPO's update."""
NOT_MODELLED_ON_A_GPU = (
    "fragmentation of the allocator and the CUDA context (about half a GB)",
    "scratch space of cuBLAS and attention kernels",
)
NOT_MODELLED = (
    "loading data, writing checkpoints, evaluation, start-up",
    "experts chosen unevenly (mixtures)",
    "dropout (GPT-2 and OPT come with it; PPO turns it off)",
)


Settings: TypeAlias = Mapping[str, object]
ConfigDict: TypeAlias = Mapping[str, object]
"""A transformers config as a dict."""


@dataclass(frozen=True, repr=False)
class Estimate:
    """What one stage will cost on one kind of hardware. Bytes are of one device; FLOPs, seconds and
    tokens of the whole run on all devices' data, seconds on the wall clock."""

    setup: Setup
    hardware: Hardware
    settings: Settings = field(default_factory=dict)
    config: ConfigDict = field(default_factory=dict)
    roles: Mapping[str, ConfigDict] = field(default_factory=dict)
    """Configs of the reward and the value model, where they are other ones."""

    @cached_property
    def phases(self) -> list[Phase]:
        """At the longest rows: they set the peak."""
        return phases_of(self.setup)

    @cached_property
    def average(self) -> list[Phase]:
        """At rows of average length: they set the time."""
        usual = self.phases if self.usual_setup == self.setup else phases_of(self.usual_setup)
        bucketed = {
            f.name: f for names, s in self.bucketed_setups for f in phases_of(s) if f.name in names
        }
        return [bucketed.get(f.name, f) for f in usual]

    @cached_property
    def usual_setup(self) -> Setup:
        """The same setup with rows as long as they are padded to on average."""
        s = self.setup
        if s.padded_prompt is None and s.padded_response is None:
            return s
        prompt = s.prompt if s.padded_prompt is None else round(s.padded_prompt)
        response = s.response if s.padded_response is None else round(s.padded_response)
        return replace(s, prompt=min(prompt, s.prompt), response=min(response, s.response))

    @cached_property
    def bucketed_setups(self) -> list[tuple[tuple[str, ...], Setup]]:
        """→ (phases, setup) of PPO's passes over length buckets, where those make rows shorter."""
        s = self.usual_setup
        setups: list[tuple[tuple[str, ...], Setup]] = []
        for names, padded in ((SCORING, s.padded_scoring), (UPDATE, s.padded_update)):
            if s.stage == "ppo" and padded is not None:
                response = max(1, round(sampled(s)))  # heads pass over real tokens only
                length = min(max(response, round(padded)), s.length)
                if (length, response) != (s.length, s.response):
                    shorter = replace(s, prompt=length - response, response=response)
                    setups.append((names, shorter))
        return setups

    # ------------------------------------------------------------------------------- how much work

    @property
    def steps(self) -> int | None:
        """Optimizer steps, or PPO iterations; None when the size of the data is not given."""
        s = self.setup
        if s.steps:
            return s.steps
        if s.rows is None:
            return None
        if STAGES[s.stage].groups:  # TRL leaves out what does not fill a generation
            whole = s.rows * s.samples_per_prompt // (s.rollout_batch * s.replicas)
            return max(1, math.ceil(whole * s.epochs * s.updates))
        rows = s.rows * s.epochs * (s.samples_per_prompt if s.stage == "ppo" else 1)
        return max(1, math.ceil(rows / (s.rollout_batch * s.replicas)))

    # ------------------------------------------------------------------------------------- memory

    @property
    def peak(self) -> float:
        """Bytes of the worst moment on one device."""
        return self.peak_phase.total

    @property
    def peak_phase(self) -> Phase:
        """The phase that sets the peak."""
        return max(self.phases, key=lambda f: f.total)

    memory_band = MEMORY_BAND

    @property
    def not_modelled(self) -> tuple[str, ...]:
        """What the figures leave out."""
        return (*(NOT_MODELLED_ON_A_GPU if self.hardware.kind == "gpu" else ()), *NOT_MODELLED)

    @property
    def fits(self) -> bool:
        """Whether the upper end of the band is within the device's memory."""
        return self.peak * self.memory_band[1] <= self.hardware.memory

    # ------------------------------------------------------------------------------ time and money

    @cached_property
    def seconds_of(self) -> dict[tuple[str, str], float]:
        """Seconds of one step by (phase, role)."""
        dtype = product_dtype(self.setup)
        out: dict[tuple[str, str], float] = {}
        for f in self.average:
            key = f.name, f.role
            busy = seconds(f.work, self.hardware, dtype) * f.times / self.setup.tensor_parallel
            out[key] = out.get(key, 0.0) + busy
        if exchange := self._exchange():  # what the backward pass does not hide
            back = next(k for k in out if k[0] == "backward")
            out[back] += max(0.0, exchange - out[back])
        return out

    def _exchange(self) -> float:
        """Seconds of communication of one step, before any of it is hidden."""
        s = self.setup
        total = sum(
            v for f in self.phases[-1:] for (_, c), v in f.bytes.items() if c == "gradients"
        ) * (s.replicas if s.sharding not in ("none", "ddp", "zero1") else 1)
        weights = s.model.parameters() * s.bytes_per_weight / s.tensor_parallel
        return communication(s, self.hardware, total, weights)

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds_of.values())

    @property
    def hours(self) -> float | None:
        """Wall-clock hours of the run; None when the size of the data is not given."""
        return None if self.steps is None else self.steps * self.step_seconds / 3600

    @property
    def gpu_hours(self) -> float | None:
        return None if self.hours is None else self.hours * self.setup.gpus

    @property
    def money(self) -> float | None:
        """USD; None where hours or the price are not known."""
        if self.gpu_hours is None or self.hardware.price is None:
            return None
        return self.gpu_hours * self.hardware.price

    @property
    def flops(self) -> float:
        """FLOPs of one step on one device's data."""
        return sum(f.work.flops * f.times for f in self.average)

    # -------------------------------------------------------------------------------- as a ledger

    @cached_property
    def ledger(self) -> Ledger:
        """Bytes at each phase's peak; FLOPs, seconds, tokens and money of the run (of one step
        where the number of steps is not known)."""
        ledger, s, n = Ledger(), self.setup, self.steps or 1
        time_band = TIME_BAND[self.hardware.kind]
        common = {"stage": s.stage, "source": "predicted"}

        def add(value: float, band: tuple[float, float] = (1.0, 1.0), **labels: str) -> None:
            band = value * band[0], value * band[1]
            ledger.add(value=value, low=band[0], high=band[1], **common, **labels)

        worst: dict[str, Phase] = {}
        for f in self.phases:
            if f.name not in worst or f.total > worst[f.name].total:
                worst[f.name] = f
        for f in worst.values():
            for (role, component), size in f.bytes.items():
                at = {"role": role, "phase": f.name, "component": component}
                add(size, MEMORY_BAND, quantity="bytes", **at)
        for f in self.average:
            for quantity, value in (("flops", f.work.flops), ("tokens", f.tokens)):
                if value:
                    value = value * f.times * n * s.replicas
                    add(value, role=f.role, phase=f.name, quantity=quantity)
        for (phase, role), value in self.seconds_of.items():
            if value:
                add(value * n, time_band, role=role, phase=phase, quantity="seconds")
        if self.money is not None:
            add(self.money, time_band, quantity="money")
        return ledger

    def __repr__(self) -> str:
        return (
            f"Estimate({self.setup.stage} on {self.hardware.name}: {self.peak / 2**30:.3g} GiB "
            f"in {self.peak_phase.name}, {self.flops / 1e12:.3g} TFLOP and "
            f"{self.step_seconds:.3g} s a step)"
        )

    # ------------------------------------------------------------------------------- other choices

    def changed(self, **settings: object) -> Estimate:
        """The same with other settings, or `stage`. Raises ValueError for what cannot be."""
        return estimate(
            str(settings.pop("stage", self.setup.stage)),
            self.config,
            self.hardware,
            {**self.settings, **settings},
            **{"reward": self.setup.reward, "value": self.setup.value, **self.roles},
        )


def phases_of(s: Setup) -> list[Phase]:
    """The phases of one optimizer step, or of one PPO iteration, in their order, by the function
    that the list of stages names."""
    of_stage: Callable[[Setup], list[Phase]] = resolve(STAGES[s.stage].estimate)
    return of_stage(s)


def estimate(
    stage: str,
    config: ConfigDict,
    hw: Hardware | str = "here",
    settings: Settings | None = None,
    **roles: Architecture | ConfigDict | None,
) -> Estimate:
    """Plan a stage for a model's config (a dict). Raises ValueError, one line, for what cannot be.

    `roles`: other architectures or configs, `reward=` and `value=`, where they differ (PPO).
    """
    hw = hardware(hw)
    models = {k: architecture(v) if isinstance(v, Mapping) else v for k, v in roles.items() if v}
    setup = make_setup(stage, architecture(config), hw, settings or {}, **models)
    configs = {k: v for k, v in roles.items() if isinstance(v, Mapping)}
    return Estimate(setup, hw, dict(settings or {}), config, configs)
