"""The meter: seconds, FLOPs, tokens and peak memory of each phase and role of a live run.

    meter = Meter("ppo")
    meter.watch("policy", policy, optimizer)
    with meter.phase("forward", "policy", shape=(tokens, pairs, logits)):
        ...
    meter.ledger()

**Seconds** are those of blocks that were only timed. A block in which something was counted takes
longer than it would; it is given the average of the others of its kind (per token, where blocks
have tokens), and its own time only where there is no other. `clock` has the times as they were.

**FLOPs** are counted by a dispatch mode, which slows a pass down, so a pass is counted only while
its shape is not in the span of those that were; the rest is computed, exactly (`LinearFlops`).

**Memory** has two faces. `peak_bytes`, hence `Meter.peak`, is what the machine had to give: the
CUDA allocator's peak on a GPU; on a CPU the process' resident set, whose high-water mark Linux
lets a process reset, so that every phase has its own. The ledger's rows are what tensors took, by
role and component at each phase's peak: an exact `Account`. The two are kept apart because rows
add up, and a resident set holds the interpreter, libraries and the allocator's slack, which belong
to no role. On a GPU what the allocator had beyond the tensors is a row of its own, `workspace`.
The account too is switched on for few steps: the first, and those whose shape is larger than any
that was accounted by more than `GROWTH`, as long as it slows the run by a small `share` only.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ..runs.ledger import Ledger
from .account import GPU_BLOCK
from .flop_counter import PassCounter
from .memory_tracker import TensorWatch, call_shape

At = tuple[str, str]
"""(phase, role)"""

GROWTH = 1.05
"""A shape is larger than another when a feature is larger by this factor."""


@lru_cache(maxsize=8)
def _proc(name: str, flags: int, pid: int) -> int:
    """A file of this process in /proc, kept open: it is asked at every phase of a run."""
    return os.open(f"/proc/{pid}/{name}", flags)


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:  # 5 resets VmHWM, the peak of the resident set (man 5 proc)
        os.pwrite(_proc("clear_refs", os.O_WRONLY, os.getpid()), b"5", 0)
    except OSError:
        return  # not Linux, or not allowed: `peak_bytes` then reports the process' peak


def peak_bytes() -> int:
    """Peak memory in bytes since the last reset: CUDA allocator, else resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        status = os.pread(_proc("status", os.O_RDONLY, os.getpid()), 8192, 0)
        return int(status.split(b"VmHWM:", 1)[1].split(maxsplit=1)[0]) * 1024
    except (OSError, IndexError):
        pass  # no /proc here: fall through to getrusage
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Meter:
    """Adds up seconds, FLOPs and tokens, and keeps the highest memory, by (phase, role).

    `flops`, `memory`: whether FLOPs and tensors are counted at all. `share`: how much of the run
    so far may be lost to steps with the account on, beyond the first of each kind.
    """

    def __init__(
        self, stage: str, *, flops: bool = True, memory: bool = True, share: float = 0.015
    ) -> None:
        self.stage, self.share = stage, share
        self.clock: dict[At, float] = defaultdict(float)
        """seconds as they passed, of blocks that were counted too"""
        self._timed: dict[At, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        self._counted: dict[At, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        """seconds, tokens and number of blocks that were only timed, and of those counted"""
        self.tokens: dict[At, int] = defaultdict(int)
        self.memory: dict[At, int] = defaultdict(int)
        """peak of the CUDA allocator or of the resident set, in bytes"""
        self._passes = PassCounter() if flops else None
        self._tensors = TensorWatch(GPU_BLOCK if torch.cuda.is_available() else 1, memory)
        self._blocks: list[_Block] = []
        self._accounted: dict[tuple, tuple[int, ...]] = {}  # → largest shape that was accounted
        self._largest: dict[At, tuple[int, ...]] = {}
        self._before: dict[At, dict[tuple[str, str], int]] = {}  # peaks of a process before
        self._elapsed, self._lost = 0.0, 0.0  # seconds of outermost blocks; to the account

    # ------------------------------------------------------------------------------ what is there

    def watch(self, role: str, model: nn.Module | None, optimizer: Any = None) -> None:
        """Parameters, buffers, gradients and optimizer state of `model` are `role`'s from now on;
        so are the tensors made while it runs forward. Nothing is kept alive."""
        if model is not None:
            self._tensors.add(role, model, optimizer)

    def hold(self, *tensors: Any) -> None:
        """Tensors that live from phase to phase (a batch, a rollout): no role's own."""
        self._tensors.hold(tensors)

    # ------------------------------------------------------------------------------- what happens

    @property
    def seconds(self) -> dict[At, float]:
        """Seconds by (phase, role), without what counting took where that is known."""
        out = {}
        for at, passed in self.clock.items():
            plain, tokens, blocks = self._timed[at]
            _, more_tokens, more_blocks = self._counted[at]
            known = (tokens, more_tokens) if tokens and more_tokens else (blocks, more_blocks)
            out[at] = plain * (1 + known[1] / known[0]) if blocks and more_blocks else passed
        return out

    @property
    def flops(self) -> dict[At, int]:
        """Floating-point operations of matrix products."""
        return self._passes.flops if self._passes is not None else {}

    @property
    def peak(self) -> int:
        """Highest memory of any phase so far, in bytes."""
        return max(self.memory.values(), default=0)

    def add(self, phase: str, role: str, seconds: float, tokens: int = 0) -> None:
        """Count a segment that was timed elsewhere."""
        self.clock[phase, role] += seconds
        self._keep(self._timed, (phase, role), seconds, tokens)
        self.tokens[phase, role] += int(tokens)
        self._note_peak(phase, role)

    def phase(
        self,
        phase: str,
        role: str = "",
        shape: Sequence[int] | None = None,
        tokens: int = 0,
        *,
        calls: nn.Module | None = None,
    ):
        """Measure a block; tokens that are known only later are added with `count`.

        `shape`: the features its FLOPs are linear in, such as (tokens b·s, pairs b·s², rows of
        logits); without it they are not counted. `calls`: a transformers model that the block
        calls many times (decoding), every call a pass of its own, its features read from its
        arguments. A block within a block is taken out of the outer one, memory excepted.
        """
        return _Block(self, (phase, role), shape, int(tokens), calls)

    def count(self, phase: str, role: str, tokens: int) -> None:
        """Add tokens processed in a phase."""
        self.tokens[phase, role] += int(tokens)

    def close(self) -> None:
        """End what is still open: after an interrupt, or when training is over."""
        while self._blocks:
            self._blocks[-1].__exit__(KeyboardInterrupt, None, None)
        self._tensors.stop()
        self._tensors.measure_states()

    # ------------------------------------------------------------------------------- what came out

    def ledger(self) -> Ledger:
        """What was measured so far, as rows."""
        ledger = Ledger()
        tables = ("seconds", self.seconds), ("flops", self.flops), ("tokens", self.tokens)
        for quantity, table in tables:
            for (phase, role), value in table.items():
                if value:
                    ledger.add(
                        stage=self.stage,
                        role=role,
                        phase=phase,
                        quantity=quantity,
                        value=value,
                        source="measured",
                    )
        for phase, role, component, value in self._byte_rows():
            ledger.add(
                stage=self.stage,
                role=role,
                phase=phase,
                component=component,
                quantity="bytes",
                value=value,
                source="measured",
            )
        return ledger

    def _byte_rows(self) -> Iterator[tuple[str, str, str, int]]:
        """(phase, role, component, bytes): of each phase its highest peak."""
        peaks = self._peaks()
        for phase in dict.fromkeys(phase for phase, _ in (*self.memory, *peaks)):
            parts = max(
                (p for (name, _), p in peaks.items() if name == phase),
                key=lambda p: sum(p.values()),
                default={},
            )
            for (role, component), size in parts.items():
                yield phase, role, component, size
            if torch.cuda.is_available():
                allocated = max(
                    (b for (name, _), b in self.memory.items() if name == phase), default=0
                )
                if allocated > sum(parts.values()):
                    yield phase, "", "workspace", allocated - sum(parts.values())

    # ------------------------------------------------------------------------ from run to run

    def state_dict(self) -> dict[str, Any]:
        """All that was measured so far, for a run that goes on in another process."""
        tables = {
            name: {at: list(v) for at, v in getattr(self, name).items()}
            for name in ("_timed", "_counted")
        }
        return {
            **tables,
            "clock": dict(self.clock),
            "tokens": dict(self.tokens),
            "memory": dict(self.memory),
            "flops": dict(self.flops),
            "bytes": self._peaks(),
            "_elapsed": self._elapsed,
            "_lost": self._lost,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Measure on from there; what this meter has measured itself is forgotten."""
        for name in ("_timed", "_counted", "clock", "tokens", "memory"):
            table = getattr(self, name)
            table.clear()
            table.update(state[name])
        if self._passes is not None:
            self._passes.flops.clear()
            self._passes.flops.update(state["flops"])
        self._before = state["bytes"]
        self._elapsed, self._lost = state["_elapsed"], state["_lost"]

    def _peaks(self) -> dict[At, dict[tuple[str, str], int]]:
        """(phase, role) → bytes by (role, component) at its highest peak, in this process or one
        before."""
        here = self._tensors.peaks()
        return {
            at: max(here.get(at, {}), self._before.get(at, {}), key=lambda p: sum(p.values()))
            for at in (*self._before, *here)
        }

    # ---------------------------------------------------------------------------- for the blocks

    @property
    def _countings(self) -> int:
        """How many passes were counted so far."""
        return self._passes.counted if self._passes is not None else 0

    def _keep(self, table: dict[At, list[float]], at: At, seconds: float, tokens: int) -> None:
        for place, value in enumerate((seconds, tokens, 1)):
            table[at][place] += value

    def _turn(self, role: str) -> None:
        """What runs now is this role's."""
        if self._passes is not None:
            self._passes.role = role

    def _note_peak(self, phase: str, role: str) -> None:
        self.memory[phase, role] = max(self.memory[phase, role], peak_bytes())

    def _begin_memory(self, at: At, shape: Sequence[int] | None) -> None:
        """Switch the account of tensors on or off before an outermost block."""
        phase, role = at
        watch = self._tensors
        wanted = bool(role) and watch.ready(phase) and self._is_news(at, shape)
        # A step is accounted as a whole: a graph that was not seen growing cannot be owned.
        if (
            watch.on
            and not wanted
            and (phase not in ("backward", "optimizer") or not watch.ready(phase))
        ):
            watch.stop()
        if wanted and phase != "backward":
            watch.start()

    def _is_news(self, at: At, shape: Sequence[int] | None) -> bool:
        """Was nothing like this accounted yet, or only smaller ones?"""
        seen = self._accounted.get((*at, self._tensors.accumulating))
        if seen is None:
            return True
        grown = any(n > GROWTH * m for n, m in zip(shape or (), seen, strict=False))
        return grown and self._lost <= self.share * self._elapsed

    def _usual(self, block: _Block, otherwise: float) -> float:
        """Seconds that a block takes when nothing is counted, where some were only timed."""
        passed, tokens, blocks = self._timed[block.at]
        if block.tokens and tokens:
            return passed * block.tokens / tokens
        return passed / blocks if blocks else otherwise

    def _end_memory(self, block: _Block, seconds: float, failed: bool) -> None:
        """After an outermost block."""
        self._elapsed += seconds
        if self._tensors.on and block.account is not None:
            self._lost += max(0.0, seconds - self._usual(block, seconds))
            key = (*block.at, block.accumulating)
            old, new = self._accounted.get(key, ()), block.shape or ()
            self._accounted[key] = tuple(map(max, old, new)) if old and new else tuple(new or old)
        if failed or block.at[0] not in ("forward", "backward"):
            self._tensors.stop()


class _Block:
    """One `with meter.phase(…)`."""

    def __init__(self, meter: Meter, at: At, shape, tokens: int, calls: nn.Module | None):
        self.meter, self.at, self.tokens, self.calls = meter, at, tokens, calls
        self.shape = tuple(int(n) for n in shape) if shape is not None else None
        self.inner = 0.0  # seconds of blocks within this one
        self.account = None  # the account's block, where it is on
        self.hooks: list[Any] = []

    def __enter__(self) -> None:
        meter, outer = self.meter, self.meter._blocks
        if outer:
            meter._note_peak(*outer[-1].at)
        else:
            largest = meter._largest.get(self.at)
            meter._begin_memory(self.at, self.shape if self.calls is None else largest)
        _reset_peak()
        self.accumulating = meter._tensors.accumulating
        if meter._tensors.on:
            self.account = meter._tensors.phase(*self.at)
            self.account.__enter__()
        if self.at[0] == "forward" and not outer:
            self.hooks = meter._tensors.follow(meter._turn)
        self.counting = meter._countings
        self.start = _now()
        if meter._passes is not None:
            if self.calls is not None:
                self._hook_calls()
            meter._passes.begin(self.at, self.shape if self.calls is None else None)
        meter._blocks.append(self)

    def __exit__(self, kind, *_) -> None:
        meter, failed = self.meter, kind is not None
        if self not in meter._blocks:
            return  # `close` ended it already
        for hook in self.hooks:
            hook.remove()
        if meter._passes is not None:
            meter._passes.end(failed)
        seconds = _now() - self.start
        meter._blocks.pop()
        own = seconds - self.inner
        meter.clock[self.at] += own
        meter.tokens[self.at] += self.tokens
        counted = self.account is not None or self.counting != meter._countings
        meter._keep(meter._counted if counted else meter._timed, self.at, own, self.tokens)
        meter._note_peak(*self.at)
        if self.account is not None:
            self.account.__exit__(None, None, None)
        if meter._blocks:
            meter._blocks[-1].inner += seconds
            _reset_peak()
        else:
            meter._end_memory(self, seconds, failed)

    def _hook_calls(self) -> None:
        """Every call of the model is a pass of its own; `shape` becomes the largest of them."""
        passes, largest = self.meter._passes, self.meter._largest

        def before(module, args, kwargs):
            shape = call_shape(module, args, kwargs)
            self.shape = tuple(map(max, self.shape or shape, shape))
            passes.begin(self.at, shape)

        def after(module, args, output):
            passes.end(failed=output is None)
            largest[self.at] = tuple(map(max, largest.get(self.at, self.shape), self.shape))

        self.hooks = [
            self.calls.register_forward_pre_hook(before, with_kwargs=True),
            self.calls.register_forward_hook(after, always_call=True),
        ]


class NoMeter(Meter):
    """Measures nothing, with the meter's interface: what a run costs without one."""

    def __init__(self, stage: str = "sft", **_: Any):
        super().__init__(stage, flops=False, memory=False)

    def watch(self, role: str, model: nn.Module, optimizer: Any = None) -> None: ...

    def hold(self, *tensors: Any) -> None: ...

    def add(self, phase: str, role: str, seconds: float, tokens: int = 0) -> None: ...

    def count(self, phase: str, role: str, tokens: int) -> None: ...

    def phase(self, phase: str, role: str = "", shape=None, tokens: int = 0, *, calls=None):
        return nullcontext()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
