"""A kind of device: what it holds, how fast it is, what it costs, and from which source.

`hardware()` in `hardware.py` gives one by name. Pure Python: imports no torch and no numpy. Peaks
are dense: data sheets often print twice as much, for 2:4 sparse weights.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import TypeGuard

from ..display import by_surface, check_choice
from ..stages import Setting

DTYPES = ("fp32", "tf32", "bf16", "fp16", "fp8")
_OPTIONAL = ("link", "network", "operand_bandwidth", "main_memory")
_POSITIVE = ("memory", "bandwidth", "host", *_OPTIONAL)
_ATTENTION = ("causal_attention", "masked_attention")
_EFFICIENCIES = ("matmul_efficiency", "bandwidth_efficiency", *_ATTENTION)
_DELAYS = ("op_seconds", "launch_seconds", "step_seconds", "request_seconds", "arrival_seconds")
_SPECIFIED = (*_POSITIVE, "flops", *_EFFICIENCIES, *_DELAYS, "function_rate")
KINDS = {
    "gpu": "",
    "cpu": "",
    "tpu": "on a TPU weights, states and arithmetic hold, activations and time are rough: not "
    "modelled is what XLA fuses, recomputes and pads; train() does not run there",
    "apple": "on Apple's GPU weights, states and arithmetic hold, time is rough: not modelled are "
    "Metal's kernels and what bitsandbytes lacks there; train() uses the CPU",
}
"""Kinds of device → what a plan for one leaves out, which is said before its figures."""


@dataclass(frozen=True)
class Hardware:
    """One kind of device. Bytes, bytes/s, FLOP/s, seconds, USD per device-hour; None is unknown.

    `memory`: what torch.cuda reports as total; `main_memory`: of a machine, for what is offloaded.
    `flops`: dense peak by dtype; absent where the device has none. `link`, `network`: bytes/s per
    device and direction, inside a node and between nodes; None where there is no other device.
    `host`: bytes/s to and from main memory, one way (PCIe 4.0 ×16: 25 GB/s of 31.5 are reached).
    `matmul_efficiency`, `bandwidth_efficiency`: what large products and streams reach of the peak;
    `causal_attention`, `masked_attention`: what fused attention in 16 bits reaches of it, forward
    and backward together, without and with a mask tensor (None: as large products, as without one).
    `op_seconds`: what an operation takes at least when a model's Python code calls it,
    `launch_seconds` in a backward pass or a plain loop.
    `step_seconds`, `request_seconds`, `arrival_seconds`: what a server that runs transformers adds
    to each step, to each request in it, and once to each that arrives (`lab.bench(…).around(plan)`
    measures them).
    `function_rate`: exponentials and their like per second. `operand_bandwidth`: bytes/s at which a
    CPU takes in a product's operands before it multiplies; None where it does so meanwhile.
    `matmul_curve`: measured (dtype, FLOPs of the product, FLOP/s before `matmul_efficiency`).
    `note`: what else a reader of its plans must know. `date`: when its source was read. `kind`: one
    of `KINDS`.
    """

    name: str
    kind: str
    memory: float
    flops: Mapping[str, float] = field(hash=False)
    bandwidth: float
    source: str
    link: float | None = None
    network: float | None = None
    host: float = 25e9
    main_memory: float | None = None
    devices_per_node: int = 1
    price: float | None = None
    price_date: str | None = None
    price_source: str | None = None
    matmul_efficiency: float = 1.0
    bandwidth_efficiency: float = 1.0
    causal_attention: float | None = None
    masked_attention: float | None = None
    op_seconds: float = 2e-5
    launch_seconds: float = 2e-5
    step_seconds: float = 0.0
    request_seconds: float = 0.0
    arrival_seconds: float = 0.0
    function_rate: float = 1e13
    operand_bandwidth: float | None = None
    measured: bool = False
    matmul_curve: tuple[tuple[str, float, float], ...] = ()
    note: str = ""
    date: str | None = None

    def __post_init__(self) -> None:
        for name, text in (("name", self.name), ("source", self.source)):
            self._check(isinstance(text, str) and text.strip(), name, "some text")
        self._check(isinstance(self.note, str), "note", "some text")
        self._check(self.kind in KINDS, "kind", f"one of {', '.join(KINDS)}")
        for name in _POSITIVE:
            value = getattr(self, name)
            valid = _positive(value) or value is None and name in _OPTIONAL
            unit = "bytes" if name.endswith("memory") else "bytes/s"
            self._check(valid, name, f"a positive number of {unit}")
        self._check_flops()
        whole = type(self.devices_per_node) is int and self.devices_per_node > 0
        self._check(whole, "devices_per_node", "a whole number ≥ 1")
        free = self.price is None or is_finite(self.price) and self.price >= 0
        self._check(free, "price", "USD per device-hour, 0 or more, or None")
        for name in _EFFICIENCIES:
            share = getattr(self, name)
            valid = _positive(share) and share <= 1 or share is None and name in _ATTENTION
            self._check(valid, name, "a fraction above 0, at most 1")
        for name in _DELAYS:
            value = getattr(self, name)
            self._check(is_finite(value) and value >= 0, name, "seconds ≥ 0")
        self._check(_positive(self.function_rate), "function_rate", "a positive number a second")
        self._check(isinstance(self.measured, bool), "measured", "True or False")
        for name in ("price_date", "price_source", "date"):
            text = getattr(self, name)
            self._check(text is None or isinstance(text, str), name, "some text or None")

    def _check_flops(self) -> None:
        valid = isinstance(self.flops, Mapping) and len(self.flops) > 0
        valid = valid and all(d in DTYPES and _positive(r) for d, r in self.flops.items())
        self._check(valid, "flops", f"FLOP/s by dtype ({', '.join(DTYPES)}), each positive")
        object.__setattr__(self, "flops", dict(self.flops))
        try:
            curve = tuple(sorted((d, f, r) for d, f, r in self.matmul_curve))
            valid = all(d in DTYPES and _positive(f) and _positive(r) for d, f, r in curve)
        except (TypeError, ValueError):
            valid = False
        self._check(valid, "matmul_curve", "(dtype, FLOPs, FLOP/s) triples, each positive")
        object.__setattr__(self, "matmul_curve", curve)

    def _check(self, valid: object, name: str, wanted: str) -> None:
        if not valid:
            raise ValueError(
                f"hardware {self.name!r}: {name} must be {wanted}, not {getattr(self, name)!r}"
            )

    def with_(self, **figures: Setting) -> Hardware:
        """The same device with figures of yours; `flops={"bf16": …}` changes that dtype only."""
        if not figures:
            return self
        known = [f.name for f in fields(self)]
        for name in figures:
            check_choice("figure", name, known)
        flops = figures.get("flops")
        if isinstance(flops, Mapping):
            # A rate of yours replaces the measured one at every size.
            curve = tuple(row for row in self.matmul_curve if row[0] not in flops)
            figures = {"matmul_curve": curve, **figures, "flops": {**self.flops, **flops}}
        if "price" in figures:
            figures = {"price_date": None, "price_source": "given by you", **figures}
        yours = [name for name in figures if name in _SPECIFIED]
        if yours and "source" not in figures:
            figures["source"] = f"{self.source}; {', '.join(yours)} given by you"
        return replace(self, **figures)

    def matmul_rate(self, dtype: str, flops: float | None = None) -> float:
        """FLOP/s that a product of so many FLOPs (default: a large one) reaches.

        Measured devices interpolate between measured sizes, both axes logarithmic, and keep the
        first and last rate outside them; the rest is peak · matmul_efficiency.
        """
        check_choice("dtype", dtype, self.flops)
        rows = [(f, r) for d, f, r in self.matmul_curve if d == dtype]
        if flops is None or not rows:
            return self.flops[dtype] * self.matmul_efficiency
        if not _positive(flops):
            raise ValueError(f"flops must be a positive number of FLOPs, not {flops!r}")
        after = bisect.bisect_left(rows, (flops, 0.0))
        (f0, r0), (f1, r1) = rows[max(after - 1, 0)], rows[min(after, len(rows) - 1)]
        share = math.log(flops / f0) / math.log(f1 / f0) if f1 > f0 else 0.0
        rate = math.exp((1 - share) * math.log(r0) + share * math.log(r1))
        return rate * self.matmul_efficiency

    def rates(self, dtype: str) -> tuple[float, float, float, float]:
        """FLOP/s of large products, of causal and of masked attention, and the FLOPs from which on
        a product is large (0: at any size).

        FLOPs of attention are counted for all pairs of tokens. With a mask tensor all are computed;
        without one a causal kernel leaves out half (Dao, 2307.08691, section 3.1), so that it may
        seem to exceed the peak.
        """
        if dtype not in self._rates:
            full = max((f for d, f, _ in self.matmul_curve if d == dtype), default=0.0)
            large = causal = masked = self.matmul_rate(dtype, full or None)
            if self.causal_attention and dtype in ("bf16", "fp16"):  # measured in 16 bits
                causal = 2 * self.causal_attention * self.flops[dtype]
                share = self.masked_attention or self.causal_attention
                masked = share * self.flops[dtype]
            self._rates[dtype] = large, causal, masked, full
        return self._rates[dtype]

    @cached_property
    def _rates(self) -> dict[str, tuple[float, float, float, float]]:
        return {}

    def speed_of(self, name: str) -> float:
        """Bytes/s of `link` or `network`. Raises ValueError where it is not known."""
        speed: float | None = getattr(self, name)
        if not speed:
            where = "in one node" if name == "link" else "in several nodes"
            line = (
                f"{self.name} has no known {name} between devices {where}: give {name}= in "
                f"bytes/s, or {name}_gb_s in a file of figures"
            )
            if self.kind == "cpu":  # of several processes each counts as a machine
                how = f"lab.calibrate({name}=1e9)", f"rlhf-lab measure --set {name}=1e9"
                line = f"{self.name}: say how many bytes/s go from process to process, for example "
                line += by_surface(*how)
            raise ValueError(line)
        return speed

    @property
    def caveat(self) -> str:
        """What a plan for this device leaves out; "" where that is nothing."""
        return "; ".join(text for text in (self.note, KINDS[self.kind]) if text)

    def to_dict(self) -> dict[str, object]:
        """Plain types, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, figures: object) -> Hardware:
        """What `to_dict` gave. Raises ValueError, one line, for anything else."""
        if not isinstance(figures, Mapping):
            raise ValueError(f"hardware is saved as a JSON object, not {type(figures).__name__}")
        known = {f.name for f in fields(cls)}
        needed = {"name", "kind", "memory", "flops", "bandwidth", "source"}
        for what, names in (("lacks", needed - set(figures)), ("has no", set(figures) - known)):
            if names:
                raise ValueError(f"hardware {what} {', '.join(sorted(map(str, names)))}")
        return cls(**figures)


def is_finite(value: object) -> TypeGuard[float]:
    """Whether it is a finite number; True and False are none."""
    try:
        return type(value) is not bool and isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False


def _positive(value: object) -> TypeGuard[float]:
    return is_finite(value) and value > 0
