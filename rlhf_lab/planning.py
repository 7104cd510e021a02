"""Plan a stage: the model, the hardware and the settings, checked once, and what they will cost.

    plan = lab.plan("ppo", "tiny", kl_coef=0.1)
    plan.estimate, plan.peak, plan.fits, plan.cheaper()

A plan holds everything that training it needs to know; the x-ray and the run use exactly that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from .cost.estimate import Estimate, estimate
from .cost.hardware import Hardware
from .cost.hardware import hardware as find_hardware
from .cost.setup import EXTRA, Setup
from .data.lengths import planned_lengths
from .data.load import Data, load_data
from .data.reward_sources import reward_settings
from .defaults import defaults
from .display import by_surface, did_you_mean, is_number
from .models.load import ADAPTER_FILE, BUNDLED, Model, load
from .runs.ledger import Ledger
from .stages import ONLINE, STAGES, TRAINABLE, Setting, Settings, resolve

if TYPE_CHECKING:
    from .cost.remedies import Remedy
    from .display import Display, Listed

TrainerArgs: TypeAlias = Setting
"""A stage's own config class, which differs from stage to stage."""

LORA = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
}
"""LoRA's settings, named as TRL's ModelConfig names them → peft's LoraConfig."""


POSITIVE = frozenset(
    "learning_rate per_device_train_batch_size per_device_eval_batch_size max_length lora_r "
    "gradient_accumulation_steps num_train_epochs num_ppo_epochs num_mini_batches num_generations "
    "num_iterations steps_per_generation local_rollout_forward_batch_size".split()
)
"""Settings that make no sense at 0 or below, and that the trainers do not all check."""


@dataclass(frozen=True)
class Plan:
    """A stage, a model, hardware and settings: everything that `train` needs to know."""

    stage: str
    model: Model
    hardware: Hardware | str = "here"
    settings: Settings = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where a setting comes from that nobody gave and that is not the lab's own."""

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in sorted(self.settings.items()))
        head = f"{self.stage!r}, {self.model.name!r}, hardware={self.hardware_name!r}"
        return f"Plan({head}, {settings})"

    def _repr_html_(self) -> str:
        from .display import escape, html_table

        head = escape(f"{self.stage} of {self.model.name}, hardware: {self.hardware_name}")
        rows = [{"setting": k, "value": str(v)} for k, v in sorted(self.settings.items())]
        return f"<p>{head}</p>{html_table(rows)}"

    @property
    def hardware_name(self) -> str:
        """The device's name, as it was given."""
        return self.hardware if isinstance(self.hardware, str) else self.hardware.name

    # ------------------------------------------------------------------------- what it will cost

    @cached_property
    def estimate(self) -> Estimate:
        """The prediction: memory, FLOPs, time, money (`cost/estimate.py`)."""
        return predict(self)

    @property
    def ledger(self) -> Ledger:
        """The prediction as rows."""
        return self.estimate.ledger

    @property
    def peak(self) -> float:
        """Predicted bytes of the worst moment on one device."""
        return self.estimate.peak

    @property
    def fits(self) -> bool:
        """Whether the prediction fits the hardware's memory."""
        return self.estimate.fits

    def cheaper(self) -> Listed[Remedy]:
        """Changes that make it fit, or cheaper, the best first, as a table to read."""
        from .charts.estimate import remedy_rows
        from .cost.remedies import remedies
        from .display import Listed

        return Listed(remedies(self.estimate), remedy_rows)

    def accelerate_config(self) -> str:
        """YAML for `accelerate launch --config_file` that realises the plan."""
        from .launch.accelerate_config import accelerate_config

        return accelerate_config(self.estimate.setup)

    def show(self) -> Display:
        """The prediction, to read in a notebook or a terminal."""
        from .charts.estimate import parts, text
        from .display import Display, escape

        note = self.defaults_note
        lines = [f"<p>{escape(note)}</p>"] * bool(note)
        return Display(f"{text(self.estimate)}\n{note}".rstrip(), *parts(self.estimate), *lines)

    @property
    def defaults_note(self) -> str:
        """Defaults that were chosen for the model's size or this machine, with their sources, as a
        line; "" where all are the lab's own or yours."""
        by_source: dict[str, list[str]] = {}
        for name, source in self.sources.items():
            by_source.setdefault(source, []).append(f"{name}={self.settings[name]:g}")
        parts = [f"{', '.join(names)} ({source})" for source, names in by_source.items()]
        return f"defaults for {self.model.name}: {'; '.join(parts)}" * bool(parts)

    @cached_property
    def trainer_settings(self) -> dict[str, Setting]:
        """The settings that are fields of the trainer's config (`check_settings`)."""
        return check_settings(self.stage, self.settings)

    def config(self, output_dir: str = "unused") -> TrainerArgs:
        """The trainer's own settings object. Raises ValueError naming a setting it lacks."""
        settings, spec = self.trainer_settings, STAGES[self.stage]
        if spec.trainer:  # one of TRL's
            from .trainers.trl import trl_settings

            settings = trl_settings(settings, output_dir)
        else:
            from .models.device import device_settings

            settings = {**device_settings(settings), **settings}
        return resolve(spec.config)(**{**settings, "output_dir": output_dir})

    @property
    def lora(self) -> dict[str, Setting]:
        """The arguments of peft's LoraConfig; {} where the whole model is trained."""
        if not self.settings.get("lora_r"):
            return {}
        given = {LORA[name]: self.settings[name] for name in LORA if name in self.settings}
        return {"target_modules": "all-linear", "lora_alpha": 2 * given["r"]} | given


def plan(
    stage: str,
    model: str | Path | Model = "tiny",
    *,
    hardware: Hardware | str = "here",
    data: Data | str | Path | None = None,
    **settings: Setting,
) -> Plan:
    """Plan a stage for a model: defaults by its size (`defaults.py`), then your settings.

    `stage`: a name of `stages.STAGES`; inference (prefill and decode) is planned only. Settings
    are the fields of TRL's config of that stage, for PPO of our PPOConfig; `lora_r=16` trains LoRA
    adapters instead of the whole model (`LORA`); what is no trainer's
    (lengths, GPUs, sharding, `rewards`, …) is in `cost/settings.yaml`. `hardware`: a name of the
    catalogue, a Hardware, or "here". With `data` the lengths and the number of rows are those of
    the data. No weights are loaded. Raises ValueError for an unknown stage, model or device.
    """
    if stage not in STAGES:
        hint = did_you_mean(stage, STAGES)
        raise ValueError(f"no stage {stage!r}; {hint}choose from {', '.join(STAGES)}")
    handle, settings = load(model), _one_length(stage, settings)
    find_hardware(hardware)
    taken, sources = defaults(stage, handle, hardware, settings)
    taken = {**taken, **settings, **reward_settings(settings)}
    if {"rows", "num_train_epochs", "total_episodes"} & settings.keys() - {"max_steps"}:
        taken["max_steps"] = settings.get("max_steps", -1)  # not the lab's own number of steps
    if data is not None:
        found = planned_lengths(stage, handle, load_data(data), taken)
        taken = {**found, **taken}
    return Plan(stage, handle, hardware, taken, sources)


def _one_length(stage: str, settings: dict[str, Setting]) -> dict[str, Setting]:
    """TRL's name of the longest response as ours."""
    if not STAGES[stage].groups or "max_completion_length" not in settings:
        return settings
    if "response_length" in settings:
        raise ValueError("response_length is max_completion_length: say one of them")
    rest = {k: v for k, v in settings.items() if k != "max_completion_length"}
    return {**rest, "response_length": settings["max_completion_length"]}


OF_TOKENIZER = (
    "rows are tokens when the trainer gets them; change the tokenizer in the model's folder"
)
OF_ROWS = "rows come with prompts and answers, and the loss is that of the answers"
NOT_HONOURED = {
    "output_dir": "the run's folder is named by {}",
    "resume_from_checkpoint": "PPO goes on from the run in {} with {}, no other stage can",
    **dict.fromkeys(("eos_token", "pad_token", "chat_template_path"), OF_TOKENIZER),
    **dict.fromkeys(("dataset_text_field", "assistant_only_loss"), OF_ROWS),
}
"""Fields of the trainers' configs that a run decides by itself → what to do instead."""


def known_settings(stage: str) -> frozenset[str]:
    """Names that a plan of the stage may set."""
    return frozenset(config_fields(stage)) | LORA.keys() | EXTRA.keys()


def check_names(settings: Iterable[str], *stages: str) -> None:
    """Raises ValueError, one line, for a setting that none of the stages has."""
    known = frozenset[str]().union(*map(known_settings, stages))
    for name in settings:
        if name not in known:
            configs = ", ".join(STAGES[stage].config.partition(":")[2] for stage in stages)
            has = "has" if len(stages) == 1 else "have"
            hint = f"; {did_you_mean(name, known)}".rstrip("; ")
            raise ValueError(f"{configs} {has} no setting {name!r}{hint}")


def check_settings(stage: str, settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """The settings that are fields of the stage's config, checked without importing it.

    Raises ValueError, one line, for a name that nobody has, for a value of another type, and for a
    setting that training would not honour.
    """
    if not STAGES[stage].trainable:
        raise ValueError(f"{stage} is planned only; to train, choose from {', '.join(TRAINABLE)}")
    check_names(settings, stage)
    own = config_fields(stage)
    for name, value in settings.items():
        if name in NOT_HONOURED:
            words = by_surface("out", "--out"), by_surface("resume=True", "--resume")
            raise ValueError(f"{name} has no effect here: {NOT_HONOURED[name].format(*words)}")
        _check_type(name, value, "int" if name == "lora_r" else own.get(name, ""))
    return {name: value for name, value in settings.items() if name in own}


def _check_type(name: str, value: Setting, type_: str) -> None:
    """Numbers are numbers and switches are switches: the trainers find out much later.

    `type_`: the field's annotation as text; "" is not checked.
    """
    kinds = set(re.findall(r"\w+", type_))
    if type_.startswith("list[float]") and value is not None:
        if not isinstance(value, (list, tuple)) or not all(map(is_number, value)):
            raise ValueError(f"{name} must be a list of numbers, got {value!r}")
        return
    if (value is None and "None" in kinds) or "str" in kinds:
        return
    if kinds & {"int", "float"} and not is_number(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if "bool" in kinds and not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    if name in POSITIVE and not 0 < value < float("inf"):
        raise ValueError(f"{name} must be above 0, got {value!r}")


SETTINGS: dict[str, dict[str, str]] = json.loads(
    Path(__file__).with_name("settings.json").read_text("utf-8")
)
"""Fields of every trainer's config, with the versions they were read from."""


def config_fields(stage: str) -> dict[str, str]:
    """Fields of a stage's config, each with its type as text.

    From the table where it has the stage and the installed libraries are its own; else from the
    config class itself, which takes seconds to import.
    """
    here = {name: version(name) for name in SETTINGS["versions"]}
    if stage in SETTINGS and SETTINGS["versions"] == here:
        return {**SETTINGS["common"], **SETTINGS[stage]}
    return {f.name: str(f.type) for f in fields(resolve(STAGES[stage].config)) if f.init}


# --------------------------------------------------------------------------------- prediction


STORY_SETTINGS = (
    *("per_device_train_batch_size", "response_length", "max_length", "num_mini_batches"),
    *("gradient_accumulation_steps", "steps_per_generation"),
)
"""What the lengths of a plan for the bundled data depend on."""


def predict(plan: Plan, data: Data | None = None) -> Estimate:
    """The prediction of a plan, for rows as long as those of `data` (a `Data`).

    Without data, and without a length in its settings, a bundled model is planned for the bundled
    stories; another for rows as long as `max_length` or its context.
    """
    model, settings = plan.model, dict(plan.settings)
    if "prompt_length" not in settings and data is not None:
        settings = {**planned_lengths(plan.stage, model, data, settings), **settings}
    elif "prompt_length" not in settings and model.name in BUNDLED:
        known = {name: settings[name] for name in STORY_SETTINGS if name in settings}
        settings = {**_story_lengths(plan.stage, model.name, **known), **settings}
    roles = {}
    learned = plan.stage in ONLINE and not settings.get("rule_reward")
    if learned and settings.get("layout") == "adapters" and "reward_adapter" in model.paths:
        settings |= _adapter_rank(model.paths["reward_adapter"])
    elif learned and "reward" in model.paths:
        roles["reward"] = model.config_dict("reward")
        if plan.stage == "ppo":  # the value model starts on the SFT model where it has to
            roles["value"] = model.config_dict("sft" if model.foreign_reward else "reward")
    return estimate(plan.stage, model.config_dict(), plan.hardware, settings, **roles)


def _adapter_rank(folder: str) -> dict[str, object]:
    """What the plan must know of a reward adapter, like which the value adapter is made."""
    config = json.loads((Path(folder) / ADAPTER_FILE).read_text())
    rank, targets = config["r"], config["target_modules"]
    matrices = tuple(targets) if isinstance(targets, list) else targets
    return {"critic_lora_r": rank, "critic_lora_targets": matrices}


def predicted(plan: Plan, data: Data | None, quiet: bool = True) -> Ledger:
    """The prediction's rows; none, and unless `quiet` a line that says why, for what the cost model
    does not know: a run is worth having without."""
    try:
        return predict(plan, data).ledger
    except ValueError as error:
        if not quiet:
            print(f"{plan.stage}: no prediction ({error})", flush=True)
        return Ledger()


@cache
def _story_lengths(stage: str, model: str, **settings: Setting) -> dict[str, float]:
    """Lengths of the bundled data, looked up once."""
    return planned_lengths(stage, load(model), load_data("stories"), settings)


PLANNED_ONLY = frozenset(
    "gpus nodes sharding offload tensor_parallel dtype attn_implementation adapter_dtype loss "
    "pairs_together samples_per_prompt ema joint_update".split()
)
"""Settings of `EXTRA` that change how a run would be made, and that `train` has at the defaults of
`Setup` only; the other ones describe the data, or choose rewards."""


def unplannable(settings: Mapping[str, object]) -> str | None:
    """A setting that can be planned and that `train` does not do from here; None where all can."""
    planned_only = PLANNED_ONLY
    if settings.get("layout") != "adapters":  # one base that may be in 4 bits
        planned_only |= {"load_in_4bit", "use_bnb_nested_quant"}
    plain = {f.name: f.default for f in fields(Setup)}
    for name, value in settings.items():
        if name in planned_only and value != plain[name]:
            return f"{name}={value!r} is planned only: train() does not do it yet"
    return None
