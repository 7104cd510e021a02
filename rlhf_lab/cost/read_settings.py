"""A plan's settings, as trainers name them, read into a `Setup`.

What they leave out is what the lab's trainers do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace

from ..display import is_number
from ..stages import ONLINE, STAGES, Setting, Settings
from .architecture import Architecture
from .fields import RENAMED
from .hardware import Hardware, nodes_for
from .quantization import FORMATS
from .rollout_engine import engine_bytes
from .setup import CannotBe, Setup

NAMES = frozenset(f.name for f in fields(Setup))
CHECKPOINTING = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
"""Both names of transformers' setting, the older one first."""
NO_DROPOUT = frozenset({"reward", "dpo", "kto"})
"""Stages whose trainers turn dropout off where `disable_dropout` is not given; PPO always does."""
OF_ENGINE = frozenset(
    "concurrency requests_per_second kv_cache_dtype gpu_memory_utilization max_num_batched_tokens "
    "max_num_seqs".split()
)
"""Settings of inference that only an engine has: without `engine` they mean one."""


def make_setup(
    stage: str,
    model: Architecture,
    hw: Hardware,
    settings: Mapping[str, object],
    **roles: Architecture,
) -> Setup:
    """A Setup from a plan's settings; what they leave out is what the lab's trainers do.

    `roles`: architectures of other models, `reward=` and `value=`. Without lengths a row fills
    `max_length` (or the model's context), half of it the prompt.
    """
    given: dict[str, Setting] = {
        RENAMED.get(name, name): tuple(value) if isinstance(value, list) else value
        for name, value in settings.items()
        if value is not None
    }
    known = {k: v for k, v in given.items() if k in NAMES} | roles
    known["gpu"] = hw.kind != "cpu"
    if stage == "ppo" and not known["gpu"]:  # trained so, and planned as our own loop
        known.pop("use_vllm", None)
    if stage == "inference":
        _serve(known, given, hw)
    if known.get("dtype", "float32") == "float32" and not {"bf16", "fp16"} & known.keys():
        known["bf16"] = known["gpu"] and "bf16" in hw.flops
        known["fp16"] = known["gpu"] and not known["bf16"] and "fp16" in hw.flops
    _check_width(known, hw)
    if stage in STAGES:
        known = {**STAGES[stage].library_defaults, **known}
    if known.get("optim") == "adamw_8bit":  # transformers' other name for the same
        known["optim"] = "adamw_bnb_8bit"
    if stage == "ppo" or given.get("disable_dropout", stage in NO_DROPOUT):
        known.pop("lora_dropout", None)
    if whole := given.get("generation_batch_size"):  # TRL's other name for the same
        once = known.get("batch", Setup.batch) * known.get("gpus", 1)
        for name, part in (("a pass", once), ("num_generations", known["samples_per_prompt"])):
            if whole % part != 0:
                raise CannotBe(
                    f"generation_batch_size={whole} does not split into {part} ({name}): choose a "
                    "multiple"
                )
        known["steps_per_generation"] = int(whole) // once
    if known.get("steps", 0) <= 0:
        known.pop("steps", None)
    known = _episodes(stage, known, given)
    for kwargs in map(given.get, CHECKPOINTING):
        if isinstance(kwargs, Mapping):
            known["every_n_layers"] = kwargs.get("every_n_layers", 1)
            known["offload_inputs"] = bool(kwargs.get("offload"))
    known["tf32"] = bool(given.get("tf32")) and "tf32" in hw.flops
    room = min(int(given.get("max_length") or model.context), model.context)
    if stage in ONLINE:
        known.setdefault("response", 53)
        known.setdefault("prompt", max(1, min(64, room - known["response"])))
    elif not {"prompt", "response"} & known.keys():
        known["prompt"], known["response"] = room // 2, room - room // 2
    for one, other in (("prompt", "response"), ("response", "prompt")):
        if other not in known:
            left = room - known[one] if is_number(known[one]) else 1
            known[other] = max(1, min(64, left))
    gpus = known.get("gpus", 1)
    if type(gpus) is int and gpus > 1:
        known.setdefault("sharding", "ddp")
        known.setdefault("nodes", nodes_for(gpus, hw))
    if is_number(multiple := given.get("pad_to_multiple_of")):  # TRL's "auto" is none here
        known = _padded_to(int(multiple), known, model.context)
    if given.get("padding_free"):
        known |= _without_padding(known)
    if given.get("packing"):
        known |= _packed(known, room)
    if not known.get("use_vllm"):
        return Setup(stage=stage, model=model, **known)
    s = Setup(stage=stage, model=model, **known)
    return replace(s, engine_bytes=engine_bytes(s, hw))


def _serve(known: dict[str, Setting], given: Mapping[str, Setting], hw: Hardware) -> None:
    """What a stated load, or weights in a format of engines, say of the rest: an engine serves it,
    from 16-bit weights, and `concurrency` requests in flight are shared by all copies."""
    of_engine = {n for n, f in FORMATS.items() if "transformers" not in f.engines}
    if OF_ENGINE & given.keys() or given.get("quantization") in of_engine:
        known.setdefault("engine", "vllm")
    if known.get("engine") == "vllm":  # which multiplies weights as it keeps them
        autocast = {name for name in ("bf16", "fp16") if known.get(name)}
        if autocast and "dtype" in known:
            raise CannotBe(f"engine='vllm' has no autocast: leave {autocast.pop()} or dtype out")
        half = "float16" if "fp16" in autocast or "bf16" not in hw.flops else "bfloat16"
        known.setdefault("dtype", half)
        known |= {"bf16": False, "fp16": False}
    if count := given.get("concurrency"):
        copies = max(1, known.get("gpus", 1) // known.get("tensor_parallel", 1))
        known["batch"] = -(-int(count) // copies)


def _check_width(known: Mapping[str, Setting], hw: Hardware) -> None:
    """Raises ValueError, one line, for 16 bits that the device does not multiply."""
    for width, dtype, other in (("bf16", "bfloat16", "fp16"), ("fp16", "float16", "bf16")):
        for asked in (width * bool(known.get(width)), dtype * (known.get("dtype") == dtype)):
            if asked and width not in hw.flops:
                there = f"{other}=True" if other in hw.flops else "dtype='float32'"
                raise ValueError(f"{hw.name} makes no products in {dtype} ({asked}): {there} does")


def _episodes(stage: str, known: dict[str, Setting], given: Settings) -> dict[str, Setting]:
    """PPO's `total_episodes` as iterations, where steps are not given."""
    episodes = given.get("total_episodes")
    if stage != "ppo" or not episodes or "steps" in known:
        return known
    passes = known.get("gradient_accumulation_steps", 1) * known.get("gpus", 1)
    batch = known.get("batch", Setup.batch) * passes // known.get("tensor_parallel", 1)
    return {**known, "steps": math.ceil(episodes / batch)}


def _padded_to(multiple: int, known: dict[str, Setting], context: int) -> dict[str, Setting]:
    """Rows whose length is a multiple: the longest one, and on average half of it more."""
    longer = -(known["prompt"] + known["response"]) % multiple
    if known["prompt"] + known["response"] + longer > context:
        raise CannotBe(
            f"pad_to_multiple_of={multiple}: {known['prompt']} + {known['response']} tokens padded "
            f"are more than the {context} that the model takes"
        )
    known = {**known, "response": known["response"] + longer}
    if "padded_response" in known:
        known["padded_response"] += (multiple - 1) / 2
    return known


def _without_padding(known: dict[str, Setting]) -> dict[str, Setting]:
    """A batch as one row without padding: it is as long as its rows are on average."""
    mean = known.get("mean_tokens")
    if mean is None:
        return {"padded": False}
    prompt = mean * known["prompt"] / (known["prompt"] + known["response"])
    return {"padded": False, "padded_prompt": prompt, "padded_response": mean - prompt}


def _packed(known: dict[str, Setting], room: int) -> dict[str, Setting]:
    """Rows put one behind the other into rows of `room` tokens: fewer, full, without padding."""
    whole = known["prompt"] + known["response"]
    mean = min(known.get("mean_tokens", whole), room)
    prompt = round(room * min(1.0, known["prompt"] / whole))
    packed: dict[str, Setting] = {"prompt": prompt, "response": room - prompt, "padded": False}
    packed |= dict.fromkeys(("padded_prompt", "padded_response", "mean_tokens"))
    if known.get("rows"):
        packed["rows"] = math.ceil(known["rows"] * mean / room)
    return packed
