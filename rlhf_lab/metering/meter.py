"""The meter: seconds, FLOPs, tokens, peak memory and bytes sent, by phase and role of a live run.

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
role and component at each phase's peak, exactly (`MemoryTracker`). The two are kept apart because
rows add up, and a resident set holds the interpreter, libraries and the allocator's slack, which
belong to no role. On a GPU what the allocator had beyond the tensors is a row of its own,
`workspace`. Tensors too are tracked in few steps only: the first, and those whose shape is larger
than any that was tracked by more than `GROWTH`, as long as it slows the run by a small `share`.

**Bytes sent** are those of every collective that several processes call inside a phase
(`collectives.py`), times what a ring passes on of them. Alone, a process listens to nothing.
"""

from __future__ import annotations

import os
import resource
import sys
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..runs.ledger import Ledger
from .collectives import listen, ring_bytes, several, summed
from .flop_counter import PassCounter
from .memory_tracker import GPU_BLOCK, MemoryKey, PhaseKey, phase_peaks
from .model_memory import ModelMemory, Shards, call_shape

Parts: TypeAlias = dict[MemoryKey, int]
"""Bytes by (role, component)."""
State: TypeAlias = dict[str, Any]

GROWTH = 1.05
"""A shape is larger than another when a feature is larger by this factor."""
_TABLES = ("_timed", "_counted", "clock", "memory", "sent")
_SUMMED = ("flops", "tokens")


@lru_cache(maxsize=8)
def _open_proc(name: str, flags: int, pid: int) -> int:
    """A file of this process in /proc, kept open: it is read at every phase of a run."""
    return os.open(f"/proc/{pid}/{name}", flags)


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:  # 5 resets VmHWM, the peak of the resident set (man 5 proc)
        os.pwrite(_open_proc("clear_refs", os.O_WRONLY, os.getpid()), b"5", 0)
    except OSError:
        return  # not Linux, or not allowed: `peak_bytes` then reports the process' peak


def peak_bytes() -> int:
    """Peak memory in bytes since the last reset: CUDA allocator, else resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        status = os.pread(_open_proc("status", os.O_RDONLY, os.getpid()), 8192, 0)
        return int(status.split(b"VmHWM:", 1)[1].split(maxsplit=1)[0]) * 1024
    except (OSError, IndexError):
        pass  # no /proc here: fall through to getrusage
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Meter:
    """Adds up seconds, FLOPs and tokens, and keeps the highest memory, by (phase, role).

    `flops`, `memory`: whether FLOPs and tensors are counted at all. `share`: how much of the run
    so far may be lost to tracking tensors, beyond the first step of each kind.
    """

    def __init__(
        self, stage: str, *, flops: bool = True, memory: bool = True, share: float = 0.015
    ) -> None:
        self.stage, self.share = stage, share
        self.clock: dict[PhaseKey, float] = defaultdict(float)
        """seconds as they passed, of blocks that were counted too"""
        self._timed: dict[PhaseKey, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        self._counted: dict[PhaseKey, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        """seconds, tokens and number of blocks that were only timed, and of those counted"""
        self.tokens: dict[PhaseKey, int] = defaultdict(int)
        self.memory: dict[PhaseKey, int] = defaultdict(int)
        """peak of the CUDA allocator or of the resident set, in bytes"""
        self.sent: dict[PhaseKey, float] = defaultdict(float)
        """bytes that this process sends to the others"""
        self._stop_listening: Callable[[], None] | None = None
        self._passes = PassCounter(flops)
        self._tensors = ModelMemory(GPU_BLOCK if torch.cuda.is_available() else 1, memory)
        self._blocks: list[_Block] = []
        # (phase, role, whether gradients accumulate) → largest shape that was tracked
        self._tracked: dict[tuple[str, str, bool], tuple[int, ...]] = {}
        self._largest: dict[PhaseKey, tuple[int, ...]] = {}
        self._before: dict[PhaseKey, Parts] = {}  # peaks of a process before
        self._elapsed, self._lost = 0.0, 0.0  # seconds of outermost blocks; lost to tracking

    # ------------------------------------------------------------------------------ what is there

    def watch(self, role: str, model: nn.Module | None, optimizer: Optimizer | None = None) -> None:
        """Parameters, buffers, gradients and optimizer state of `model` are `role`'s from now on;
        so are the tensors made while it runs forward. Nothing is kept alive."""
        if model is not None:
            self._tensors.add(role, model, optimizer)

    def watch_shards(self, shards: Shards) -> None:
        """So are the tensors that this names by role and component. Not kept alive either."""
        self._tensors.shards = weakref.ref(shards)

    def hold(self, *tensors: object) -> None:
        """Tensors that live from phase to phase (a batch, a rollout): no role's own."""
        self._tensors.hold(tensors)

    # ------------------------------------------------------------------------------- what happens

    @property
    def seconds(self) -> dict[PhaseKey, float]:
        """Seconds by (phase, role), without what counting took where that is known."""
        out = {}
        for at, passed in self.clock.items():
            plain, tokens, blocks = self._timed[at]
            _, more_tokens, more_blocks = self._counted[at]
            sizes = (tokens, more_tokens) if tokens and more_tokens else (blocks, more_blocks)
            out[at] = plain * (1 + sizes[1] / sizes[0]) if blocks and more_blocks else passed
        return out

    @property
    def flops(self) -> dict[PhaseKey, int]:
        """Floating-point operations of matrix products."""
        return self._passes.flops

    @property
    def peak(self) -> int:
        """Highest memory of any phase so far, in bytes."""
        return max(self.memory.values(), default=0)

    def phase(
        self,
        phase: str,
        role: str = "",
        shape: Sequence[int] | None = None,
        tokens: int = 0,
        *,
        calls: nn.Module | None = None,
    ) -> AbstractContextManager[None]:
        """Measure a block; tokens that are known only later are added with `count`.

        `shape`: the features its FLOPs are linear in, such as (tokens b·s, pairs b·s², rows of
        logits); without it they are not counted. `calls`: a transformers model that the block
        calls many times (decoding), every call a pass of its own, its features read from its
        arguments. A block within a block is taken out of the outer one, memory excepted.
        """
        sizes = tuple(map(int, shape)) if shape is not None else None
        return _Block(self, (phase, role), sizes, int(tokens), calls)

    def count(self, phase: str, role: str, tokens: int) -> None:
        """Add tokens processed in a phase."""
        self.tokens[phase, role] += int(tokens)

    @contextmanager
    def compiling(self, on: bool = True) -> Iterator[None]:
        """While it lasts, and is on, what torch takes to compile is a phase of its own."""
        if not on:
            yield
            return
        from torch._dynamo.callback import callback_handler as handler

        blocks: list[AbstractContextManager[None]] = []

        def start(_: object) -> None:
            blocks.append(self.phase("compile"))
            blocks[-1].__enter__()

        def end(_: object) -> None:
            blocks.pop().__exit__(None, None, None)

        handler.register_start_callback(start)
        handler.register_end_callback(end)
        try:
            yield
        finally:
            handler.remove_start_callback(start)
            handler.remove_end_callback(end)

    def close(self) -> None:
        """End what is still open: after an interrupt, or when training is over."""
        while self._blocks:
            self._blocks[-1].__exit__(KeyboardInterrupt, None, None)
        if self._stop_listening is not None:
            self._stop_listening()
            self._stop_listening = None
        self._tensors.stop()
        self._tensors.measure_states()

    # ------------------------------------------------------------------------------- what came out

    def ledger(self) -> Ledger:
        """What was measured so far, as rows."""
        ledger, common = Ledger(), {"stage": self.stage, "source": "measured"}
        for quantity in ("seconds", "flops", "tokens", "sent"):
            table: Mapping[PhaseKey, float] = getattr(self, quantity)
            for (phase, role), value in table.items():
                if value:
                    ledger.add(phase=phase, role=role, quantity=quantity, value=value, **common)
        for phase, role, component, size in self._byte_rows():
            ledger.add(
                phase=phase, role=role, component=component, quantity="bytes", value=size, **common
            )
        return ledger

    def _byte_rows(self) -> Iterator[tuple[str, str, str, int]]:
        """(phase, role, component, bytes): of each phase its highest peak."""
        peaks = phase_peaks(self._peaks())
        for phase in dict.fromkeys((*(phase for phase, _ in self.memory), *peaks)):
            parts = peaks.get(phase, {})
            for (role, component), size in parts.items():
                yield phase, role, component, size
            if torch.cuda.is_available():
                allocated = max(
                    (b for (name, _), b in self.memory.items() if name == phase), default=0
                )
                if allocated > sum(parts.values()):
                    yield phase, "", "workspace", allocated - sum(parts.values())

    # ------------------------------------------------------------------------ from run to run

    def state_dict(self) -> State:
        """All that was measured so far, for a run that goes on in other processes, of whatever
        number: FLOPs and tokens of all processes, which call this together; else of this one."""
        tables = {name: deepcopy(dict(getattr(self, name))) for name in _TABLES}
        tables |= {name: summed(getattr(self, name)) for name in _SUMMED}
        sums = {"_elapsed": self._elapsed, "_lost": self._lost}
        return {**tables, "bytes": self._peaks(), **sums}

    def load_state_dict(self, state_dict: State) -> None:
        """Measure on from there; what this meter has measured itself is forgotten. Sums of all
        processes go on in the first."""
        others = _SUMMED if several() and dist.get_rank() else ()
        for name in (*_TABLES, *_SUMMED):
            table = getattr(self, name)
            table.clear()
            if name not in others:
                table.update(state_dict.get(name, {}))  # older runs have counted no bytes sent
        self._before = state_dict["bytes"]
        self._elapsed, self._lost = state_dict["_elapsed"], state_dict["_lost"]

    def _peaks(self) -> dict[PhaseKey, Parts]:
        """(phase, role) → bytes by (role, component) at its highest peak, in this process or one
        before."""
        here = self._tensors.peaks()
        return {
            at: max(here.get(at, {}), self._before.get(at, {}), key=lambda p: sum(p.values()))
            for at in (*self._before, *here)
        }

    # ---------------------------------------------------------------------------- for the blocks

    def _count_sent(self, name: str, size: int, processes: int) -> None:
        if self._blocks:
            self.sent[self._blocks[-1].at] += ring_bytes(name, size, processes)

    def _record_peak(self, phase: str, role: str) -> None:
        self.memory[phase, role] = max(self.memory[phase, role], peak_bytes())

    def _begin_memory(self, at: PhaseKey, shape: Sequence[int] | None) -> None:
        """Switch the tracking of tensors on or off before an outermost block."""
        phase, role = at
        memory = self._tensors
        wanted = bool(role) and memory.ready(phase) and self._is_untracked(at, shape)
        # A step is tracked as a whole: a graph that was not seen growing cannot be labelled.
        continues = phase in ("backward", "optimizer") and memory.ready(phase)
        if memory.on and not wanted and not continues:
            memory.stop()
        if wanted and phase != "backward":
            memory.start()

    def _is_untracked(self, at: PhaseKey, shape: Sequence[int] | None) -> bool:
        """Was nothing like this tracked yet, or only smaller ones?"""
        largest = self._tracked.get((*at, self._tensors.accumulating))
        if largest is None:
            return True
        grown = any(n > GROWTH * m for n, m in zip(shape or (), largest, strict=False))
        return grown and self._lost < self.share * self._elapsed

    def _plain_seconds(self, block: _Block, otherwise: float) -> float:
        """Seconds that a block takes when nothing is counted, where some were only timed."""
        passed, tokens, blocks = self._timed[block.at]
        if block.tokens and tokens:
            return passed * block.tokens / tokens
        return passed / blocks if blocks else otherwise

    def _end_memory(self, block: _Block, seconds: float, failed: bool) -> None:
        """After an outermost block."""
        self._elapsed += seconds
        if self._tensors.on and block.tracked is not None:
            self._lost += max(0.0, seconds - self._plain_seconds(block, seconds))
            key = (*block.at, block.accumulating)
            old, new = self._tracked.get(key, ()), block.shape or ()
            self._tracked[key] = _larger(old, new) if old and new else new or old
        if failed or block.at[0] not in ("forward", "backward"):
            self._tensors.stop()


@dataclass(eq=False)
class _Block:
    """One `with meter.phase(…)`."""

    meter: Meter
    at: PhaseKey
    shape: tuple[int, ...] | None
    tokens: int
    calls: nn.Module | None
    inner: float = 0.0
    """seconds of blocks within this one"""
    tracked: AbstractContextManager[None] | None = None
    """where tensors are tracked"""
    hooks: list[RemovableHandle] = field(default_factory=list)

    def __enter__(self) -> None:
        meter, outer = self.meter, self.meter._blocks
        if several() and meter._stop_listening is None:  # to collectives, until `close`
            meter._stop_listening = listen(meter._count_sent)
        if outer:
            meter._record_peak(*outer[-1].at)
        else:
            largest = meter._largest.get(self.at)
            meter._begin_memory(self.at, self.shape if self.calls is None else largest)
        _reset_peak()
        self.accumulating = meter._tensors.accumulating
        # The first run of what was compiled belongs to its phase, not to compiling.
        if meter._tensors.on and self.at[0] != "compile":
            self.tracked = meter._tensors.phase(*self.at)
            self.tracked.__enter__()
        if self.at[0] == "forward" and not outer:
            self.hooks = meter._tensors.follow(meter._passes.set_role)
        self.passes_before = meter._passes.counted
        self.start = _now()
        if self.calls is not None and meter._passes.enabled:
            self._hook_calls(self.calls, meter._passes)
        meter._passes.begin(self.at, self.shape if self.calls is None else None)
        meter._blocks.append(self)

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        meter, failed = self.meter, error is not None
        if self not in meter._blocks:
            return  # `close` ended it already
        for hook in self.hooks:
            hook.remove()
        meter._passes.end(failed)
        seconds = _now() - self.start
        meter._blocks.pop()
        own = seconds - self.inner
        meter.clock[self.at] += own
        meter.tokens[self.at] += self.tokens
        counted = self.tracked is not None or self.passes_before != meter._passes.counted
        sums = (meter._counted if counted else meter._timed)[self.at]
        for place, more in enumerate((own, self.tokens, 1)):
            sums[place] += more
        meter._record_peak(*self.at)
        if self.tracked is not None:
            self.tracked.__exit__(None, None, None)
        if meter._blocks:
            meter._blocks[-1].inner += seconds
            _reset_peak()
        else:
            meter._end_memory(self, seconds, failed)

    def _hook_calls(self, model: nn.Module, passes: PassCounter) -> None:
        """Every call of the model is a pass of its own; `shape` becomes the largest of them."""
        largest = self.meter._largest

        def before(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]) -> None:
            shape = call_shape(module, args, kwargs)
            self.shape = _larger(self.shape or shape, shape)
            passes.begin(self.at, shape)

        def after(module: nn.Module, args: object, output: object) -> None:
            passes.end(failed=output is None)
            shape = self.shape or ()
            largest[self.at] = _larger(largest.get(self.at, shape), shape)

        self.hooks = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, always_call=True),
        ]


def _larger(shape: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    """The larger of each feature."""
    return tuple(map(max, shape, other))


class NoMeter(Meter):
    """Measures nothing, with the meter's interface: what a run costs without one."""

    def __init__(self, stage: str = "sft", **_: object) -> None:
        super().__init__(stage, flops=False, memory=False)

    def watch(self, *_: object, **__: object) -> None: ...

    def hold(self, *_: object) -> None: ...

    def count(self, *_: object, **__: object) -> None: ...

    def phase(
        self, phase: str, role: str = "", *_: object, **__: object
    ) -> AbstractContextManager[None]:
        return nullcontext()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
