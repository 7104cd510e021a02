"""Settings against the model that they are for: matrices to adapt, files in fewer bits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .cost.architecture import architecture
from .cost.caveats import NO_SCORE
from .cost.quantization import format_of, quantised
from .models.structure import matrix_names
from .stages import STAGES, Setting, Settings

if TYPE_CHECKING:
    from .models.load import Model

OF_WEIGHTS = {"quantization", "load_in_4bit", "load_in_8bit"}
"""Settings of inference that say what weights are kept in; without one the config says it."""


def small_weights(stage: str, model: Model, settings: Settings) -> dict[str, Setting]:
    """What the files of a model in fewer bits say, as settings: the format of inference, or that
    adapters are trained on a base in bitsandbytes' 4 or 8 bits.

    Raises ValueError, one line, for one that is not trained, and for other roles in fewer bits,
    which are planned as whole weights.
    """
    kind, roles = STAGES[stage].starts_from, {*STAGES[stage].roles[1:]} & model.paths.keys()
    for role in (role for role in roles if model.paths[role]):  # "": an earlier stage writes it
        if format_ := quantised(model.config_dict(role)):
            raise ValueError(
                f"{model.paths[role]} is in fewer bits ({format_['quant_method']}), which of a "
                f"{role} model are not planned: give the model that it was made of"
            )
    start = model.paths.get(kind, model.paths["base"])
    format_ = quantised(config := model.config_dict(kind)) if start else {}
    if not format_ or stage == "inference":
        if not format_ or OF_WEIGHTS & settings.keys():
            return {}
        return {"quantization": format_of(config)}
    method = format_["quant_method"]
    if method != "bitsandbytes" or not settings.get("lora_r"):
        how = "set lora_r, for example 16, or " * (method == "bitsandbytes")
        raise ValueError(
            f"{start} is in fewer bits ({method}): it can be evaluated and served; {how}train the "
            "model that it was made of (load_in_4bit rounds the base of adapters)"
        )
    kept, apart = format_of(config), format_.get("llm_int8_skip_modules")
    if stage == "reward" and isinstance(apart, list) and "score" not in apart:
        raise ValueError(
            f"{start} is in {kept}, and so would be a new score head: its llm_int8_skip_modules do "
            "not name score; train the model that it was made of"
        )
    four = {"load_in_4bit": True, "use_bnb_nested_quant": kept == "nf4_nested"}
    its = {"load_in_8bit": True} if kept == "int8" else four
    for name in its.keys() & settings.keys():
        if settings[name] != its[name]:
            raise ValueError(f"{name}={settings[name]!r}: {start} is in {kept} already")
    return its


def no_reward_head(model: Model) -> str:
    """Why transformers makes no reward model of a model; "" where it does, or that is not known."""
    try:
        found = architecture(model.config_dict("sft"))
    except ValueError:  # not planned
        return ""
    return NO_SCORE.format(found.family) * (not found.reward_head)


ALL_LINEAR = "all-linear"
NO_ADAPTERS = {
    **dict.fromkeys(("falcon_h1", "nemotron_h"), "out_proj"),
    **dict.fromkeys(("phimoe", "llama4", "llama4_text"), "router"),
}
"""Types of models with a matrix that peft 0.21 puts no adapters on: of state spaces, which it
refuses (`_check_lora_target_modules_mamba`; it names others that are not trained here), and of
routers that give more than their product, with which it fails in the first pass."""


def check_targets(config: Mapping[str, object], settings: Mapping[str, Setting]) -> None:
    """Raises ValueError, one line, for matrices to adapt that the model has not, which peft passes
    over as long as it finds one of them. What the planner does not know is looked for in the model,
    which is built without weights."""
    if not settings.get("lora_r"):
        return
    targets: Setting = settings.get("lora_target_modules") or ALL_LINEAR
    every, kind = str(targets).lower() == ALL_LINEAR, config.get("model_type")
    without = NO_ADAPTERS.get(str(kind))
    if without and (every or without in targets):
        raise ValueError(
            f"lora_r: peft puts no adapters on {without} of {kind}; set lora_target_modules to a "
            "list of other matrices"
        )
    if every:
        return
    what, pattern = f"lora_target_modules={targets!r}", isinstance(targets, str)
    if head := {"lm_head", "embed_out"} & ({targets} if pattern else {*targets}):
        raise ValueError(
            f"{what}: {head.pop()} is read without adapters, which would not be trained; leave it "
            "out"
        )
    try:
        known: tuple[str, ...] = architecture(config).lora_targets(ALL_LINEAR)
    except ValueError:  # not planned
        known = ()
    missing = [targets] if pattern else [name for name in targets if name not in known]
    try:
        there = matrix_names(config) if missing else []
        for name in missing:
            whole = re.compile(name if pattern else rf"(.*\.)?{re.escape(name)}")
            if not any(map(whole.fullmatch, there)):
                choose = ", ".join(known or {path.rpartition(".")[2]: 0 for path in there})
                raise ValueError(
                    f"{what}: no layer {name!r}{' (a pattern of whole paths)' * pattern}; "
                    f"choose {ALL_LINEAR!r} or a list of {choose}"
                )
    except re.error as error:
        raise ValueError(f"{what} is no pattern: {error}") from None
