"""Plan a stage: the model, the hardware and the settings, checked once, and what they will cost.

    plan = lab.plan("ppo", "tiny", kl_coef=0.1)
    plan.estimate, plan.peak, plan.fits, plan.cheaper()

A plan holds everything that training it needs to know; the x-ray and the run use exactly that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from .cost.assumptions import LENGTHS, Assumption, assumptions
from .cost.assumptions import head as assumption_lines
from .cost.estimate import Estimate, estimate
from .cost.fields import not_modelled
from .cost.hardware import Hardware
from .cost.hardware import hardware as find_hardware
from .cost.setup import CannotBe
from .defaults import defaults
from .display import by_surface, check_choice
from .models.load import ADAPTER_FILE, BUNDLED, Model, load, presets
from .models.structure import not_loaded
from .runs.ledger import Ledger
from .settings import (
    LORA,
    OF_MODEL,
    TWICE,
    WITHIN_CONTEXT,
    as_whole,
    check_packages,
    check_settings,
    known_settings,
    unplannable,
    without_moot,
)
from .settings_of_model import check_targets, small_weights
from .stages import ONLINE, REWARDED, STAGES, TRAINABLE, Setting, Settings, resolve

if TYPE_CHECKING:
    from .cost.remedies import Remedy
    from .data.load import Data
    from .display import Display, Listed

TrainerArgs: TypeAlias = Setting
"""A stage's own config class, which differs from stage to stage."""

TEACHER = "small"
"""The teacher of the other bundled models, where none is given."""
UNKNOWN = "no prediction"
LABS = "the lab's"
LENGTH_FLAGS = "--prompt-length, --response-length"


@dataclass(frozen=True)
class Plan:
    """A stage, a model, hardware and settings: everything that `train` needs to know."""

    stage: str
    model: Model
    hardware: Hardware | str = "here"
    settings: Settings = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where a setting comes from that nobody gave and that is not the lab's own."""
    given: frozenset[str] = frozenset()
    """Names of the settings that are yours."""
    notes: tuple[str, ...] = ()
    """What was left aside before the plan was made."""

    @property
    def _shown(self) -> list[tuple[str, Setting]]:
        """Names and values of other models and settings."""
        return sorted({**self.model.others, **self.settings}.items())

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self._shown)
        head = f"{self.stage!r}, {self.model.name!r}, hardware={self.hardware_name!r}"
        return f"Plan({head}, {settings})"

    def __str__(self) -> str:
        """The same by where settings come from, a line each."""
        by_source: dict[str, list[str]] = {"yours": [], LABS: []}
        for name, value in self._shown:
            shown = f"{value:.6g}" if isinstance(value, float) else repr(value)
            by_source.setdefault(self._from(name), []).append(f"{name}={shown}")
        head = f"{self.stage} of {self.model.name}, hardware: {self.hardware_name}"
        lines = [f"{source}: {', '.join(named)}" for source, named in by_source.items() if named]
        rest = STAGES[self.stage].config.rpartition(":")[2]
        return "\n".join([head, *lines, *[f"the rest: defaults of {rest}"] * bool(rest)])

    def _from(self, name: str) -> str:
        """Where a setting comes from."""
        if name in self.given | self.model.others.keys():
            return "yours"
        of_data = name.startswith(("padded_", "mean_")) or name in ("prompt_length", "rows")
        own = "of your data" if of_data and name not in STAGES[self.stage].defaults else LABS
        return self.sources.get(name, own)

    def _repr_html_(self) -> str:
        from .display import escape, html_table

        head = escape(str(self).partition("\n")[0])
        rows = [{"setting": k, "value": str(v), "from": self._from(k)} for k, v in self._shown]
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

        return accelerate_config(self.estimate.setup, self.estimate.hardware.kind)

    def trl_config(self) -> str:
        """YAML for TRL's command line (`trl sft --config FILE`, …)."""
        from .launch.trl_config import trl_config

        settings = dict(self.settings)
        if "teacher" in self.model.paths:
            settings["teacher_model_name_or_path"] = self.model.paths["teacher"]
        if "torch_compile" in settings:  # TRL knows no "auto"
            settings["torch_compile"] = self.estimate.compiles[0]
        return trl_config(self.stage, self.model.name, settings, self.estimate.setup)

    def show(self) -> Display:
        """The prediction, to read in a notebook or a terminal."""
        from .charts.estimate import parts, text
        from .display import Display, escape

        head = [*self.warnings, *assumption_lines(self.assumptions)]
        lines, note = [f"<p>{escape(line)}</p>" for line in head], self.defaults_note
        (summary, *rest), below = parts(self.estimate), [f"<p>{escape(note)}</p>"] * bool(note)
        whole = "\n".join([*head, text(self.estimate), note]).rstrip()
        return Display(whole, "".join([*lines, summary]), *rest, *below)

    @cached_property
    def warnings(self) -> list[str]:
        """What is not as it looks: settings that are not modelled, defaults that mislead."""
        on_cpu = find_hardware(self.hardware).kind == "cpu"
        settings = {k: v for k, v in self.settings.items() if k != "use_cpu" or not on_cpu}
        found = [*self.notes, *not_modelled(settings)]
        if STAGES[self.stage].trainable and (line := not_loaded(self.model.config_dict())):
            found.insert(0, line)
        if on_cpu and self.stage == "ppo" and settings.get("use_vllm"):
            found.append("not modelled: use_vllm on a CPU, which would change memory and time")
        try:
            _ = self.estimate.peak
            return [*found, *self.estimate.caveats, *self._misleading()]
        except ValueError as error:  # it can be trained, and not planned
            return [*found, f"{UNKNOWN} ({error})"]

    def _misleading(self) -> Iterator[str]:
        if self._lengths == "default" and "rows" in self.given:
            s, give = self.estimate.setup, ("prompt_length=, response_length=", LENGTH_FLAGS)
            yield (
                f"rows of {s.prompt} + {s.response} tokens are a default, not yours: give "
                f"{by_surface(*give)}"
            )

    @property
    def _lengths(self) -> str:
        """Where the lengths of rows come from, before they are packed."""
        if {"prompt_length", "response_length"} <= self.given:
            return "yours"
        if "prompt_length" in self.settings and "prompt_length" not in self.given:
            return "of your data"
        return "of the bundled stories" if self.model.name in BUNDLED else "default"

    @property
    def assumptions(self) -> list[Assumption]:
        """Sizes, precision and settings that the prediction stands on, and which are yours."""
        if self.settings.get("packing"):  # rows as long as max_length, made of yours
            return assumptions(self.estimate, self.given - {*LENGTHS}, f"packed, {self._lengths}")
        return assumptions(self.estimate, self.given, self._lengths)

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
        if not STAGES[self.stage].trainable:
            trained = ", ".join(TRAINABLE)
            raise ValueError(f"{self.stage} is planned only; to train, choose from {trained}")
        return check_settings(self.stage, self.settings)

    def config(self, output_dir: str = "unused") -> TrainerArgs:
        """The trainer's own settings object. Raises ValueError naming a setting it lacks."""
        from .models.device import device_settings, quiet_checkpointing

        # Layers are compiled by ourselves; transformers would compile whole models.
        settings, spec = {**self.trainer_settings}, STAGES[self.stage]
        compiled = settings.pop("torch_compile", False) is True
        quiet_checkpointing()
        if spec.trainer:  # one of TRL's
            from .trainers.trl import trl_settings

            settings = trl_settings(settings, output_dir)
        else:
            settings = {**device_settings(settings), **settings, "torch_compile": compiled}
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
    reward_model: str | Path | Model | None = None,
    value_model: str | Path | Model | None = None,
    teacher_model: str | Path | Model | None = None,
    draft_model: str | Path | Model | None = None,
    **settings: Setting,
) -> Plan:
    """Plan a stage for a model: defaults by its size (`defaults.py`), then your settings.

    `stage`: a name of `stages.STAGES`; inference (prefill and decode) is planned only. Settings
    are the fields of TRL's config of that stage, for PPO of our PPOConfig; `lora_r=16` trains LoRA
    adapters instead of the whole model (`LORA`); what is no trainer's
    (lengths, GPUs, sharding, `rewards`, …) is in `cost/settings.yaml`. `hardware`: a name of the
    catalogue, a file of figures, a Hardware, or "here". With `data` the lengths and the number of
    rows are those of the data. `reward_model`, `value_model`: of another kind or size (stages with
    rewards; the value model is PPO's). `teacher_model`: what a student is distilled from [of a
    bundled model: small]. `draft_model`: guesses tokens ahead, of which the model keeps the share
    `accepted` (inference). No weights are loaded. Raises ValueError for an unknown stage, model or
    device.
    """
    check_choice("stage", stage, STAGES)
    settings = as_whole(stage, _own_names(stage, settings))
    check_settings(stage, settings)
    trusted = bool(settings.pop("trust_remote_code", False))
    handle = load(model, trust_remote_code=trusted)
    if trusted and isinstance(model, Model) and not model.trust_remote_code:
        raise ValueError("trust_remote_code: say it where the model is loaded, to lab.load")
    named = settings.pop("teacher_model_name_or_path", None)  # TRL's name for the same
    teacher = teacher_model or named
    if stage == "distill" and teacher is None and "teacher" not in handle.paths:
        teacher = TEACHER if handle.name in BUNDLED and handle.name != TEACHER else None
    if stage != "reward":
        handle.check_writes(STAGES[stage].trainable)
    others = {"reward": reward_model, "value": value_model, "teacher": teacher}
    others["draft"] = draft_model
    for role, other in others.items():
        if other is not None:
            if role not in STAGES[stage].roles or stage == "reward":
                raise ValueError(f"{stage} has no {role} model: leave {role}_model out")
            theirs = load(other, trust_remote_code=trusted)
            trained = "sft" if role in ("teacher", "draft") else "reward"
            if trained == "sft":
                theirs.check_writes(STAGES[stage].trainable)
            theirs.config_dict(trained)  # where there is nobody to ask, that is said now
            handle = handle.with_stage(role, theirs.paths.get(trained, theirs.paths["base"]))
    find_hardware(hardware)
    _check_lengths(stage, settings)
    check_targets(handle.config_dict(), settings)
    given = frozenset(settings) | ({"teacher_model"} if teacher_model or named else set())
    taken, sources = defaults(stage, handle, hardware, settings)
    if "draft" in handle.paths:
        kept = settings.get("accepted")
        if kept is None or not 0 <= kept <= 1:
            raise ValueError(f"accepted={kept}: say which share of its tokens is kept, 0 to 1")
        taken["per_device_train_batch_size"] = 1  # transformers decodes one request at a time
    elif {"accepted", "num_assistant_tokens"} & settings.keys():
        raise ValueError("accepted and num_assistant_tokens are of a draft: give draft_model")
    taken = without_moot(stage, {**taken, **settings}, given)
    if stage not in ONLINE and "max_length" in taken and "max_length" not in given:
        taken["max_length"] = max(taken["max_length"], _whole(settings))  # or it would cut yours
    if "rewards" in settings:
        from .data.reward_sources import reward_settings

        taken |= reward_settings(settings)
    if stage == "ppo" and "num_mini_batches" not in given:
        taken["num_mini_batches"] = _minibatches(taken)
    if {"rows", "num_train_epochs", "total_episodes"} & settings.keys() - {"max_steps"}:
        taken["max_steps"] = settings.get("max_steps", -1)  # not the lab's own number of steps
    taken |= small_weights(stage, handle, settings)
    if data is not None:
        from .data.lengths import planned_lengths
        from .data.load import load_data

        taken = {**planned_lengths(stage, handle, load_data(data), taken), **taken}
    made = Plan(stage, handle, hardware, taken, sources, given)
    try:
        context = made.estimate.setup.model.context
    except ValueError as error:  # it may be trained, and not planned
        if isinstance(error, CannotBe) or not STAGES[stage].trainable or unplannable(stage, taken):
            raise
        check_packages({"optim": taken.get("optim")})
        return made
    for name in sorted(WITHIN_CONTEXT & given):
        if (asked := settings[name] or 0) > context and asked > handle.context:
            raise ValueError(f"{name}={asked}: {handle.name} reads {handle.context} tokens")
    return made


def _own_names(stage: str, settings: dict[str, Setting]) -> dict[str, Setting]:
    """Settings that TRL names twice, under the name that the lab has for them."""
    rest = dict(settings)
    for name in TWICE.keys() & rest.keys() & known_settings(stage):
        if (ours := TWICE[name]) in rest:
            raise ValueError(f"{ours} is {name}: say one of them")
        rest[ours] = rest.pop(name)
    if "use_peft" in rest:
        if rest.pop("use_peft"):
            rest.setdefault("lora_r", OF_MODEL["lora_r"])
        elif rest.get("lora_r"):
            raise ValueError(f"use_peft=False and lora_r={rest['lora_r']}: say one of them")
    return rest


def _check_lengths(stage: str, settings: Settings) -> None:
    """Raises ValueError, one line, for rows that their `max_length` would cut."""
    longest, whole = settings.get("max_length"), _whole(settings)
    if longest is not None and stage not in ONLINE and whole > longest:
        raise ValueError(
            f"rows of {whole} tokens (prompt_length + response_length) are cut at "
            f"max_length={longest}: say one of them"
        )


def _whole(settings: Settings) -> int:
    """Tokens of a row of the lengths given; 0 where none is."""
    return int(settings.get("prompt_length", 0) + settings.get("response_length", 0))


def _minibatches(settings: Settings) -> int:
    """The lab's number of minibatches, or as many as the rollout's batch can be split into."""
    passes = settings.get("steps_per_generation") or settings.get("gradient_accumulation_steps", 1)
    return math.gcd(settings["per_device_train_batch_size"] * passes, settings["num_mini_batches"])


# --------------------------------------------------------------------------------- prediction


def predict(plan: Plan, data: Data | None = None) -> Estimate:
    """The prediction of a plan, for rows as long as those of `data` (a `Data`).

    Without data, and without a length in its settings, a bundled model is planned for the bundled
    stories; another for rows as long as `max_length` or its context.
    """
    model, settings = plan.model, dict(plan.settings)
    if data is not None and data.name == "stories" and model.name in BUNDLED:
        if data.annotator is not None and not data.annotator.seed:  # of which lengths are known
            data = None
    if "prompt_length" not in settings and data is not None:
        from .data.lengths import planned_lengths

        settings = {**planned_lengths(plan.stage, model, data, settings), **settings}
    elif "prompt_length" not in settings and model.name in BUNDLED:
        from .data.lengths import of_stories

        settings = {**of_stories(plan.stage, model, settings), **settings}
    roles = {}
    learned = plan.stage in REWARDED and not settings.get("rule_reward")
    if learned and settings.get("layout") == "adapters" and "reward_adapter" in model.paths:
        settings |= _adapter_rank(model.paths["reward_adapter"])
    elif learned and "reward" in model.paths:
        roles["reward"] = model.config_dict("reward")
        if plan.stage == "ppo":  # the value model starts on the SFT model where it has to
            roles["value"] = model.config_dict("sft" if _foreign(model) else "reward")
    for role in {"value", "teacher", "draft"} & model.paths.keys():
        roles[role] = model.config_dict(role)
    return estimate(plan.stage, model.config_dict(), plan.hardware, settings, **roles)


def _foreign(model: Model) -> bool:
    """Whether the reward model reads tokens of its own. Of a model by name, whose tokenizer is not
    here, that is where it is of another family."""
    if model.paths["reward"] in presets():
        return model.config_dict("reward")["model_type"] != model.config_dict()["model_type"]
    return model.foreign_reward


def _adapter_rank(folder: str) -> dict[str, object]:
    """What the plan must know of a reward adapter, like which the value adapter is made."""
    config = json.loads((Path(folder) / ADAPTER_FILE).read_text())
    rank, targets = config["r"], config["target_modules"]
    matrices = tuple(targets) if isinstance(targets, list) else targets
    return {"critic_lora_r": rank, "critic_lora_targets": matrices}


def predicted(plan: Plan, data: Data | None, quiet: bool = True) -> Ledger:
    """The prediction's rows; without seconds or none where the cost model knows no more: a run is
    worth having without. Then a line says why, unless `quiet` or a warning of the plan has."""
    known, what = Ledger(), UNKNOWN
    try:
        estimate = predict(plan, data)
        known, what = estimate.untimed_ledger, "no prediction of seconds"
        return estimate.ledger
    except ValueError as error:
        if not quiet and not any(line.startswith(UNKNOWN) for line in plan.warnings):
            print(f"{plan.stage}: {what} ({error})", flush=True)
        return known
