"""The plan of a stage: memory, arithmetic, time and money before anything runs.

    e = estimate("ppo", config, hardware("h100"), {"lora_r": 16, "rows": 20_000})
    e.peak, e.fits, e.hours, e.money, e.ledger

Pure arithmetic: no torch, no transformers, about a millisecond.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TypeAlias

from ..runs.ledger import Ledger
from ..stages import STAGES, read_table, resolve
from .architecture import Architecture, architecture
from .caveats import caveats
from .compiling import compile_seconds, decide
from .hardware import Hardware, hardware
from .parallel import all_reduce_seconds, in_parallel
from .phases import Phase
from .read_settings import make_setup
from .rollout_engine import engine_seconds
from .seconds import product_dtype, seconds, with_sent
from .serving import Serving, around, sampled, served, serving_seconds, static
from .setup import Setup

BANDS = read_table(__file__, "bands.yaml")
"""Factors to the least and the most that somebody else measures, and what is not modelled."""
SCORING = "old_logprobs", "reference", "value", "score"
UPDATE = "forward", "backward", "optimizer"
"""Phases of PPO's update."""
LOOSE = "activations", "kv_cache"
"""What is not known of a family of which only the matrices are."""
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
    """Configs of the reward, value and teacher model, where they are other ones."""

    @cached_property
    def phases(self) -> list[Phase]:
        """At the longest rows: they set the peak."""
        return phases_of(self.decided)

    @cached_property
    def average(self) -> list[Phase]:
        """At rows of average length: they set the time."""
        usual = self.phases if self.usual_setup == self.decided else phases_of(self.usual_setup)
        bucketed = {
            f.name: f for names, s in self.bucketed_setups for f in phases_of(s) if f.name in names
        }
        return [bucketed.get(f.name, f) for f in usual]

    @cached_property
    def usual_setup(self) -> Setup:
        """The same setup with rows as long as they are padded to on average."""
        s = self.decided
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

    @cached_property
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
        batch = s.rollout_batch * s.replicas
        if s.stage == "distill":  # TRL leaves out what does not fill a generation
            return max(1, math.ceil(s.epochs * (s.rows // batch)))
        if s.stage == "ppo":  # over the episodes of all epochs
            return max(1, math.ceil(s.rows * s.epochs * s.samples_per_prompt / batch))
        return max(1, math.ceil(s.epochs * math.ceil(s.rows / batch)))  # transformers' Trainer

    # ------------------------------------------------------------------------------------- memory

    @cached_property
    def peak(self) -> float:
        """Bytes of the worst moment on one device."""
        return self.peak_phase.total

    @cached_property
    def peak_phase(self) -> Phase:
        """The phase that sets the peak."""
        return max(self.phases, key=lambda f: f.total)

    @property
    def models(self) -> tuple[Architecture, ...]:
        """The architectures of all roles, each once."""
        s = self.setup
        every = s.model, s.reward, s.value, s.teacher, s.draft
        return tuple(dict.fromkeys(m for m in every if m is not None))

    @cached_property
    def memory_band(self) -> tuple[float, float]:
        """Factors to the least and the most that somebody else measures of this setup."""
        s, which = self.setup, self.hardware.kind
        if which == "gpu" and s.stage == "inference":
            which = "inference" if s.weights_format == "none" else "adapters"
        elif which == "gpu" and (s.gpus > 1 or s.lora_r and not s.gradient_checkpointing):
            which = "loose"
        elif which == "gpu":
            which = "adapters" if s.lora_r else "one device"
        return self._band(*BANDS["memory"][which])

    @property
    def needed(self) -> float:
        """Bytes that a device should have: the peak, and by how much the plan of PyTorch's own
        tensors may be off."""
        return self.peak * self._band(*BANDS["memory"]["cpu"])[1]

    def _band(self, low: float, high: float) -> tuple[float, float]:
        """This band of memory, or a wider one where a family is known by its matrices alone."""
        if not any(m.facts.rough for m in self.models):
            return low, high
        more = BANDS["rough_activations"]
        sizes = [(f.total, sum(f.bytes[x] for x in f.bytes if x[1] in LOOSE)) for f in self.phases]
        return (
            max(low * total - more * loose for total, loose in sizes) / self.peak,
            max(high * total + more * loose for total, loose in sizes) / self.peak,
        )

    @property
    def time_band(self) -> tuple[float, float]:
        """Factors to the least and the most of the seconds of steps."""
        s, kind = self.setup, self.hardware.kind
        trained = "one device" if s.gpus == 1 else "several devices"
        on_gpu = s.engine if s.stage == "inference" else trained
        low, high = BANDS["time"][on_gpu if kind == "gpu" else kind]
        if kind != "cpu" and self.compiles[0]:  # not measured there: it may save nothing
            high *= self.eager_seconds / self.step_seconds
        if any(m.facts.rough for m in self.models):
            less, more = BANDS["time"]["rough"]
            return low * less, high * more
        return low, high

    @property
    def hours_band(self) -> tuple[float, float]:
        """The same of a whole run and its money."""
        low, high = self.time_band
        return low, high * BANDS["around_steps"]

    @property
    def not_modelled(self) -> tuple[str, ...]:
        """What the figures leave out."""
        found = BANDS["not_modelled"]
        return (*(found["gpu"] if self.hardware.kind == "gpu" else ()), *found["all"])

    @property
    def caveats(self) -> list[str]:
        """What must be known before the figures are read (`caveats.py`)."""
        return caveats(self)

    @cached_property
    def main_memory(self) -> float:
        """Bytes of a machine's main memory that weights, states and activations take that were
        moved there from its devices. Python, data and a checkpoint as it is read come on top, and
        torch rounds pinned buffers up to powers of two (ATen/core/CachingHostAllocator.h)."""
        return max(f.host for f in self.phases) * self.setup.gpus / self.setup.nodes

    @property
    def fits(self) -> bool:
        """Whether what it needs is within the device's memory, and what is moved to main memory
        within that, where the hardware says how much there is."""
        there = self.hardware.main_memory
        return self.needed <= self.hardware.memory and self.main_memory <= (there or math.inf)

    # ------------------------------------------------------------------------------ time and money

    @cached_property
    def decided(self) -> Setup:
        """The setup, which knows whether layers are compiled."""
        return replace(self.setup, torch_compile=self.compiles[0])

    @cached_property
    def eager_seconds(self) -> float:
        """Of a step without `torch_compile`."""
        return self.changed(torch_compile=False).step_seconds

    @cached_property
    def compiles(self) -> tuple[bool, str]:
        """Whether layers are compiled (`torch_compile`), and where that is "auto" why."""
        return decide(self)

    @cached_property
    def seconds_of(self) -> dict[tuple[str, str], float]:
        """Seconds of one step by (phase, role)."""
        s, dtype = self.setup, product_dtype(self.setup)
        if s.engine == "vllm":
            return serving_seconds(self.usual_setup, self.hardware)
        out: dict[tuple[str, str], float] = {}
        for f in self.average:
            key = f.name, f.role
            busy = seconds(f.work, self.hardware, dtype) * f.times * f.devices / s.tensor_parallel
            if f.name == "rollout" and s.use_vllm:
                busy = engine_seconds(self.usual_setup, self.hardware) * f.times
            if f.devices > 1:
                size, often = f.sums
                sums = all_reduce_seconds(size, f.devices, s.nodes_per_copy, self.hardware)
                busy += sums * often * f.times
            room = self.hardware.memory - self.peak if f.sent.paged else 0.0
            spent = with_sent(s, self.hardware, f.sent, busy, f.times, room)
            out[key] = out.get(key, 0.0) + spent + around(self.usual_setup, self.hardware, f.name)
        return out

    @cached_property
    def step_seconds(self) -> float:
        # `sum` of floats is another on Python 3.12 in the last digit; `fsum` is exact on all.
        return math.fsum(self.seconds_of.values())

    @property
    def hours(self) -> float | None:
        """Wall-clock hours of the run; None when the size of the data is not given."""
        once = compile_seconds(self.setup, self.hardware) * self.compiles[0]
        return None if self.steps is None else (self.steps * self.step_seconds + once) / 3600

    @property
    def gpu_hours(self) -> float | None:
        devices = self.setup.gpus + self.setup.server_gpus
        return None if self.hours is None else self.hours * devices

    @property
    def money(self) -> float | None:
        """USD; None where hours or the price are not known."""
        if self.gpu_hours is None or self.hardware.price is None:
            return None
        return self.gpu_hours * self.hardware.price

    @property
    def flops(self) -> float:
        """FLOPs of one step on one device's data."""
        return math.fsum(f.work.flops * f.times * f.devices for f in self.average)

    @cached_property
    def serving(self) -> Serving:
        """Latency, throughput and price of inference at its load. Raises ValueError for a stage
        that is trained."""
        return self.serving_at(self.setup.batch, self.setup.requests_per_second)

    def serving_at(self, batch: int, rate: float | None = None) -> Serving:
        """The same with so many requests in flight (in one batch) on each copy of the model."""
        s = self.setup
        if s.stage != "inference":
            raise ValueError(f"{s.stage} serves nobody: plan inference")
        if s.engine == "vllm":
            return served(self.usual_setup, self.hardware, batch, rate)
        other = {"per_device_train_batch_size": batch, "concurrency": None}
        e = self if batch == s.batch else self.changed(**other)
        return static(e.setup, e.hardware, e.seconds_of, e.peak)

    # -------------------------------------------------------------------------------- as a ledger

    @cached_property
    def ledger(self) -> Ledger:
        """`untimed_ledger` with seconds and money. Raises ValueError where the device has no known
        link."""
        ledger, n, time_band = Ledger(self.untimed_ledger), self.steps or 1, self.time_band
        add = partial(self._add, ledger)
        for (phase, role), value in self.seconds_of.items():
            if value:
                add(value * n, time_band, role=role, phase=phase, quantity="seconds")
        if self.compiles[0] and (once := compile_seconds(self.setup, self.hardware)):
            add(once, time_band, phase="compile", quantity="seconds")
        if self.money is not None:
            add(self.money, self.hours_band, quantity="money")
        return ledger

    @cached_property
    def untimed_ledger(self) -> Ledger:
        """Bytes at each phase's peak; FLOPs, tokens, and bytes that one device sends, of the run
        (of one step where the number of steps is not known)."""
        ledger, s, n = Ledger(), self.setup, self.steps or 1
        add = partial(self._add, ledger)
        worst: dict[str, Phase] = {}
        for f in self.phases:
            if f.name not in worst or f.total > worst[f.name].total:
                worst[f.name] = f
        for f in worst.values():
            for (role, component), size in f.bytes.items():
                at = {"role": role, "phase": f.name, "component": component}
                add(size, self.memory_band, quantity="bytes", **at)
        for f in self.average:
            for quantity, value in (("flops", f.work.flops * f.devices), ("tokens", f.tokens)):
                if value:
                    value = value * f.times * n * s.replicas
                    add(value, role=f.role, phase=f.name, quantity=quantity)
            if sent := f.sent.bytes(s.replicas):
                add(sent * n, role=f.role, phase=f.name, quantity="sent")
        return ledger

    def _add(
        self, ledger: Ledger, value: float, band: tuple[float, float] = (1.0, 1.0), **labels: str
    ) -> None:
        ends = {"low": value * band[0], "high": value * band[1]}
        ledger.add(value=value, **ends, stage=self.setup.stage, source="predicted", **labels)

    def __repr__(self) -> str:
        return (
            f"Estimate({self.setup.stage} on {self.hardware.name}: {self.peak / 2**30:.3g} GiB "
            f"in {self.peak_phase.name}, {self.flops / 1e12:.3g} TFLOP and "
            f"{self.step_seconds:.3g} s a step)"
        )

    # ------------------------------------------------------------------------------- other choices

    def changed(self, **settings: object) -> Estimate:
        """The same with other settings, or `stage`. Raises ValueError for what cannot be."""
        s, stage = self.setup, str(settings.pop("stage", self.setup.stage))
        settings = {**self.settings, **settings}
        others = {name: getattr(s, name) for name in ("reward", "value", "teacher", "draft")}
        models = {role: model for role, model in others.items() if model}
        setup = _setup(stage, s.model, self.hardware, settings, models)
        return replace(self, setup=setup, settings=settings)


def phases_of(s: Setup) -> list[Phase]:
    """The phases of one optimizer step, or of one PPO iteration, in their order, by the function
    that the list of stages names."""
    of_stage: Callable[[Setup], list[Phase]] = resolve(STAGES[s.stage].estimate)
    if s.tensor_parallel == 1 or s.stage == "inference":  # which shares its layers out itself
        return of_stage(s)
    return in_parallel(s, of_stage)


def estimate(
    stage: str,
    config: ConfigDict,
    hw: Hardware | str = "here",
    settings: Settings | None = None,
    **roles: Architecture | ConfigDict | None,
) -> Estimate:
    """Plan a stage for a model's config (a dict). Raises ValueError, one line, for what cannot be.

    `roles`: other architectures or configs, `reward=`, `value=`, `teacher=`, `draft=`, where they
    differ.
    """
    hw = hardware(hw)
    models = {k: architecture(v) if isinstance(v, Mapping) else v for k, v in roles.items() if v}
    settings = dict(settings or {})
    configs = {k: v for k, v in roles.items() if isinstance(v, Mapping)}
    return Estimate(
        _setup(stage, architecture(config), hw, settings, models), hw, settings, config, configs
    )


def _setup(
    stage: str,
    model: Architecture,
    hw: Hardware,
    settings: Settings,
    roles: Mapping[str, Architecture],
) -> Setup:
    """As `make_setup`; where a rate is given, as many requests are in flight as it keeps there."""
    setup = make_setup(stage, model, hw, settings, **roles)
    if setup.requests_per_second is None:
        return setup
    load = served(setup, hw, setup.batch, setup.requests_per_second)
    return replace(setup, batch=math.ceil(load.in_flight / setup.replicas))
