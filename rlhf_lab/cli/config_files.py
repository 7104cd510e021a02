"""Plans from the config files that people have: TRL's command line, accelerate, axolotl,
LLaMA-Factory.

What a file says is taken over under our names (`other_tools.yaml`); what changes no figure is left
aside; what is not understood is named, and never dropped without a word.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..cost.setup import CROSS_ENTROPY
from ..launch.accelerate_config import CONFIGS
from ..launch.accelerate_files import (
    BATCH,
    Read,
    accelerate_settings,
    check_batch,
    deepspeed_file_settings,
    deepspeed_settings,
)
from ..launch.trl_config import OURS
from ..runs.yaml_files import read_names
from ..settings import LORA, NOT_HONOURED, check_names, known_settings
from ..stages import STAGES, Setting, read_table

TOOLS: Mapping[str, dict[str, Setting]] = read_table(__file__, "other_tools.yaml")
"""Other tools' keys, and what they are here."""
FLAGS = {
    "model_name_or_path": "--model",
    "dataset_name": "--data",
    "dataset_config": "--subset",
    "dataset_train_split": "--split",
    "reward_model_name_or_path": "--reward-model",
    "output_dir": "--out",
    "accelerate_config": "--accelerate",
    "num_processes": "--processes",
}
"""Keys of TRL's command line, and the flags of `rlhf-lab train` that say the same."""
SCRIPT = FLAGS.keys() | set(
    "dataset_test_split dataset_streaming datasets streaming test_split_size ignore_bias_buffer "
    "env".split()
)
"""Keys of TRL's scripts that say which data to read, and where to run."""
ACCELERATE = {"multi_gpu": "ddp", "single_gpu": "ddp"}
"""TRL's names of accelerate configs where they are not ours."""
NO_ADAPTERS = "lora_r (TRL trains all weights without use_peft: true)"
WHERE = "gpus", "nodes", "sharding", "offload"
"""Settings of a plan that a launch decides."""


@dataclass
class FromFile:
    """What a config file says of a plan. `script`: what TRL's says of models, data and processes;
    `unread`: keys that are not understood; `left_out`: what is not in the file and has a default of
    the tool's own, which a plan follows (of TRL's, which we train ourselves, it only says so)."""

    tool: str
    stage: str | None = None
    model: str | None = None
    settings: Read = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    script: Read = field(default_factory=dict)
    left_out: Read = field(default_factory=dict)

    @property
    def sizes(self) -> Read:
        """Of the batch, as a file for DeepSpeed has them."""
        own = self.tool in ("accelerate", "DeepSpeed")
        return {k: v for k, v in self.settings.items() if own and k in BATCH.values()}

    @property
    def planned(self) -> Read:
        """Settings of a plan, without those that change none and that a run would refuse."""
        of_plan = {k: v for k, v in self.settings.items() if k not in NOT_HONOURED}
        return of_plan if self.tool == "TRL" else self.left_out | of_plan

    def notes(
        self, stage: str, given: Collection[str], settings: Mapping[str, object]
    ) -> list[str]:
        """Lines about a plan of a stage with these settings, of which the user has given some: what
        of the file was not read, or says otherwise of the batch, and whose defaults stand for what
        it leaves out."""
        unread = [*self.unread]
        of_batch = check_batch(self.sizes, unread, settings)
        lines = of_batch + [f"not read: {', '.join(unread)} ({self.tool})"] * bool(unread)
        left_out = {k: v for k, v in self.left_out.items() if k not in given}
        if self.tool != "TRL":
            theirs = ", ".join(f"{name} {value}" for name, value in left_out.items())
            return lines + [f"not in the file, so {self.tool}'s: {theirs}"] * bool(theirs)
        if self.stage is None:  # a file that we wrote leaves out nothing
            of_stage = TOOLS["TRL"]["of_stage"].get(stage, {})
            known = {*given, *self.settings}
            known |= {"steps_per_generation"} if "generation_batch_size" in known else set()
            sizes = {**TOOLS["TRL"]["defaults"], **settings}
            left_out |= {k: sizes.get(v, v) for k, v in of_stage.items() if k not in known}
        ours = {"gradient_checkpointing": False, **settings}
        other = [
            f"{name} {ours[name]} (TRL: {value})"
            for name, value in left_out.items()
            if name in ours and ours[name] != value
        ]
        return lines + [f"not in the file, so the lab's: {', '.join(other)}"] * bool(other)


def as_flags(path: str | Path, stage: str) -> list[str]:
    """A config file of TRL's as the flags of `rlhf-lab train STAGE` that say the same.

    Raises ValueError, one line, for what `train` would not do.
    """
    found = read_config(path)
    if found.tool != "TRL":
        raise ValueError(
            f"{path} is {found.tool}'s, to plan only (plan --config); train reads TRL's"
        )
    if found.stage not in (None, stage):
        raise ValueError(f"{path} is for {found.stage}, not {stage}")
    if unknown := found.script.keys() - FLAGS.keys():
        raise ValueError(f"{path}: train does not know {', '.join(sorted(unknown))}")
    if NO_ADAPTERS in found.unread:
        raise ValueError(f"{path}: {NO_ADAPTERS}: write it, or leave lora_r out")
    try:
        check_names(found.unread, stage)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    settings, script = dict(found.settings), dict(found.script)
    gpus, _, sharding, offload = (settings.pop(name, None) for name in WHERE)
    if gpus and gpus > 1:
        how = f"{sharding or 'ddp'}-offload" if offload not in (None, "none") else sharding or "ddp"
        script = {"accelerate_config": how, "num_processes": gpus} | script
    if (how := script.get("accelerate_config")) is not None:
        script["accelerate_config"] = ACCELERATE.get(how, how)
    flags = [word for key, value in script.items() for word in (FLAGS[key], str(value))]
    if (steps := settings.pop("max_steps", -1)) > 0:
        flags += ["--steps", str(steps)]
    for name in ("rows", "seed"):
        flags += [f"--{name}", str(settings.pop(name))] if name in settings else []
    for name, value in settings.items():
        flags += ["--set", f"{name}={value if isinstance(value, str) else repr(value)}"]
    return flags


def read_configs(paths: Iterable[str | Path]) -> list[FromFile]:
    """Config files in the order in which they are told, each behind the file of accelerate's that
    it names. Raises as `read_config`."""
    files = []
    for path in paths:
        found = read_config(path)
        how = str(found.script.get("accelerate_config") or "ddp")
        if Path(how).is_file():
            files.append(read_config(how))
        elif ACCELERATE.get(how, how) not in CONFIGS:
            found.unread.append(f"accelerate_config: {how}")
        files.append(found)
    return files


def read_config(path: str | Path) -> FromFile:
    """A YAML or JSON config file of TRL, accelerate, axolotl or LLaMA-Factory.

    Raises ValueError, one line, for a file that cannot be read or planned.
    """
    path = Path(path)
    content = read_names(path)
    if "distributed_type" in content:
        settings, unread = accelerate_settings(content, path)
        return FromFile("accelerate", settings=settings, unread=unread)
    if "zero_optimization" in content:
        settings, unread = deepspeed_file_settings(content, path)
        return FromFile("DeepSpeed", settings=settings, unread=unread)
    for tool, facts in TOOLS.items():
        if any(key in content for key in facts["has"]):
            return _other(tool, facts, content, path)
    found = _trl(content)
    for line in path.read_text("utf-8").splitlines():
        if line.startswith(OURS):
            own = json.loads(line.removeprefix(OURS))
            found.stage = own.pop("stage")
            found.settings |= own
            found.left_out = {}  # we wrote it, whole
    return found


def _trl(content: Read) -> FromFile:
    known = set().union(*(known_settings(stage) for stage in STAGES))
    rest = {k: v for k, v in content.items() if k not in SCRIPT and k != "model_name_or_path"}
    unread = [name for name in rest if name not in known]
    settings = {name: value for name, value in rest.items() if name in known}
    if settings.get("lora_r") and "use_peft" not in settings:
        unread.append(NO_ADAPTERS)
        settings = {k: v for k, v in settings.items() if k not in LORA}
    if (processes := content.get("num_processes")) is not None:
        settings["gpus"] = int(processes)
    how = str(content.get("accelerate_config", ""))
    if (how := ACCELERATE.get(how, how)) in CONFIGS and settings.get("gpus", 2) > 1:
        settings["sharding"], offload = CONFIGS[how]
        settings |= {"offload": offload} if offload != "none" else {}
    script = {name: value for name, value in content.items() if name in SCRIPT}
    model = content.get("model_name_or_path")
    return FromFile("TRL", None, model, settings, unread, script, _left_out("TRL", settings))


def _left_out(tool: str, settings: Read) -> Read:
    """A tool's own defaults of what its file does not say."""
    given = {*settings} | ({"num_train_epochs"} if settings.get("max_steps", -1) > 0 else set())
    given |= {"gradient_checkpointing"} if "activation_checkpointing" in settings else set()
    return {k: v for k, v in TOOLS[tool]["defaults"].items() if k not in given}


# ------------------------------------------------------------------------- axolotl, LLaMA-Factory


def _other(tool: str, facts: Mapping[str, Setting], content: Read, path: Path) -> FromFile:
    """Keys of another tool under our names."""
    found = FromFile(tool, "sft", content.get(facts["model"]))
    beside, fields = set(facts["beside"].split()), known_settings("sft") | known_settings("ppo")
    for key, value in content.items():
        if key in facts["flags"]:
            _flag(found, facts["flags"][key], key, value)
        elif key in facts["names"]:
            found.settings[facts["names"][key]] = value
        elif key in fields and key not in beside:
            found.settings[key] = value
        elif key not in beside and key != facts["model"]:
            found.unread.append(key)
    settings = found.settings = {k: v for k, v in found.settings.items() if v is not None}
    if isinstance(file := settings.pop("deepspeed", None), str):
        theirs, unread = deepspeed_settings({"deepspeed_config_file": file}, path)
        settings = found.settings = theirs | settings
        found.unread += unread
    if fsdp := content.get("fsdp_config"):  # axolotl's is accelerate's
        asked = {"fsdp_version": content.get("fsdp_version", 1), **fsdp}
        theirs, unread = accelerate_settings(
            {"distributed_type": "FSDP", "fsdp_config": asked}, path
        )
        theirs.pop("gpus")
        settings = found.settings = theirs | settings
        found.unread += unread
    if tool == "llama-factory":
        _llama_factory(settings, content)
    if isinstance(targets := settings.get("lora_target_modules"), str) and "," in targets:
        settings["lora_target_modules"] = [name.strip() for name in targets.split(",")]
    if settings.get("lora_target_modules") in ("all", ["all"]):
        settings["lora_target_modules"] = "all-linear"
    if settings.get("dtype") == "bfloat16":  # no autocast over 16-bit weights
        settings.pop("bf16", None)
    adapters = content.get("adapter", content.get("finetuning_type")) in ("lora", "qlora")
    if not adapters:
        for name in ("lora_r", "lora_target_modules", "lora_dropout", "lora_alpha"):
            settings.pop(name, None)
    elif "lora_r" not in settings:
        found.unread.append("adapter without lora_r")
    found.left_out = _left_out(tool, settings)
    if found.stage not in CROSS_ENTROPY:
        settings.pop("loss", None)
    elif found.stage in facts["whole_logits"] and "loss" not in settings:
        fused = settings.get("use_liger_kernel") and found.stage == "sft"  # Liger's own
        found.left_out |= {} if fused else {"loss": "plain"}
    if {"bf16", "fp16"} & content.keys():
        found.left_out.pop("dtype", None)
    return found


def _flag(found: FromFile, table: Mapping[str, Read], key: str, value: object) -> None:
    """Settings that a key with this value stands for; a value that is off stands for none."""
    word = str(value).lower() if isinstance(value, bool) else str(value)
    if word in table:
        meant = dict(table[word])
        found.stage = meant.pop("stage", found.stage)
        found.settings |= meant
    elif value not in (None, False, "", "false"):
        found.unread.append(f"{key}: {value}")


def _llama_factory(settings: Read, content: Read) -> None:
    """Its defaults where they are not TRL's, and what is put the other way round."""
    if content.get("finetuning_type") == "lora":
        settings.setdefault("lora_r", 8)
        settings |= {"adapter_dtype": "bfloat16"} if content.get("pure_bf16") else {}
    off = bool(settings.pop("gradient_checkpointing", False))
    settings["gradient_checkpointing"] = not off
    names = {"fa2": "flash_attention_2", "sdpa": "sdpa", "disabled": "eager"}
    if "attn_implementation" in settings:
        name = names.get(str(settings.pop("attn_implementation")))
        settings |= {"attn_implementation": name} if name else {}
