"""What `torch_compile` costs and saves: a decoder layer compiled once, shared by all of one shape,
and the work on logits beside the head's product (`ppo/compiled.py`).

What compiled passes keep and move is written on the tape (`Tape.compiled`), by AOTAutograd's rule
(torch/_functorch/partitioners.py): what a product reads is written down, and saved where a product
of the backward pass reads it; so are products' results and sums of rows. All else is fused, and
computed again from those. Decoding is not compiled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .hardware import Hardware
from .setup import Setup

if TYPE_CHECKING:
    from .estimate import Estimate

SECONDS = {"start": 8.0, "trained": 13.0, "scored": 5.0, "logits": 6.0}
"""CPU seconds, once, where inductor's cache is empty: to load inductor; of a layer that is trained,
and of one that scores, for each shape; of the work on logits, for each direction. All of tiny's PPO
took 37 (15 of Python, 23 of g++), and in the next process, from the cache, 6."""
WHERE = {"gpu": "a gpu", "tpu": "a tpu", "apple": "Apple's GPU"}
MARGIN = 2.0
"""How many times what compiling takes it must save before "auto" does it."""


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
    if s.torch_compile and (never := _never(e)):
        return False, f"without torch_compile: {never}"
    if s.torch_compile != "auto":
        return bool(s.torch_compile), ""
    if hw.kind != "cpu":
        where = WHERE[hw.kind]
        return False, f"{off}: how long compiling takes on {where} is not known; True compiles"
    if e.steps is None:
        return False, f"{off}: the plan does not know how long the run is; True compiles"
    saved = e.steps * (e.eager_seconds - e.changed(torch_compile=True).step_seconds)
    cost = compile_seconds(s, hw)
    figures = f"predicted to save {saved:.0f} s of the run for {cost:.0f} s of compiling"
    if saved > MARGIN * cost:
        return True, f"torch_compile=auto is on: {figures}"
    return False, f"{off}: {figures}, and it is to save {MARGIN:g} times that"


def _never(e: Estimate) -> str:
    """Why training compiles nothing of a plan, or refuses to (`ppo/compiled.py`); "" where not."""
    s = e.setup
    if s.sharding not in ("none", "ddp"):
        return "sharded models are not compiled, and training refuses them with it"
    if any(m.experts > 1 for m in e.models):
        return "models that route tokens to experts are not compiled, and training refuses it"
    one_row = s.stage == "sft" and s.batch == 1
    return "passes of one row are not compiled" if one_row else ""


def caveat(e: Estimate) -> list[str]:
    """What must be known before figures of a plan with `torch_compile` are read."""
    (on, why), kind = e.compiles, e.hardware.kind
    found = [why] * bool(why)
    if on and kind != "cpu":
        where = WHERE[kind]
        found.append(f"torch_compile on {where}: not measured, and without the time to compile")
    elif on and not why and e.steps is not None:
        saved, cost = (
            e.steps * (e.eager_seconds - e.step_seconds),
            compile_seconds(e.setup, e.hardware),
        )
        found.append(f"torch_compile takes {cost:.0f} s once, and saves {saved:.0f} s of the run")
    return found
