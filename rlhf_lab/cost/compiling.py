"""What `torch_compile` costs and saves: a decoder layer compiled once, shared by all of one shape,
and the work on logits beside the head's product (`ppo/compiled.py`).

Of the passes that compiled code makes, matrix products and attention stay what they were. The rest
is fused: it is read and written fewer times, and fewer operations are called. Decoding is not
compiled. On other devices than a CPU nothing of it is modelled: no measurement stands behind it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .hardware import Hardware
from .phases import Phase
from .setup import Setup
from .work import Work

if TYPE_CHECKING:
    from .estimate import Estimate

PASSES = frozenset("old_logprobs reference teacher value score forward backward".split())
"""Phases whose passes are compiled."""
KEPT = 0.6
"""Of the time of all else than products (streams, exponentials, calls, launches) what compiled
passes still take, on a CPU with AVX-512: between .76, where PPO's update of tiny on one thread of a
busy machine took 1/1.10 of its CPU time, and .45, an iteration of 1.65 s instead of 2.12 on two
quiet cores (benchmarks/ppo_vs_trl.py --only speed measures it)."""
SECONDS = {"start": 8.0, "trained": 13.0, "scored": 5.0, "logits": 6.0}
"""CPU seconds, once, where inductor's cache is empty: to load inductor; of a layer that is trained,
and of one that scores, for each shape; of the work on logits, for each direction. All of tiny's PPO
took 37 (15 of Python, 23 of g++), and in the next process, from the cache, 6."""
MARGIN = 2.0
"""How many times what compiling takes it must save before "auto" does it."""


def work_of(phase: Phase, on: bool) -> Work:
    """The work of a phase, compiled or not, on a CPU."""
    work = phase.work
    if not on or phase.name not in PASSES:
        return work
    kept = (KEPT * x for x in (work.moved, work.transcendentals, work.called, work.launched))
    return Work(work.products, *kept)


def compile_seconds(s: Setup, hw: Hardware) -> float:
    """Seconds that compiling takes in a run whose cache is empty; 0 where that is not modelled."""
    if hw.kind != "cpu":
        return 0.0
    if s.stage != "ppo":
        scored = s.stage in ("dpo", "kto", "rloo", "grpo", "distill")
        return SECONDS["start"] + SECONDS["trained"] + scored * SECONDS["scored"]
    reward = s.reward or s.model
    trained = {s.model} if s.layout == "shared" else {s.model, s.value or reward}
    layers = len(trained) * SECONDS["trained"] + len({*trained, reward}) * SECONDS["scored"]
    return SECONDS["start"] + layers + 2 * SECONDS["logits"]


def decide(e: Estimate) -> tuple[bool, str]:
    """Whether the layers of a plan are compiled, and a line that says why where it is "auto"."""
    s, hw, off = e.setup, e.hardware, "torch_compile=auto is off"
    if s.torch_compile != "auto":
        return bool(s.torch_compile), ""
    if hw.kind != "cpu":
        return False, f"{off}: what it saves is not modelled on a {hw.kind}; True compiles"
    if e.steps is None:
        return False, f"{off}: the plan does not know how long the run is; True compiles"
    with_, without = (e.changed(torch_compile=on).step_seconds for on in (True, False))
    saved, cost = e.steps * (without - with_), compile_seconds(s, hw)
    figures = f"predicted to save {saved:.0f} s of the run for {cost:.0f} s of compiling"
    if saved > MARGIN * cost:
        return True, f"torch_compile=auto is on: {figures}"
    return False, f"{off}: {figures}, and it is to save {MARGIN:g} times that"


def caveat(e: Estimate) -> list[str]:
    """What must be known before figures of a plan with `torch_compile` are read."""
    on, why = e.compiles
    line = "memory is planned as without torch_compile, which holds fewer activations"
    if (kind := e.hardware.kind) != "cpu":
        line = f"not modelled: torch_compile on a {kind}, which would change memory and time"
    return list(filter(None, (why, line * on)))
