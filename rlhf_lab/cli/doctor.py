"""`rlhf-lab doctor`: what this machine has, what is wrong, and what to do about it.

Each finding is measured or read here and now. "fix" means that some part of the lab cannot work.
"""

from __future__ import annotations

import importlib
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from ..cost.hardware import cores as available_cores
from ..display import format_bytes
from ..models.hub import hub_reachable
from ..models.load import BUNDLED, small_models_folder

if TYPE_CHECKING:
    from packaging.requirements import Requirement

GIB = 2**30
NEEDS = {"memory": 1.5 * GIB, "disk": 2 * GIB}
"""What the four stages on the bundled model take, with room to spare."""


@dataclass(frozen=True)
class Finding:
    """One thing checked: what was found, how bad it is (ok, note, fix), and the remedy."""

    what: str
    found: str
    state: str = "ok"
    remedy: str = ""


def examine() -> list[Finding]:
    """Check everything. Takes a few seconds, most of them to import torch."""
    checks = (_python, _packages, _widgets, _models, _cpu, _gpu, _memory, _disk, _hub)
    return [finding for check in checks for finding in check()]


def _python() -> Iterator[Finding]:
    found = f"{platform.python_version()} ({sys.prefix})"
    old = sys.version_info < (3, 10)
    yield Finding(
        "Python", found, "fix" if old else "ok", "use Python 3.10 or newer" if old else ""
    )


def _packages() -> Iterator[Finding]:
    """Every requirement of this package, against what is installed."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in metadata.requires("rlhf-lab") or []]
    except metadata.PackageNotFoundError:
        yield Finding("rlhf-lab", "not installed", "fix", "pip install -e . in the repository")
        return
    for need in wanted:
        if not need.marker or need.marker.evaluate({"extra": ""}):
            yield _package(need, "fix")
        elif need.marker.evaluate({"extra": "lab"}):
            yield _package(need, "note", " (only notebooks need it)")


def _package(need: Requirement, state: str, why: str = "") -> Finding:
    """Whether one requirement is met; `state` if it is not."""
    # Without the marker: pip would skip a requirement that is marked with one of our extras.
    bare = f"{need.name}{need.specifier}"
    try:
        version = metadata.version(need.name)
    except metadata.PackageNotFoundError:
        return Finding(need.name, "missing", state, f"pip install '{bare}'{why}")
    if need.specifier.contains(version, prereleases=True):
        return Finding(need.name, version)
    return Finding(
        need.name, f"{version}, needed {need.specifier}", state, f"pip install '{bare}'{why}"
    )


def _widgets() -> Iterator[Finding]:
    """Whether what a notebook shows can be loaded, beyond being installed."""
    for name in ("ipywidgets", "anywidget", "plotly"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            yield Finding(
                f"widgets: {name}",
                f"cannot be imported ({error})",
                "fix",
                f"pip install --force-reinstall {name}",
            )
        else:
            yield Finding(f"widgets: {name}", "can be imported")


def _models() -> Iterator[Finding]:
    for name in BUNDLED:
        folder = small_models_folder() / name
        stages = [p.name for p in sorted(folder.iterdir())] if folder.is_dir() else []
        yield Finding(
            f"bundled model {name}",
            ", ".join(stages) or "missing",
            "ok" if stages else "fix",
            "" if stages else "reinstall rlhf-lab",
        )


def _cpu() -> Iterator[Finding]:
    cores = available_cores()
    yield Finding(
        "CPU cores",
        str(cores),
        "ok" if cores > 1 else "note",
        "" if cores > 1 else "one core: expect twice the time",
    )
    try:
        import torch
    except ImportError:
        return  # reported among the packages
    yield Finding("CPU vectors", torch.backends.cpu.get_cpu_capability())
    threads = torch.get_num_threads()
    many = threads > cores
    remedy = f"more threads than cores: set OMP_NUM_THREADS={cores}" if many else ""
    yield Finding("torch threads", str(threads), "note" if many else "ok", remedy)
    ratio = _seconds("bfloat16") / _seconds("float32")
    slow = ratio > 1.2
    yield Finding(
        "bf16 on the CPU",
        f"a matrix product takes {ratio:.2g}× the time of fp32",
        "note" if slow else "ok",
        "leave bf16 off on this CPU (the lab does)" if slow else "",
    )


def _seconds(dtype: str, size: int = 256) -> float:
    """The fastest of a few products of square matrices on the CPU, in seconds."""
    import torch

    one = torch.ones(size, size, dtype=getattr(torch, dtype))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        one @ one
        times.append(time.perf_counter() - start)
    return min(times)


def _gpu() -> Iterator[Finding]:
    try:
        import torch
    except ImportError:
        return
    if not torch.cuda.is_available():
        yield Finding(
            "GPU",
            "none",
            "note",
            "the bundled models train on the CPU; 0.5B parameters "
            "and more want a GPU and a torch built for it",
        )
        return
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        native = about.major >= 8
        yield Finding(
            f"GPU {i}",
            f"{about.name}, {format_bytes(about.total_memory)}, compute capability "
            f"{about.major}.{about.minor}",
            "ok" if native else "note",
            "" if native else "no native bf16 below 8.0: use fp16 (torch only emulates it)",
        )


def _memory() -> Iterator[Finding]:
    free = available_memory()
    if free is None:
        yield Finding("memory", "unknown on this system")
        return
    low = free < NEEDS["memory"]
    yield Finding(
        "memory available",
        format_bytes(free),
        "note" if low else "ok",
        f"the four stages want {format_bytes(NEEDS['memory'])}: close something" if low else "",
    )


def available_memory() -> int | None:
    """Bytes that this process may still take: what is free, within the container's limit."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue  # no such cgroup, or "max": no limit
    return max(free, 0)


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(".").free
    low = free < NEEDS["disk"]
    remedy = "runs are small, models from the hub are not: make room" if low else ""
    yield Finding("disk free here", format_bytes(free), "note" if low else "ok", remedy)


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield Finding(
            "model hub",
            "not tried: HF_HUB_OFFLINE is set",
            "note",
            "unset it for models and data from the hub",
        )
    elif hub_reachable():
        yield Finding("model hub", "reachable")
    else:
        yield Finding(
            "model hub",
            "not reachable",
            "note",
            "bundled models and local folders "
            "work; download others elsewhere and give their folder",
        )
