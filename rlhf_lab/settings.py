"""Settings of a stage: which names there are, of which types, checked without importing a trainer.

A name is a field of the stage's config (TRL's, or our PPOConfig), of TRL's ModelConfig (LoRA, 4
bits), or a plan's own (`cost/settings.yaml`). What a plan makes of it: `cost/fields.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from .cost.fields import CALLED, NOT_MODELLED, RENAMED, UNPLANNED, WHOLE_NUMBERS
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
    "use_dora": "use_dora",
}
"""LoRA's settings, named as TRL's ModelConfig names them → peft's LoraConfig."""


VALUES = read_table(__file__, "values.yaml")
NUMBERS = {name: span for span, names in VALUES["numbers"].items() for name in names.split()}
"""The interval that a setting is in, as text; of those that are not named `ANY_NUMBER`."""
ANY_NUMBER = "[0, inf)"
SHARE_OR_STEPS = frozenset(VALUES["share_or_steps"].split())
WITHIN_CONTEXT = frozenset(VALUES["within_context"].split())
WITHOUT_EFFECT = {
    stage: frozenset(names.split()) for stage, names in VALUES["without_effect"].items()
}
TWICE: dict[str, str] = VALUES["twice"]
"""Settings that libraries name twice → the name that the lab has for them."""
OF_INFERENCE = frozenset(VALUES["inference"].split())
PLANNED_ONLY = frozenset(VALUES["planned_only"].split())
"""Settings of a plan that change how a run would be made, and that `train` has at the defaults of
`Setup` only; the other ones describe the data, or choose rewards."""
WORDS: dict[str, tuple[str, ...]] = {k: tuple(v.split()) for k, v in VALUES["choices"].items()}
KEYS: dict[str, tuple[str, ...]] = {k: tuple(v.split()) for k, v in VALUES["keys"].items()}
NEEDS = [(term, needed) for needed, of in VALUES["needs"].items() for term in of.split()]
APART = [pair.split(",") for pair in VALUES["apart"].split()]
"""Pairs of terms (`_holds`): the first needs the second; only one of them may hold."""


OF_TOKENIZER = (
    "rows are tokens when the trainer gets them; change the tokenizer in the model's folder"
)
OF_ROWS = "rows come with prompts and answers, and the loss is that of the answers"
BY_LAYER = "layers are compiled by inductor (torch_compile=True)"
NOT_HONOURED = {
    "ddp_backend": "processes talk over nccl between GPUs, and over gloo between CPUs",
    "output_dir": "the run's folder is named by {}",
    "resume_from_checkpoint": "training goes on from the run in {} with {}",
    **dict.fromkeys(("eos_token", "pad_token", "chat_template_path"), OF_TOKENIZER),
    **dict.fromkeys(("dataset_text_field", "assistant_only_loss"), OF_ROWS),
    **dict.fromkeys(("torch_compile_backend", "torch_compile_mode"), BY_LAYER),
}
"""Fields of the trainers' configs that a run decides by itself → what to do instead."""


ROUTERS_SHARE = "router_aux_loss_coef"
"""of the loss, which TRL writes into a mixture's config"""
OF_MODEL = {"lora_r": 16}
"""What TRL's ModelConfig takes where nothing is given."""


def known_settings(stage: str) -> frozenset[str]:
    """Names that a plan of the stage may set."""
    own = frozenset(config_fields(stage)) | SETTINGS["model"].keys() | extra_settings(stage).keys()
    return own - {"model_name_or_path"}


def own_settings(stage: str, settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """Those of the settings that a stage has, and reads."""
    read = known_settings(stage) - WITHOUT_EFFECT.get(stage, frozenset())
    return {name: value for name, value in settings.items() if name in read}


def _stages_with(name: str) -> list[str]:
    """Stages that have the setting."""
    return [stage for stage in STAGES if name in known_settings(stage)]


def check_names(settings: Iterable[str], *stages: str) -> None:
    """Raises ValueError, one line, for a setting that none of the stages has."""
    known = frozenset[str]().union(*map(known_settings, stages))
    for name in settings:
        if name not in known:
            found = [
                STAGES[stage].config.partition(":")[2] or f"{stage}'s plan" for stage in stages
            ]
            configs, has = ", ".join(found), "has" if len(stages) == 1 else "have"
            ours, others = CALLED.get(name), _stages_with(name)
            hint = f"did you mean {ours!r}?" if ours in known else did_you_mean(name, known, 0.6)
            if (others or ours) and ours not in known:
                it = "it" if others or not ours else ours
                others = others or _stages_with(it)
                hint = f"{', '.join(others)} {'has' if len(others) == 1 else 'have'} {it}"
            if name in UNPLANNED:
                raise ValueError(f"{name} is not planned: {UNPLANNED[name]}")
            share = " (below 1 it is a share of all steps)" * ("'warmup_steps'" in hint)
            hint = f"; {hint.rstrip()}{share}".rstrip("; ")
            raise ValueError(f"{configs} {has} no setting {name!r}{hint}")


def check_settings(stage: str, settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """The settings that are fields of the stage's config, checked without importing it.

    Raises ValueError, one line, for a name that nobody has, for a value of another type, and for a
    setting that would have no effect.
    """
    check_names(settings, stage)
    _check_padding(stage, settings)
    own, types = config_fields(stage), _types_of(stage)
    for name, value in settings.items():
        if name in WITHOUT_EFFECT.get(stage, ()) and value not in (None, False, "", [], {}):
            raise ValueError(f"{name} has no effect in {STAGES[stage].title}: leave it out")
        if name in NOT_HONOURED and value not in (None, False):
            words = by_surface("out", "--out"), by_surface("resume=True", "--resume")
            raise ValueError(f"{name} has no effect here: {NOT_HONOURED[name].format(*words)}")
        if name == "torch_compile":
            _check_compiled(value, settings, stage)
            continue
        _check_type(name, value, types.get(name, ""))
        check_value(stage, name, value)
        _check_keys(name, value)
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
    _check_together(stage, settings)
    return as_floats({name: value for name, value in settings.items() if name in own})


def as_floats(settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """The settings; a whole number that TRL writes into a model's config, which takes floats alone,
    as a float."""
    return {
        k: float(v) if k == ROUTERS_SHARE and type(v) is int else v for k, v in settings.items()
    }


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
    if not isinstance(value, bool) and value != "auto":  # 1 == True
        raise ValueError(f"torch_compile must be True, False or 'auto', got {value!r}")
    for name in ("load_in_4bit", "load_in_8bit", "use_liger_kernel"):
        if value and settings.get(name):
            raise ValueError(f"torch_compile does not go with {name}: leave one of them out")


def unplannable(stage: str, settings: Mapping[str, object]) -> str | None:
    """A setting that can be planned and that `train` does not do from here; None where all can."""
    planned_only = PLANNED_ONLY
    # Of PPO's layouts the one with one base, which may be in 4 bits.
    if stage == "ppo" and settings.get("layout") != "adapters":
        planned_only |= {"load_in_4bit", "use_bnb_nested_quant"}
    if settings.get("load_in_4bit") and not settings.get("lora_r"):
        return "load_in_4bit trains adapters only: set lora_r, for example 16"
    plain = {f.name: f.default for f in fields(Setup)}
    for name, value in settings.items():
        asks = value not in (plain.get(name), None, False, [], (), {}, "main")
        if name in planned_only and asks:
            if name == "load_in_4bit":
                return "load_in_4bit: PPO trains one base in 4 bits alone: set layout=adapters"
            if name in NOT_MODELLED:
                return f"{name}={value!r} is not trained yet, and not modelled in plans"
            return f"{name}={value!r} is planned only: train() does not do it yet"
    return None


PACKAGES = {"use_liger_kernel": "liger-kernel", "use_vllm": "vllm", "load_in_8bit": "bitsandbytes"}
"""Settings that train with a package that need not be there."""
OF_OPTIMIZER = {name: of for of, names in VALUES["optimizers"].items() for name in names.split()}
"""Optimizers → what they are imported from."""


def check_packages(settings: Mapping[str, Setting]) -> None:
    """Raises ValueError, one line, for a setting whose package is not installed."""
    for name, package in PACKAGES.items():
        if settings.get(name) and find_spec(package.replace("-", "_")) is None:
            raise ValueError(f"{name} needs {package}: pip install {package}")
    optimizer = str(getattr(optim := settings.get("optim"), "value", optim))
    if (module := OF_OPTIMIZER.get(optimizer, "")) and find_spec(module) is None:
        raise ValueError(
            f"optim={optimizer!r} needs the package that is imported as {module}, which is not "
            "installed: install it, or choose another"
        )


SETUP_TYPES = {
    {v: k for k, v in RENAMED.items()}.get(f.name, f.name): str(f.type) for f in fields(Setup)
} | {"concurrency": "int"}
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
    whole = (of := RENAMED.get(name, name)) in WHOLE_NUMBERS
    if (value is None and "None" in kinds and not whole) or "str" in kinds:
        return
    if kinds & {"int", "float"} and not is_number(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if "bool" in kinds and not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    if whole:
        check_whole(name, value, of)
    if "int" in kinds and "float" not in kinds and value % 1:
        raise ValueError(f"{name} must be a whole number, got {value!r}")


def check_value(stage: str, name: str, value: Setting) -> None:
    """Raises ValueError, one line, for a number or a word that the setting cannot be."""
    if is_number(value):
        span = NUMBERS.get(f"{stage}.{name}", NUMBERS.get(name, ANY_NUMBER))
        low, high = span[1:-1].split(", ")
        above = value > float(low) or span[0] == "[" and value == float(low)
        if not above or not (value < float(high) or span[-1] == "]" and value == float(high)):
            raise ValueError(f"{name} must be {_in_words(span)}, got {value!r}")
        if name in SHARE_OR_STEPS and value > 1 and value % 1:
            raise ValueError(
                f"{name} must be a share of all steps, below 1, or a whole number of steps, "
                f"got {value!r}"
            )
    words = WORDS.get(f"{stage}.{name}", WORDS.get(name))
    found = value.split() if name == "debug" and isinstance(value, str) else value
    for word in found if isinstance(found, (list, tuple)) else [found]:
        if words and isinstance(word, str) and _in_step():
            check_choice(name, getattr(word, "value", word), words)


def _check_keys(name: str, value: Setting) -> None:
    """Raises ValueError, one line, for a dict with a key that transformers does not know."""
    if (keys := KEYS.get(name)) and value is not None and _in_step():
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} must be a dict of {', '.join(keys)}, got {value!r}")
        for key in value:
            check_choice(f"a key of {name}", key, keys)


def _in_words(span: str) -> str:
    """ "[0, 1)" → 0 or more, below 1."""
    low, high = span[1:-1].split(", ")
    least = f"above {low}" if span[0] == "(" else f"{low} or more"
    most = f"below {high}" if span[-1] == ")" else f"at most {high}"
    known = [least] * (low != "-inf") + [most] * (high != "inf")
    return ", ".join(known) or "a finite number"


def _parts(term: str, stage: str) -> tuple[str, str, list[str]]:
    """A term as name, "=" or "", and values; "" for a name of another stage ("kto.beta")."""
    name, equals, values = term.partition("=")
    of, _, name = name.rpartition(".")
    return name if of in ("", stage) else "", equals, values.split("|") if equals else []


def _holds(term: str, stage: str, settings: Mapping[str, Setting]) -> bool:
    """Whether a term of `needs` or `apart` (`values.yaml`) is true of the settings."""
    name, equals, values = _parts(term, stage)
    if not name or name not in settings:
        return bool(name) and "" in values
    value = settings[name]
    if not equals:
        return bool(value)
    given = value if isinstance(value, (list, tuple)) else [value]
    return any((f"{v:g}" if is_number(v) else str(getattr(v, "value", v))) in values for v in given)


def without_moot(
    stage: str, settings: dict[str, Setting], given: frozenset[str]
) -> dict[str, Setting]:
    """The settings less those that nobody gave and that do nothing beside those `given`, or do not
    go with them."""
    moot = {
        _parts(term, stage)[0]
        for term, needed in NEEDS
        if _holds(term, stage, settings) and not _holds(needed, stage, settings)
    }
    for pair in APART:
        if all(_holds(term, stage, settings) for term in pair):
            moot |= {_parts(term, stage)[0] for term in pair}
    return {k: v for k, v in settings.items() if k in given or k not in moot}


def _check_together(stage: str, settings: Mapping[str, Setting]) -> None:
    """Raises ValueError, one line, for a setting without another one that it needs, or with one
    that it does not go with."""
    known = known_settings(stage)

    def as_given(term: str) -> str:
        name, equals, values = _parts(term, stage)
        if name not in settings:
            return f"{name}={' or '.join(filter(None, values))}"
        return name if settings[name] is True else f"{name}={settings[name]!r}"

    for term, needed in NEEDS:
        if needed.partition("=")[0] in known and _holds(term, stage, settings):
            if not _holds(needed, stage, settings):
                other, equals, values = _parts(needed, stage)
                one_of = f"{equals}{' or '.join(filter(None, values))}"
                name = _parts(term, stage)[0]
                raise ValueError(
                    f"{as_given(term)} needs {other}{one_of}: set both, or leave {name} out"
                )
    for pair in APART:
        if all(_holds(term, stage, settings) for term in pair):
            raise ValueError(f"{' and '.join(map(as_given, pair))}: choose one")
    alone = _holds("per_device_train_batch_size=1", stage, settings)
    if stage == "kto" and alone and _holds("loss_type=|kto", stage, settings):
        raise ValueError(
            "per_device_train_batch_size=1: KTO takes its KL from the other answers of a batch, so "
            "TRL wants 2 or more; or choose loss_type='apo_zero_unpaired'"
        )
    weights, losses = settings.get("loss_weights"), settings.get("loss_type", "")
    if weights is not None and len(weights) != (n := 1 if isinstance(losses, str) else len(losses)):
        raise ValueError(f"loss_weights={weights!r}: give {n}, one for each loss_type")


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
        own = {n: t for n, t in config_fields("rloo").items() if n in OF_INFERENCE}
        return own | dict.fromkeys(STAGES[stage].defaults, "int")
    if stage in SETTINGS and _in_step():
        return {**SETTINGS["common"], **SETTINGS[stage]}
    return {f.name: str(f.type) for f in fields(resolve(STAGES[stage].config)) if f.init}
