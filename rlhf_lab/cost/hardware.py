"""Devices to plan for: what they hold, how fast they are, what they cost, and from which source.

    hw = hardware("a100")                    # the catalogue; names and aliases in any case
    hw = hardware("h100", price=2.49)        # every figure can be yours
    hw = hardware("here")                    # as measured by `calibrate`, else a rough guess
    hw.matmul_rate("bf16"), hw.bandwidth     # FLOP/s, bytes/s

Pure Python: imports no torch and no numpy. Peaks are dense: data sheets often print twice as much,
for 2:4 sparse weights. Prices are public on-demand list prices with their date; they move, and
providers differ by a factor of four.
"""

from __future__ import annotations

import bisect
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TypeGuard

from ..display import did_you_mean
from ..runs.json_files import lab_home, replace_file
from ..stages import Setting

_DEVICES = Path(__file__).parent / "devices.json"
DTYPES = ("fp32", "tf32", "bf16", "fp16")
GIB = 2**30
SLOW_16_BIT = 1 / 80
"""bf16 and fp16 against fp32 on a CPU without AMX (measured: 256³, AMD EPYC, torch 2.13)."""
_OPTIONAL = ("link", "network", "operand_bandwidth")
_POSITIVE = ("memory", "bandwidth", *_OPTIONAL)
_EFFICIENCIES = ("matmul_efficiency", "bandwidth_efficiency")
_DELAYS = ("op_seconds", "launch_seconds")
_SPECIFIED = (*_POSITIVE, "flops", *_EFFICIENCIES, *_DELAYS, "function_rate")


@dataclass(frozen=True)
class Hardware:
    """One kind of device. Bytes, bytes/s, FLOP/s, seconds, USD per device-hour; None is unknown.

    `memory`: what torch.cuda reports as total. `flops`: dense peak by dtype; absent where the
    device has none. `link`, `network`: bytes/s per device and direction, inside a node and between
    nodes; None where there is no other device. `matmul_efficiency`, `bandwidth_efficiency`: what
    large products and streams reach of the peak. `op_seconds`: what an operation takes at least
    when a model's Python code calls it, `launch_seconds` in a backward pass or a plain loop.
    `function_rate`: exponentials and their like per second. `operand_bandwidth`: bytes/s at which
    a CPU takes in a product's operands before it multiplies; None where it does so meanwhile.
    `matmul_curve`: measured (dtype, FLOPs of the product, FLOP/s).
    """

    name: str
    kind: str
    memory: float
    flops: Mapping[str, float] = field(hash=False)
    bandwidth: float
    source: str
    link: float | None = None
    network: float | None = None
    devices_per_node: int = 1
    price: float | None = None
    price_date: str | None = None
    price_source: str | None = None
    matmul_efficiency: float = 1.0
    bandwidth_efficiency: float = 1.0
    op_seconds: float = 2e-5
    launch_seconds: float = 2e-5
    function_rate: float = 1e13
    operand_bandwidth: float | None = None
    measured: bool = False
    matmul_curve: tuple[tuple[str, float, float], ...] = ()

    def __post_init__(self) -> None:
        for name, text in (("name", self.name), ("source", self.source)):
            self._check(isinstance(text, str) and text.strip(), name, "some text")
        self._check(self.kind in ("gpu", "cpu"), "kind", "'gpu' or 'cpu'")
        for name in _POSITIVE:
            value = getattr(self, name)
            valid = _positive(value) or value is None and name in _OPTIONAL
            unit = "bytes" if name == "memory" else "bytes/s"
            self._check(valid, name, f"a positive number of {unit}")
        self._check_flops()
        whole = type(self.devices_per_node) is int and self.devices_per_node > 0
        self._check(whole, "devices_per_node", "a whole number ≥ 1")
        free = self.price is None or _number(self.price) and self.price >= 0
        self._check(free, "price", "USD per device-hour, 0 or more, or None")
        for name in _EFFICIENCIES:
            share = getattr(self, name)
            self._check(_positive(share) and share <= 1, name, "a fraction above 0, at most 1")
        for name in _DELAYS:
            value = getattr(self, name)
            self._check(_number(value) and value >= 0, name, "seconds ≥ 0")
        self._check(_positive(self.function_rate), "function_rate", "a positive number a second")
        self._check(isinstance(self.measured, bool), "measured", "True or False")
        for name in ("price_date", "price_source"):
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
            if name not in known:
                raise ValueError(f"hardware has no figure {name!r}: {_nearest(name, known)}")
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
        if dtype not in self.flops:
            raise ValueError(f"{self.name} has no {dtype!r}: choose from {', '.join(self.flops)}")
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

    def to_dict(self) -> dict[str, object]:
        """Plain types, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, figures: object) -> Hardware:
        """What `to_dict` gave. Raises ValueError, one line, for anything else."""
        if not isinstance(figures, Mapping):
            raise ValueError(f"hardware is saved as a JSON object, not a {type(figures).__name__}")
        known = {f.name for f in fields(cls)}
        needed = {"name", "kind", "memory", "flops", "bandwidth", "source"}
        for what, names in (("lacks", needed - set(figures)), ("has no", set(figures) - known)):
            if names:
                raise ValueError(f"hardware {what} {', '.join(sorted(map(str, names)))}")
        return cls(**figures)


def _number(value: object) -> TypeGuard[float]:
    try:
        return type(value) is not bool and isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False


def _positive(value: object) -> TypeGuard[float]:
    return _number(value) and value > 0


def _nearest(name: str, known: list[str]) -> str:
    return f"{did_you_mean(name, known)}choose from {', '.join(known)}"


# ------------------------------------------------------------------------------------ the catalogue


def _cpu(memory: float, cores: int, name: str, source: str) -> Hardware:
    """85 GFLOP/s in fp32 and 10 GB/s a core, 40 GB/s at most: rates reached. Two cores of an AMD
    EPYC came to 125 to 170 GFLOP/s and 26 to 32 GB/s, and to the other figures as `calibrate` fits
    them; a core of yours may be half or twice that."""
    fp32 = 85e9 * cores
    return Hardware(
        name,
        "cpu",
        memory,
        {"fp32": fp32, "bf16": fp32 * SLOW_16_BIT, "fp16": fp32 * SLOW_16_BIT},
        min(10e9 * cores, 40e9),
        source,
        op_seconds=3.4e-5,
        launch_seconds=1.2e-5,
        function_rate=7e8 * cores,
        operand_bandwidth=3.2e9 * cores,
    )


def _catalogue() -> tuple[dict[str, Hardware], dict[str, str]]:
    """→ (devices by short name, short name by squashed name or alias)."""
    devices: dict[str, Hardware] = {}
    names: dict[str, str] = {}
    for key, entry in json.loads(_DEVICES.read_text(encoding="utf-8")).items():
        names |= {_squash(name): key for name in (key, *entry.pop("aliases"))}
        memory = entry.pop("memory_gib") * GIB
        if "cores" in entry:
            cpu = _cpu(memory, entry.pop("cores"), entry.pop("name"), entry.pop("source"))
            devices[key] = replace(cpu, **entry)
        else:
            flops = {dtype: rate * 1e12 for dtype, rate in entry.pop("tflops").items()}
            for rate in ("bandwidth", "link", "network"):
                if f"{rate}_gb_s" in entry:
                    entry[rate] = entry.pop(f"{rate}_gb_s") * 1e9
            devices[key] = Hardware(kind="gpu", memory=round(memory), flops=flops, **entry)
    return devices, names


def _squash(name: str) -> str:
    """ "NVIDIA A100-SXM4-80GB" → "a10080": what torch, clouds and people call a device."""
    return re.sub(r"nvidia|tesla|geforce|sxm\d?|hbm\de?|gb|[^a-z0-9]", "", name.lower())


CATALOGUE, _NAMES = _catalogue()
"""Devices by short name (`devices.json`). `memory_gib`: as torch reports it (drivers differ by
1 %). `link_gb_s`: half of the two-way figure printed. `network_gb_s`: one adapter per GPU of a DGX
(400 Gb/s, of an A100 200), or a cloud's 100 Gb/s among 8 GPUs. op_seconds: assumed; eager PyTorch
took 36 µs a kernel in gpt-fast's 25.5 tokens/s of a 7B model (A100)."""


def in_catalogue(name: str) -> str | None:
    """The catalogue's short name of a device, or None."""
    return _NAMES.get(_squash(name))


def hardware(which: str | Hardware = "here", /, **figures: object) -> Hardware:
    """A device of the catalogue, "here", or one of your own, with figures of yours in place of its.

    "here" is what `calibrate` saved; where it saved nothing, a guess from the number of cores.
    Raises ValueError, one line, for an unknown name.
    """
    if isinstance(which, Hardware):
        return which.with_(**figures)
    if not isinstance(which, str):
        raise ValueError(f"hardware is a name or a Hardware, not a {type(which).__name__}")
    if which.strip().lower() == "here":
        return (load_calibration() or _guess()).with_(**figures)
    key = in_catalogue(which)
    if key:
        return CATALOGUE[key].with_(**figures)
    count = re.fullmatch(
        r"\s*(\d+)(?:\s*[x×*]\s*|\s+)(.+)|(.+?)\s*[x×*:]\s*(\d+)\s*", which.lower()
    )
    device = count and in_catalogue(count[2] or count[3])
    if count and device:
        raise ValueError(
            f"hardware {which!r} names one device: give hardware={device!r}, "
            f"gpus={int(count[1] or count[4])}"
        )
    raise ValueError(f"hardware {which!r}: {_nearest(which.lower(), [*CATALOGUE, 'here'])}")


# ----------------------------------------------------------------------------------- this machine


def _guess() -> Hardware:
    name = f"this machine, {cores()} core{'s' * (cores() > 1)} (a guess)"
    source = "guessed from the number of cores: run calibrate() to measure"
    return _cpu(usable_memory(), cores(), name, source)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_memory(root: str = "/") -> int:
    """Bytes of main memory: the machine's, or its container's limit where that is lower."""
    import psutil

    base, limits = Path(root), [int(psutil.virtual_memory().total)]
    # A cgroup's limit is that of any of its ancestors too: v2, then v1.
    for line in ["0::/", "1:memory:/", *_lines(base / "proc/self/cgroup")]:
        _, controllers, own = (line + "::").split(":", 2)
        v1 = "memory" in controllers.split(",")
        if not controllers or v1:
            top = base / "sys/fs/cgroup" / ("memory" if v1 else "")
            here = top / own.strip("/:")
            for folder in (here, *here.parents):
                if folder.is_relative_to(top):
                    text = _lines(folder / ("memory.limit_in_bytes" if v1 else "memory.max"))
                    limits += [int(t) for t in text[:1] if t.isdigit() and int(t) > 0]
    return min(limits)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, ValueError):
        return []


def calibration_file() -> Path:
    """`hardware.json` in $RLHF_LAB_HOME, else in ~/.cache/rlhf_lab."""
    return lab_home() / "hardware.json"


def load_calibration() -> Hardware | None:
    """What `save_calibration` saved, or None. Raises ValueError, one line, for a damaged file."""
    path = calibration_file()
    try:
        return Hardware.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        what = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{path} is damaged ({what}): delete it and calibrate again") from None


def save_calibration(hw: Hardware) -> Path:
    """Saves a machine for "here". A reader sees the old file or the new one, never half of one."""
    path = calibration_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(hw.to_dict(), indent=1, ensure_ascii=False))
    return path
