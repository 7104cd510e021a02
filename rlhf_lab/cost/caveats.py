"""What must be known before the figures of a plan are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..display import format_bytes
from .compiling import caveat
from .online import of_teacher

if TYPE_CHECKING:
    from .estimate import Estimate

NO_SCORE = (
    "{}: transformers has no class of it with a score head, so no reward or value model can be made"
)
TOO_MANY = (
    "{} devices in one machine, whose links are planned between all of them; the catalogue knows "
    "machines with {} ({}): give more nodes where yours are such"
)
EXPERTS_IN_FP32 = (
    "autocast does not reach grouped products: experts compute in fp32, slower than planned; "
    "dtype=bfloat16 makes them 16-bit"
)
STATE = (
    "{}: beside keys and values a request keeps {} whatever its length (recurrent states in fp32, "
    "inputs of convolutions), counted as kv_cache{}"
)


def of_states(e: Estimate) -> list[str]:
    """What a request keeps whatever its length, in words; none where nothing is sampled."""
    s = e.setup
    size = s.model.state_bytes(2 if s.autocast else s.bytes_per_weight)
    if not size or all(row.component != "kv_cache" for row in e.ledger):
        return []
    engine = s.engine == "vllm" or s.use_vllm
    pages = ", as transformers holds it; an engine's pages may be larger" * engine
    return [STATE.format(s.model.family, format_bytes(size), pages)]


def of_main_memory(e: Estimate) -> str:
    """What offloading takes of each machine's main memory, in words; "" where it takes none."""
    needs = f"needs at least {format_bytes(e.main_memory)} of main memory a machine"
    return needs * bool(e.main_memory)


def caveats(e: Estimate) -> list[str]:
    """What a plan for this device, or for a family like this, leaves out, and that more requests
    arrive than can be served."""
    s, hw = e.setup, e.hardware
    reward = s.reward or s.model
    scored = {"reward": (s.model,), "ppo": (reward, s.value or reward)}.get(s.stage, ())
    found = [f"{hw.name}: {hw.caveat}"] * bool(hw.caveat)
    if hw.kind != "cpu" and s.gpus // s.nodes > hw.devices_per_node:
        found.append(TOO_MANY.format(s.gpus // s.nodes, hw.devices_per_node, hw.name))
    found += caveat(e)
    found += [line for m in e.models for line in m.remarks]
    found += of_states(e)
    found += [NO_SCORE.format(m.family) for m in scored if not m.reward_head]
    if s.lora_r > (side := s.model.narrowest):
        found.append(f"lora_r={s.lora_r}: ranks above {side}, a matrix's width, add no more")
    if needs := of_main_memory(e):
        there = "not checked: a file of hardware says how much there is (main_memory_gib)"
        if hw.main_memory:
            there = f"{hw.name} has {format_bytes(hw.main_memory)}"
        found.append(f"offloading {needs}; {there}")
    if s.autocast and s.model.experts > 1:
        found.append(EXPERTS_IN_FP32)
    if s.stage == "distill":
        found += of_teacher(s.model, s.teacher)
    if s.stage == "inference" and e.serving.most is not None:
        found.append(f"more requests arrive than the {e.serving.most:.3g} a second it can do")
    return list(dict.fromkeys(found))
