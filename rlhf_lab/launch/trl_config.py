"""A plan as a file for TRL's command line (`trl sft --config FILE`, …)."""

from __future__ import annotations

import json

from ..cost.setup import Setup
from ..settings import SETTINGS, as_floats, config_fields
from ..stages import STAGES, Setting, Settings

OURS = "# rlhf-lab: "
"""A comment line in a file for TRL: what only a plan knows, as JSON."""


def trl_config(stage: str, model: str, settings: Settings, setup: Setup) -> str:
    """YAML for TRL's command line; what only a plan knows (lengths, rows, devices) is a comment in
    it, which `rlhf-lab plan --config` reads."""
    import yaml

    if settings.get("distill_from", "student") != "student":
        raise ValueError("TRL's command line distils from what the student writes alone")
    own = {"missing_eos_penalty", "distill_from", "loss_top_k"}
    own = {"layout", "total_episodes"} if stage == "ppo" else own
    fields = (config_fields(stage).keys() | SETTINGS["model"].keys()) - own
    theirs: dict[str, Setting] = {"model_name_or_path": model, "bf16": setup.bf16}
    theirs |= {"fp16": setup.fp16} | ({} if setup.gpu else {"use_cpu": True})
    theirs |= {"use_peft": True} if settings.get("lora_r") else {}  # else TRL trains all weights
    ours: dict[str, Setting] = {"stage": stage}
    for name, value in as_floats(settings).items():
        if STAGES[stage].trainer and STAGES[stage].online and name == "response_length":
            theirs["max_completion_length"] = value
        elif name in fields:
            theirs[name] = list(value) if isinstance(value, tuple) else value
        else:
            ours[name] = value
    return f"{OURS}{json.dumps(ours)}\n{yaml.safe_dump(theirs, sort_keys=False)}"
