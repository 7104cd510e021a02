"""Settings of a stage: which names there are, of which types, checked without importing a trainer.

A name is a field of the stage's config (TRL's, or our PPOConfig), of TRL's ModelConfig (LoRA, 4
bits), or a plan's own (`cost/settings.yaml`). What a plan makes of it: `cost/fields.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from .cost.fields import CALLED, RENAMED, WHOLE_NUMBERS
from .cost.read_settings import CHECKPOINTING
from .cost.setup import CHOICES, Setup, check_whole, extra_settings
from .display import by_surface, check_choice, did_you_mean, is_number
from .stages import STAGES, Setting, read_table, resolve

LORA = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "use_rslora": "use_rslora",
}
"""LoRA's settings, named as TRL's ModelConfig names them → peft's LoraConfig."""


VALUES = read_table(__file__, "values.yaml")
ABOVE_ZERO, SHARE, BELOW_ONE, ANY_SIGN, ENDLESS = (
    frozenset(VALUES[kind].split())
    for kind in ("above_zero", "share", "below_one", "any_sign", "endless")
)
"""Settings by the numbers that they may be (`values.yaml`); beside `WHOLE_NUMBERS`."""
PLANNED_ONLY = frozenset(VALUES["planned_only"].split())
"""Settings of a plan that change how a run would be made, and that `train` has at the defaults of
`Setup` only; the other ones describe the data, or choose rewards."""
WORDS: dict[str, tuple[str, ...]] = {k: tuple(v.split()) for k, v in VALUES["choices"].items()}
APART = (
    ("bf16", "fp16"),
    ("load_in_4bit", "load_in_8bit"),
    ("use_vllm", "use_transformers_continuous_batching"),
)
"""Settings of which one may be on."""


OF_TOKENIZER = (
    "rows are tokens when the trainer gets them; change the tokenizer in the model's folder"
)
OF_ROWS = "rows come with prompts and answers, and the loss is that of the answers"
BY_LAYER = "layers are compiled by inductor (torch_compile=True)"
NOT_HONOURED = {
    "output_dir": "the run's folder is named by {}",
    "resume_from_checkpoint": "training goes on from the run in {} with {}",
    **dict.fromkeys(("eos_token", "pad_token", "chat_template_path"), OF_TOKENIZER),
    **dict.fromkeys(("dataset_text_field", "assistant_only_loss"), OF_ROWS),
    **dict.fromkeys(("torch_compile_backend", "torch_compile_mode"), BY_LAYER),
}
"""Fields of the trainers' configs that a run decides by itself → what to do instead."""


OF_MODEL = {"lora_r": 16}
"""What TRL's ModelConfig takes where nothing is given."""


def known_settings(stage: str) -> frozenset[str]:
    """Names that a plan of the stage may set."""
    own = frozenset(config_fields(stage)) | SETTINGS["model"].keys() | extra_settings(stage).keys()
    return own - {"model_name_or_path"}


def check_names(settings: Iterable[str], *stages: str) -> None:
    """Raises ValueError, one line, for a setting that none of the stages has."""
    known = frozenset[str]().union(*map(known_settings, stages))
    for name in settings:
        if name not in known:
            found = [
                STAGES[stage].config.partition(":")[2] or f"{stage}'s plan" for stage in stages
            ]
            configs, has = ", ".join(found), "has" if len(stages) == 1 else "have"
            ours, others = CALLED.get(name), [s for s in STAGES if name in known_settings(s)]
            hint = f"did you mean {ours!r}?" if ours in known else did_you_mean(name, known)
            if others and ours not in known:
                hint = f"{', '.join(others)} {'has' if len(others) == 1 else 'have'} it"
            hint = f"; {hint}".rstrip("; ")
            raise ValueError(f"{configs} {has} no setting {name!r}{hint}")


def check_settings(stage: str, settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """The settings that are fields of the stage's config, checked without importing it.

    Raises ValueError, one line, for a name that nobody has, for a value of another type, and for a
    setting that would have no effect.
    """
    check_names(settings, stage)
    _check_padding(stage, settings)
    own, types = config_fields(stage), _types_of(stage)
    for one, other in APART:
        if settings.get(one) and settings.get(other):
            raise ValueError(f"{one} and {other}: choose one")
    for name, value in settings.items():
        if name in NOT_HONOURED:
            words = by_surface("out", "--out"), by_surface("resume=True", "--resume")
            raise ValueError(f"{name} has no effect here: {NOT_HONOURED[name].format(*words)}")
        if name == "torch_compile":
            _check_compiled(value, settings, stage)
            continue
        _check_type(name, value, types.get(name, ""))
        check_value(stage, name, value)
        if name == "train_sampling_strategy" and value is not None:
            _check_order(stage, value, settings)
        optimizers = SETTINGS["choices"]["optim"].split(" | ") if name == "optim" else ()
        theirs = value in optimizers or name == "optim" and not _in_step()
        if name in CHOICES and value is not None and not theirs:
            check_choice(name, value, CHOICES[name])
        if name in CHECKPOINTING and stage in LOSE_LAYERS and isinstance(value, Mapping):
            for part in {"every_n_layers", "offload"} & value.keys():
                how = f"TRL's trainer of {stage} fails with {part}={value[part]!r}; leave it out"
                raise ValueError(f"{name}: {how}")
    return {name: value for name, value in settings.items() if name in own}


ORDERS = dict.fromkeys(("sft", "reward", "dpo"), ("random", "sequential", "group_by_length"))
"""Of each stage the orders of rows that its trainer keeps to; of KTO see `trainers/kto.py`, and
stages that sample draw groups."""


def _check_order(stage: str, value: Setting, settings: Mapping[str, Setting]) -> None:
    """Raises ValueError, one line, for an order of rows that a stage does not keep to."""
    if value == "group_by_length" and settings.get("packing"):
        raise ValueError(
            "train_sampling_strategy='group_by_length': packed rows are all of one length: leave "
            "it or packing out"
        )
    if value == "batch_rebalance" and stage in ORDERS:
        raise ValueError(
            "train_sampling_strategy='batch_rebalance': transformers makes passes of unlike "
            "numbers of rows, whose means TRL weighs alike, in one order for all seeds; choose "
            "'group_by_length'"
        )
    known = ORDERS.get(stage, ("sequential",) if stage == "kto" else ("random",))
    check_choice(f"train_sampling_strategy of {stage}", value, known)


def _check_padding(stage: str, settings: Mapping[str, Setting]) -> None:
    """Raises ValueError, one line, for what TRL 1.16 makes otherwise of batches without padding."""
    if stage == "dpo" and settings.get("padding_free"):
        raise ValueError("padding_free: TRL's trainer of dpo pads all the same; leave it out")
    for name in ("packing", "padding_free"):
        if settings.get(name) and settings.get("neftune_noise_alpha"):
            raise ValueError(
                f"neftune_noise_alpha: with {name} a batch is one long row, and the noise, which "
                "shrinks with a row's length, gets weaker with the batch; leave one of them out"
            )


def as_whole(stage: str, settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """The settings, whole numbers that were written as floats (5e8) as what they are."""
    types = _types_of(stage)

    def whole(name: str, value: Setting) -> Setting:
        kinds = _kinds(types.get(name, ""))
        turns = "int" in kinds and not kinds & {"float", "str"}
        return int(value) if turns and isinstance(value, float) and value.is_integer() else value

    return {name: whole(name, value) for name, value in settings.items()}


LOSE_LAYERS = frozenset({"dpo", "kto", "rloo", "grpo"})
"""Stages whose trainers turn recomputation off for a while. TRL 1.16 turns it on again with all
that it was told as arguments of torch's `checkpoint`, which refuses what transformers reads
(`trl.models.utils.disable_gradient_checkpointing`)."""


def _check_compiled(value: Setting, settings: Mapping[str, Setting], stage: str) -> None:
    """What compiles, and with what (`ppo/compiled.py`)."""
    if value and stage == "inference":
        raise ValueError("torch_compile is of training, sampling is not compiled: leave it out")
    if not isinstance(value, bool) and value != "auto":  # 1 == True
        raise ValueError(f"torch_compile must be True, False or 'auto', got {value!r}")
    for name in ("load_in_4bit", "load_in_8bit", "use_liger_kernel"):
        if value and settings.get(name):
            raise ValueError(f"torch_compile does not go with {name}: leave one of them out")


NEEDS = {"use_liger_kernel": "liger-kernel", "use_vllm": "vllm", "load_in_8bit": "bitsandbytes"}
"""Settings that train with a package that need not be there."""


def check_packages(settings: Mapping[str, Setting]) -> None:
    """Raises ValueError, one line, for a setting whose package is not installed."""
    for name, package in NEEDS.items():
        if settings.get(name) and find_spec(package.replace("-", "_")) is None:
            raise ValueError(f"{name} needs {package}: pip install {package}")


SETUP_TYPES = {
    {v: k for k, v in RENAMED.items()}.get(f.name, f.name): str(f.type) for f in fields(Setup)
}
"""Types of the settings that a Setup reads, as text."""


def _types_of(stage: str) -> dict[str, str]:
    """Types of all that a plan of the stage may set, as text."""
    return {**SETUP_TYPES, **SETTINGS["model"], **config_fields(stage)}


def _kinds(type_: str) -> set[str]:
    """The names in a type that is text."""
    return set(re.findall(r"\w+", type_))


def _check_type(name: str, value: Setting, type_: str) -> None:
    """Numbers are numbers and switches are switches: the trainers find out much later.

    `type_`: the field's annotation as text; "" is not checked.
    """
    kinds = _kinds(type_)
    if type_.startswith(("list[float]", "tuple[float")) and value is not None:
        if not isinstance(value, (list, tuple)) or not all(map(is_number, value)):
            raise ValueError(f"{name} must be a list of numbers, got {value!r}")
        return
    if (value is None and "None" in kinds) or "str" in kinds:
        return
    if kinds & {"int", "float"} and not is_number(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if "bool" in kinds and not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    if (of := RENAMED.get(name, name)) in WHOLE_NUMBERS:
        check_whole(name, value, of)
    if "int" in kinds and "float" not in kinds and value % 1:
        raise ValueError(f"{name} must be a whole number, got {value!r}")


def check_value(stage: str, name: str, value: Setting) -> None:
    """Raises ValueError, one line, for a number or a word that the setting cannot be."""
    if is_number(value):
        positive = bool({name, f"{stage}.{name}"} & ABOVE_ZERO)
        least = "above 0" if positive else "0 or more"
        low = (value <= 0 if positive else value < 0) and name not in ANY_SIGN
        high = value == math.inf and name not in ENDLESS
        if name in SHARE:
            least += " and below 1" if name in BELOW_ONE else ", at most 1"
            high = value > 1 or value == 1 and name in BELOW_ONE
        if low or high or math.isnan(value):
            raise ValueError(f"{name} must be {least}, got {value!r}")
    words = WORDS.get(f"{stage}.{name}", WORDS.get(name))
    for word in value if isinstance(value, (list, tuple)) else [value]:
        if words and isinstance(word, str) and _in_step():
            check_choice(name, getattr(word, "value", word), words)


SETTINGS: dict[str, dict[str, str]] = read_table(__file__, "settings.json")
"""Fields of every trainer's config, and transformers' optimizers, with the versions they were read
from."""


@cache
def _installed(library: str) -> str:
    """The version of a library; that of the table where it is not installed."""
    try:
        return version(library)
    except PackageNotFoundError:
        return SETTINGS["versions"][library]


def _in_step() -> bool:
    """Whether the table is of the installed libraries."""
    return SETTINGS["versions"] == {name: _installed(name) for name in SETTINGS["versions"]}


def config_fields(stage: str) -> dict[str, str]:
    """Fields of a stage's config, each with its type as text.

    From the table where it has the stage and the installed libraries are its own, or none is
    installed, as in a web page; else from the config class itself, which takes seconds to import.
    """
    if not STAGES[stage].config:  # planned only: settings of a pass, and of sampling
        return config_fields("rloo") | dict.fromkeys(STAGES[stage].defaults, "int")
    if stage in SETTINGS and _in_step():
        return {**SETTINGS["common"], **SETTINGS[stage]}
    return {f.name: str(f.type) for f in fields(resolve(STAGES[stage].config)) if f.init}
