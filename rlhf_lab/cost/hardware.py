"""Devices to plan for: what they hold, how fast they are, what they cost, and who says so.

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
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..wording import did_you_mean

DTYPES = ("fp32", "tf32", "bf16", "fp16")
GIB = 2**30
SLOW_16_BIT = 1 / 80
"""bf16 and fp16 against fp32 on a CPU without AMX (measured: 256³, AMD EPYC, torch 2.13)."""
_POSITIVE = {
    "memory": "bytes",
    "bandwidth": "bytes/s",
    "link": "bytes/s",
    "network": "bytes/s",
    "operand_bandwidth": "bytes/s",
}
_OPTIONAL = ("link", "network", "operand_bandwidth")
_SPECIFIED = (
    *_POSITIVE,
    "flops",
    "matmul_efficiency",
    "bandwidth_efficiency",
    "op_seconds",
    "launch_seconds",
    "function_rate",
)


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

    def __post_init__(self):
        for name, text in (("name", self.name), ("source", self.source)):
            self._check(isinstance(text, str) and text.strip(), name, "some text")
        self._check(self.kind in ("gpu", "cpu"), "kind", "'gpu' or 'cpu'")
        for name, unit in _POSITIVE.items():
            value = getattr(self, name)
            fits = _positive(value) or value is None and name in _OPTIONAL
            self._check(fits, name, f"a positive number of {unit}")
        self._check_flops()
        whole = type(self.devices_per_node) is int and self.devices_per_node > 0
        self._check(whole, "devices_per_node", "a whole number ≥ 1")
        free = self.price is None or _number(self.price) and self.price >= 0
        self._check(free, "price", "USD per device-hour, 0 or more, or None")
        for name in ("matmul_efficiency", "bandwidth_efficiency"):
            share = getattr(self, name)
            self._check(_positive(share) and share <= 1, name, "a fraction above 0, at most 1")
        for name in ("op_seconds", "launch_seconds"):
            lasts = getattr(self, name)
            self._check(_number(lasts) and lasts >= 0, name, "seconds ≥ 0")
        self._check(_positive(self.function_rate), "function_rate", "a positive number a second")
        self._check(isinstance(self.measured, bool), "measured", "True or False")
        for name in ("price_date", "price_source"):
            text = getattr(self, name)
            self._check(text is None or isinstance(text, str), name, "some text or None")

    def _check_flops(self) -> None:
        fits = isinstance(self.flops, Mapping) and len(self.flops) > 0
        fits = fits and all(d in DTYPES and _positive(r) for d, r in self.flops.items())
        self._check(fits, "flops", f"FLOP/s by dtype ({', '.join(DTYPES)}), each positive")
        object.__setattr__(self, "flops", dict(self.flops))
        try:
            curve = tuple(sorted((d, f, r) for d, f, r in self.matmul_curve))
            fits = all(d in DTYPES and _positive(f) and _positive(r) for d, f, r in curve)
        except (TypeError, ValueError):
            fits = False
        self._check(fits, "matmul_curve", "(dtype, FLOPs, FLOP/s) triples, each positive")
        object.__setattr__(self, "matmul_curve", curve)

    def _check(self, fits: Any, name: str, wanted: str) -> None:
        if not fits:
            raise ValueError(
                f"hardware {self.name!r}: {name} must be {wanted}, not {getattr(self, name)!r}"
            )

    def with_(self, **figures: Any) -> Hardware:
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

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        made = {f.name: getattr(self, f.name) for f in fields(self)}
        return made | {
            "flops": dict(self.flops),
            "matmul_curve": list(map(list, self.matmul_curve)),
        }

    @classmethod
    def from_dict(cls, made: Mapping[str, Any]) -> Hardware:
        """What `to_dict` gave. Raises ValueError, one line, for anything else."""
        if not isinstance(made, Mapping):
            raise ValueError(f"hardware is saved as a JSON object, not a {type(made).__name__}")
        known = {f.name for f in fields(cls)}
        needed = {"name", "kind", "memory", "flops", "bandwidth", "source"}
        for what, names in (("lacks", needed - set(made)), ("has no", set(made) - known)):
            if names:
                raise ValueError(f"hardware {what} {', '.join(sorted(map(str, names)))}")
        return cls(**made)


def _number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _nearest(name: str, known: list[str]) -> str:
    return f"{did_you_mean(name, known)}choose from {', '.join(known)}"


# ------------------------------------------------------------------------------------ the catalogue


def _gpu(name: str, gib: float, tflops: tuple, gb_s: float, reach: tuple, **rest: Any) -> Hardware:
    """`gib` as torch reports it (drivers differ by 1 %); `tflops`: fp32, tf32, bf16, fp16, 0 where
    there is none; `reach`: of the peaks, by products and by streams."""
    flops = {d: t * 1e12 for d, t in zip(DTYPES, tflops) if t}
    return Hardware(
        name,
        "gpu",
        round(gib * GIB),
        flops,
        gb_s * 1e9,
        matmul_efficiency=reach[0],
        bandwidth_efficiency=reach[1],
        **rest,
    )


def _cpu(name: str, memory: float, cores: int, source: str, **rest: Any) -> Hardware:
    """85 GFLOP/s in fp32 and 10 GB/s a core, 40 GB/s at most: rates reached. Two cores of an AMD
    EPYC came to 125 to 170 GFLOP/s and 26 to 32 GB/s, and to the other figures as `calibrate` fits
    them; a core of yours may be half or twice that."""
    fp32 = 85e9 * cores
    flops = {"fp32": fp32, "bf16": fp32 * SLOW_16_BIT, "fp16": fp32 * SLOW_16_BIT}
    return Hardware(
        name,
        "cpu",
        memory,
        flops,
        min(10e9 * cores, 40e9),
        source,
        op_seconds=3.4e-5,
        launch_seconds=1.2e-5,
        function_rate=7e8 * cores,
        operand_bandwidth=3.2e9 * cores,
        **rest,
    )


def _price(usd: float, date: str, source: str) -> dict[str, Any]:
    return {"price": usd, "price_date": date, "price_source": source}


def _lambda(usd: float) -> dict[str, Any]:
    return _price(usd, "2026-09-20", "Lambda on-demand, largest node (lambda.ai/instances)")


_HF_JOBS = "Hugging Face Jobs (huggingface.co/docs/hub/jobs-pricing, undated copy)"
_SHEET = "NVIDIA data sheet, dense"
_GUESS = "; share of the peaks assumed"
_MAMF = "; products: github.com/stas00/ml-engineering (MAMF), streams assumed"
_DGX = {"devices_per_node": 8, "network": 50e9}  # one 400 Gb/s adapter per GPU
_DGX_A100 = {"devices_per_node": 8, "link": 300e9, "network": 25e9}  # one of 200 Gb/s
_PCIE4, _PCIE3, _CLOUD_NIC = 31.5e9, 15.75e9, 100e9 / 8 / 8  # 100 Gb/s among 8 GPUs

CATALOGUE: dict[str, Hardware] = {
    "laptop": _cpu("laptop CPU, 4 cores", 12 * GIB, 4, "assumed: 16 GB less the system's share"),
    "binder": _cpu(
        "Binder, 1 core",
        2 * GIB,
        1,
        "mybinder.org: 2 GB, 1 to 2 shared cores",
        **_price(0.0, "2026-11", "mybinder.org is free"),
    ),
    "t4": _gpu(
        "T4",
        14.74,
        (8.1, 0, 0, 65),
        320,
        (0.37, 0.85),
        devices_per_node=4,
        link=_PCIE3,
        network=_CLOUD_NIC,
        **_price(0.40, "2026", _HF_JOBS),
        source=f"{_SHEET}; products: 24 TFLOP/s at 70 W (NVIDIA forum, topic 264462)",
    ),
    "l4": _gpu(
        "L4",
        22.17,
        (30.3, 60, 121, 121),
        300,
        (0.5, 0.85),
        devices_per_node=8,
        link=_PCIE4,
        network=_CLOUD_NIC,
        source=_SHEET + _GUESS,
        **_price(0.80, "2026", _HF_JOBS),
    ),
    "a10g": _gpu(
        "A10G",
        22.19,
        (31.5, 35, 70, 70),
        600,
        (0.8, 0.85),
        devices_per_node=8,
        link=_PCIE4,
        network=_CLOUD_NIC,
        source=_SHEET + _GUESS,
        **_price(1.006, "2026-06", "AWS g5.xlarge, us-east-1, on-demand"),
    ),
    "v100": _gpu(
        "V100 SXM2 32GB",
        31.74,
        (15.7, 0, 0, 125),
        900,
        (0.75, 0.85),
        link=150e9,
        devices_per_node=8,
        network=_CLOUD_NIC,
        source=_SHEET + _GUESS,
        **_price(2.30, "2025", "Paperspace (SkyPilot catalogue v7, undated)"),
    ),
    "rtx4090": _gpu(
        "RTX 4090",
        23.65,
        (82.6, 82.6, 165.2, 165.2),
        1008,
        (0.9, 0.85),
        link=_PCIE4,
        devices_per_node=8,
        source=f"{_SHEET}, fp32 accumulation{_GUESS}",
        **_price(0.34, "2026-03", "RunPod community cloud (deploybase.ai)"),
    ),
    "a6000": _gpu(
        "RTX A6000",
        47.54,
        (38.7, 77.4, 154.8, 154.8),
        768,
        (0.75, 0.85),
        link=_PCIE4,
        devices_per_node=4,
        source=_SHEET + _GUESS,
        **_lambda(1.09),
    ),
    "a100-40": _gpu(
        "A100 SXM 40GB",
        39.39,
        (19.5, 156, 312, 312),
        1555,
        (0.87, 0.85),
        source=_SHEET + _MAMF,
        **_DGX_A100,
        **_lambda(1.99),
    ),
    "a100-80": _gpu(
        "A100 SXM 80GB",
        79.15,
        (19.5, 156, 312, 312),
        2039,
        (0.87, 0.85),
        source=_SHEET + _MAMF,
        **_DGX_A100,
        **_lambda(2.79),
    ),
    "h100": _gpu(
        "H100 SXM 80GB",
        79.1,
        (67, 494.5, 989, 989),
        3350,
        (0.8, 0.9),
        link=450e9,
        source=f"{_SHEET}; share of the peaks: 798 TFLOP/s (8192³) and 3.0 TB/s measured",
        **_DGX,
        **_lambda(3.99),
    ),
    "h200": _gpu(
        "H200 SXM 141GB",
        139.7,
        (67, 494.5, 989, 989),
        4800,
        (0.8, 0.9),
        link=450e9,
        source=f"{_SHEET}; share of the peaks: 788 TFLOP/s (8192³) and 4.3 TB/s measured",
        **_DGX,
        **_price(4.59, "2026-10-07", "RunPod pods (runpod.io/pricing)"),
    ),
    "b200": _gpu(
        "B200 SXM 180GB",
        178.35,
        (75, 1100, 2250, 2250),
        7700,
        (0.78, 0.9),
        link=900e9,
        source=_SHEET + _MAMF,
        **_DGX,
        **_lambda(6.69),
    ),
}
"""Devices by short name. Links: half of the two-way figure printed. op_seconds: assumed; eager
PyTorch took 36 µs a kernel in gpt-fast's 25.5 tokens/s of a 7B model (A100)."""

_ALIASES = {
    "a100": "a100-80",
    "h10080": "h100",
    "v10032": "v100",
    "4090": "rtx4090",
    "rtxa6000": "a6000",
    "h200141": "h200",
    "b200180": "b200",
    "b200192": "b200",
    "colab": "t4",
    "colabt4": "t4",
    "cpu": "laptop",
    "mybinder": "binder",
}


def _squash(name: str) -> str:
    """ "NVIDIA A100-SXM4-80GB" → "a10080": what torch, clouds and people call a device."""
    return re.sub(r"nvidia|tesla|geforce|sxm\d?|hbm\de?|gb|[^a-z0-9]", "", name.lower())


def in_catalogue(name: str) -> str | None:
    """The catalogue's short name of a device, or None."""
    squashed = _squash(name)
    return {_squash(key): key for key in CATALOGUE}.get(squashed) or _ALIASES.get(squashed)


def hardware(which: str | Hardware = "here", /, **figures: Any) -> Hardware:
    """A device of the catalogue, "here", or one of your own, with figures of yours in place of its.

    "here" is what `calibrate` saved; where it saved nothing, a guess from the number of cores.
    Raises ValueError, one line, for a name it does not know.
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
    several = count and in_catalogue(count[2] or count[3])
    if several:
        raise ValueError(
            f"hardware {which!r} names one device: say hardware={several!r}, "
            f"gpus={int(count[1] or count[4])}"
        )
    raise ValueError(f"hardware {which!r}: {_nearest(which.lower(), [*CATALOGUE, 'here'])}")


# ----------------------------------------------------------------------------------- this machine


def _guess() -> Hardware:
    count = cores()
    return _cpu(
        f"this machine, {count} core{'s' * (count > 1)} (a guess)",
        usable_memory(),
        count,
        "guessed from the number of cores: run calibrate() to measure",
    )


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_memory(root: str = "/") -> int:
    """Bytes of main memory: the machine's, or its container's limit where that is lower."""
    base = Path(root)
    limits = []
    for line in _lines(base / "proc/meminfo"):
        if line.startswith("MemTotal:"):
            limits.append(int(line.split()[1]) * 1024)
    if not limits:
        limits.append(_memory_elsewhere())
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


def _memory_elsewhere() -> int:
    """Where there is no /proc: macOS knows sysconf, Windows needs psutil."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        import psutil

        return psutil.virtual_memory().total


def calibration_file() -> Path:
    """`hardware.json` in $RLHF_LAB_HOME, else in ~/.cache/rlhf_lab."""
    home = os.environ.get("RLHF_LAB_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".cache/rlhf_lab") / "hardware.json"


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
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=".hardware-", suffix=".json")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as text:
            json.dump(hw.to_dict(), text, indent=1, ensure_ascii=False)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    return path
