"""Devices to plan for: the catalogue, a file of one's own, and this machine.

    hw = hardware("a100")                    # the catalogue; names and aliases in any case
    hw = hardware("h100", price=2.49)        # every figure can be yours
    hw = hardware("here")                    # as measured by `calibrate`, else a rough guess
    hw = hardware("mycard.json")             # a file of figures (`from_file`): also `--hardware`
    hw.matmul_rate("bf16"), hw.bandwidth     # FLOP/s, bytes/s

Prices are public on-demand list prices with their date; they move, and providers differ by a factor
of four.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..display import check_choice, counted, first_line, wrong_choice
from ..runs.json_files import lab_home, replace_file, unread
from ..stages import read_table
from .device import DTYPES as DTYPES
from .device import Hardware as Hardware
from .device import is_finite

GIB = 2**30
IN_A_BROWSER = sys.platform == "emscripten"
SLOW_16_BIT = 1 / 80
"""bf16 and fp16 against fp32 on a CPU without AMX (measured: 256³, AMD EPYC, torch 2.13)."""


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


UNITS = {
    "memory_gib": ("memory", GIB),
    "main_memory_gib": ("main_memory", GIB),
    "bandwidth_gb_s": ("bandwidth", 1e9),
    "link_gb_s": ("link", 1e9),
    "network_gb_s": ("network", 1e9),
    "host_gb_s": ("host", 1e9),
    "tflops": ("flops", 1e12),
}
"""Figures of `devices.json` and of a file of one's own → the figure of a Hardware, and the unit."""


def _in_units(entry: Mapping[str, object]) -> dict[str, Any]:
    """An entry of the catalogue or of a file, in bytes, bytes/s and FLOP/s. Raises ValueError."""
    targets = dict(UNITS.values())
    known = [*UNITS, *(f.name for f in fields(Hardware) if f.name not in targets)]
    found: dict[str, Any] = {}
    for name, value in entry.items():
        check_choice("figure", name, known)
        target, unit = UNITS.get(name, (name, 1))
        if isinstance(value, Mapping):
            found[target] = {k: x * unit if is_finite(x) else x for k, x in value.items()}
        elif name in UNITS and not is_finite(value):
            raise ValueError(f"{name} must be a number, not {value!r}")
        else:
            found[target] = value * unit if is_finite(value) else value
    return found


_ENTRIES: dict[str, dict[str, Any]] = read_table(__file__, "devices.json")


@cache
def _device(key: str, gb: int) -> Hardware:
    """A device of the catalogue. `gb`: of Apple's, which come with several sizes of memory; macOS
    gives a GPU two thirds of it, from 36 GB on three quarters (recommendedMaxWorkingSetSize, as
    llama.cpp logs it)."""
    entry = {name: value for name, value in _ENTRIES[key].items() if name != "aliases"}
    if "cores" in entry:
        memory = entry.pop("memory_gib") * GIB
        cpu = _cpu(memory, entry.pop("cores"), entry.pop("name"), entry.pop("source"))
        return replace(cpu, **entry)
    sizes = entry.pop("unified_gb", None)
    figures = {"kind": "gpu", **_in_units(entry)}
    if sizes:
        size = gb or sizes[0]
        figures["memory"] = size * GIB * (2 / 3 if size <= 32 else 3 / 4)
        figures["name"] += f", {size} GB"
        if not gb:
            others = ", ".join(map(str, sizes[1:]))
            figures["note"] = f"taken with {size} GB (also {others}: name it {key}-{sizes[-1]})"
    return Hardware(**{**figures, "memory": round(figures["memory"])})


def _squash(name: str) -> str:
    """ "NVIDIA A100-SXM4-80GB" → "a10080": what torch, clouds and people call a device."""
    bare = re.sub(r"[^a-z0-9]", "", re.sub(r"sxm\d?\b", "", name.lower()))
    makers = "nvidia|tesla|geforce|amd|instinct|apple|google|generation|server|workstation|edition"
    return re.sub(rf"{makers}|sxm\d?|hbm\de?|(?<=\d)gi?b", "", bare)


CATALOGUE: Mapping[str, Hardware] = {key: _device(key, 0) for key in _ENTRIES}
"""Devices by short name (`devices.json`). `memory_gib`: as torch reports it (drivers differ by
1 %). `link_gb_s`: half of the two-way figure printed. `network_gb_s`: one adapter per GPU of a DGX
(400 Gb/s, of an A100 200), or a cloud's 100 Gb/s among 8 GPUs. op_seconds: assumed; eager PyTorch
took 36 µs a kernel in gpt-fast's 25.5 tokens/s of a 7B model (A100)."""
_NAMES: dict[str, tuple[str, int]] = {
    _squash(f"{name}{gb or ''}"): (key, gb)
    for key, entry in _ENTRIES.items()
    for name in (key, *entry["aliases"])
    for gb in (0, *entry.get("unified_gb", ()))
}
"""Short name by squashed name or alias, and GB of memory where the name says them."""


def in_catalogue(name: str) -> str | None:
    """The catalogue's short name of a device, or None."""
    key, gb = _NAMES.get(_squash(name), (None, 0))
    return None if gb else key


def hardware(which: str | Path | Hardware = "here", /, **figures: object) -> Hardware:
    """A device of the catalogue, "here", one of your own, or a file of one (.json, .yaml; see
    `from_file`), with figures of yours in place of its.

    "here" is what `calibrate` saved; where it saved nothing, a guess from the number of cores.
    Raises ValueError, one line, for an unknown name.
    """
    if isinstance(which, Hardware):
        return which.with_(**figures)
    if not isinstance(which, (str, Path)):
        raise ValueError(f"hardware is a name or a Hardware, not {type(which).__name__}")
    if str(which).lower().endswith((".json", ".yaml", ".yml")):
        return from_file(Path(which)).with_(**figures)
    return _named(str(which)).with_(**figures)


def is_here(which: str | Path | Hardware) -> bool:
    """Whether a device is the machine that Python runs on."""
    return not IN_A_BROWSER and hardware(which).name == hardware("here").name


def _named(which: str) -> Hardware:
    """A device by name."""
    if which.strip().lower() == "here":
        if IN_A_BROWSER:
            raise ValueError("hardware 'here': a browser has no machine; name a device: 'h100'")
        return load_calibration() or _guess()
    if found := _NAMES.get(_squash(which)):
        return _device(*found)
    text = re.sub(r"^\s*(kaggle|colab)\s+", "", which.lower())
    count = re.fullmatch(
        r"\s*(\d+)(?:\s*[x×*]\s*|\s+)(.+)|(.+?)\s*[x×*:]\s*(\d+)\s*|(.*v\d[ep])-(\d+)\s*", text
    )
    one = count and in_catalogue(count[2] or count[3] or count[5])
    if count and one:
        raise ValueError(
            f"hardware {which!r} names one device: give hardware={one!r}, "
            f"gpus={int(count[1] or count[4] or count[6])}"
        )
    known = [*CATALOGUE, "here", "or a file of figures (.json, .yaml)"]
    raise wrong_choice("hardware", which, known)


def from_file(path: Path) -> Hardware:
    """A device of one's own, from a file of figures in the catalogue's units, such as
    {"like": "h100", "memory_gib": 93.1, "matmul_efficiency": 0.62}.

    `like`: a device by name whose figures hold where the file gives none. A whole device, as
    `rlhf-lab measure --json` prints it, is one too. Raises ValueError, one line.
    """
    from ..runs.yaml_files import read_names  # a web page has no YAML

    try:
        data = read_names(path)
    except ValueError as error:
        raise ValueError(f"hardware: {error}") from None
    try:
        if "flops" in data:
            return Hardware.from_dict(data)
        like = data.pop("like", None)
        figures = {"name": path.stem, **_in_units(data)}
        if like is not None:
            return _named(str(like)).with_(**figures)
        return Hardware.from_dict({"kind": "gpu", "source": f"your {path.name}", **figures})
    except (ValueError, RecursionError) as error:
        raise ValueError(f"hardware: {unread(path, error)}") from None


def nodes_for(gpus: int, hw: Hardware) -> int:
    """The fewest machines of equal size that hold so many devices."""
    pairs = [(n, gpus // n) for n in range(1, math.isqrt(gpus) + 1) if gpus % n == 0]
    return min(n for pair in pairs for n in pair if n * hw.devices_per_node >= gpus)


# ----------------------------------------------------------------------------------- this machine


def _guess() -> Hardware:
    name = f"this machine, {counted(cores(), 'core')} (a guess)"
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


def available_memory() -> int:
    """Bytes that this process may still take: what is free, within the container's limit."""
    import psutil

    free = int(psutil.virtual_memory().available)
    folder = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            room = int((folder / limit).read_text()) - int((folder / used).read_text())
        except (OSError, ValueError):
            continue  # no such cgroup, or "max": no limit
        free = min(free, room)
    return max(free, 0)


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
        what = f"{path} is damaged ({first_line(error)}): delete it and calibrate again"
        raise ValueError(what) from None


def save_calibration(hw: Hardware) -> Path:
    """Saves a machine for "here". A reader sees the old file or the new one, never half of one."""
    path = calibration_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(hw.to_dict(), indent=1, ensure_ascii=False))
    return path
