"""Which matrices LoRA may adapt: checked against a model before it is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .cost.architecture import architecture
from .models.structure import matrix_names
from .stages import Setting

ALL_LINEAR = "all-linear"
NO_OUT_PROJ = ("falcon_h1", "nemotron_h")
"""Types of models with state spaces, of which peft refuses some matrices (peft 0.21,
`_check_lora_target_modules_mamba`); it names others that are not trained here."""


def check_targets(config: Mapping[str, object], settings: Mapping[str, Setting]) -> None:
    """Raises ValueError, one line, for matrices to adapt that the model has not, which peft passes
    over as long as it finds one of them. What the planner does not know is looked for in the model,
    which is built without weights."""
    if not settings.get("lora_r"):
        return
    targets: Setting = settings.get("lora_target_modules") or ALL_LINEAR
    every, kind = str(targets).lower() == ALL_LINEAR, config.get("model_type")
    if kind in NO_OUT_PROJ and (every or "out_proj" in targets):
        raise ValueError(
            f"lora_r: peft puts no adapters on out_proj of {kind}; set lora_target_modules to a "
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
