"""The meter: seconds, tokens and peak memory of each phase and role of a live run.

On a GPU memory is the CUDA allocator's peak. On a CPU it is the process' resident set, whose
high-water mark Linux lets a process reset, so that every phase has its own; where it cannot be
reset, the resident set at the end of the phase stands in (a lower bound).
"""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..ledger import Ledger

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        _CLEAR.write_text("5")  # 5 resets VmHWM, the peak of the resident set (man 5 proc)
    except OSError:
        return  # not Linux, or not allowed: `peak_bytes` then reports the process' peak


def peak_bytes() -> int:
    """Peak memory in bytes since the last reset: CUDA allocator, else resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # no /proc here: fall through to getrusage
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Meter:
    """Adds up seconds and tokens, and keeps the highest memory, by (phase, role)."""

    def __init__(self, stage: str):
        self.stage = stage
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.tokens: dict[tuple[str, str], int] = defaultdict(int)
        self.memory: dict[tuple[str, str], int] = defaultdict(int)

    @property
    def peak(self) -> int:
        """Highest memory of any phase so far, in bytes."""
        return max(self.memory.values(), default=0)

    def add(self, phase: str, role: str, seconds: float, tokens: int = 0) -> None:
        """Count a stretch that was timed elsewhere."""
        self.seconds[phase, role] += seconds
        self.tokens[phase, role] += int(tokens)
        self.memory[phase, role] = max(self.memory[phase, role], peak_bytes())

    @contextmanager
    def phase(self, phase: str, role: str = "") -> Iterator[None]:
        """Time a block; tokens are added with `count` when they are known."""
        _reset_peak()
        start = _now()
        try:
            yield
        finally:
            self.add(phase, role, _now() - start)

    def count(self, phase: str, role: str, tokens: int) -> None:
        """Add tokens processed in a phase."""
        self.tokens[phase, role] += int(tokens)

    def ledger(self) -> Ledger:
        """What was measured so far, as rows."""
        ledger = Ledger()
        for quantity, table in (
            ("seconds", self.seconds),
            ("tokens", self.tokens),
            ("bytes", self.memory),
        ):
            for (phase, role), value in table.items():
                if value:
                    ledger.add(
                        stage=self.stage, role=role, phase=phase, component="",
                        quantity=quantity, value=float(value), source="measured",
                    )  # fmt: skip
        return ledger


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
