"""Where the wings meet: plan a stage, train it, and read the run.

    import rlhf_lab as lab
    run = lab.train(lab.plan("ppo", "tiny"))          # or lab.train("ppo")
    run.show()

A plan holds a stage, a model, hardware and settings; training a plan uses exactly those. A run is
a folder that `lab.Run.load` reads without any training code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .cost.estimate import Estimate
from .cost.hardware import hardware as find_hardware
from .cost.setup import EXTRA
from .data.lengths import planned_lengths
from .data.load import Data, load_data
from .data.reward_sources import named, reward_functions, settled
from .launch.follower import Follower
from .launch.launcher import launch, place  # noqa: F401  (for the command line)
from .models.load import Model, load
from .runs.run import Run
from .studies import unplannable
from .widgets.background import Stop, Training, check_free, open_dashboard
from .wording import did_you_mean

if TYPE_CHECKING:
    from .display import Display

STAGES = ("sft", "reward", "ppo", "dpo", "rloo", "grpo")
PLANNED = (*STAGES, "inference")
"""What can be planned; inference (prefill and decode) is no training."""

_TRL = {
    "logging_steps": 5,
    "logging_first_step": True,
    "per_device_eval_batch_size": 64,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "max_length": 512,
}
_ONLINE = {
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 32,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "num_generations": 4,
    "max_steps": 176,
    "logging_steps": 4,
    "response_length": 64,
    "beta": 0.15,
    "missing_eos_penalty": 1.0,
    "disable_dropout": True,
}
"""RLOO and GRPO as much as PPO: 44 times 64 responses, each in two minibatches, twice. RLOO's β
is PPO's `kl_coef`; GRPO's reward is in standard deviations of its group."""
DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "sft": {
            **_TRL,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 32,
            "num_train_epochs": 1,
        },
        "reward": {
            **_TRL,
            "learning_rate": 4e-4,
            "per_device_train_batch_size": 32,
            "num_train_epochs": 2,
        },
        "dpo": {
            **_TRL,
            "learning_rate": 3e-4,
            "per_device_train_batch_size": 32,
            "num_train_epochs": 1,
            "beta": 0.5,
        },
        "ppo": {
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 64,
            "num_mini_batches": 2,
            "num_ppo_epochs": 2,
            "max_steps": 44,
            "response_length": 64,
            "temperature": 1.0,
            "kl_coef": 0.15,
            "missing_eos_penalty": 1.0,
            "report_to": "none",
            "local_rollout_forward_batch_size": 32,
        },
        "rloo": dict(_ONLINE),
        "grpo": dict(_ONLINE),
        "inference": {"per_device_train_batch_size": 64, "response_length": 64},
    }
)
"""The lab's settings of each stage, chosen for the bundled model; the rest are the library's.

PPO and DPO hold the policy nearer to the reference (`kl_coef`, `beta`) than is best for the reward
alone: further out the language begins to break.
"""

LORA = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
}
"""LoRA's settings, named as TRL's ModelConfig names them → peft's LoraConfig."""


POSITIVE = {
    "learning_rate",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_length",
    "lora_r",
    "num_ppo_epochs",
    "num_mini_batches",
    "local_rollout_forward_batch_size",
    "num_generations",
    "num_iterations",
    "steps_per_generation",
}
"""Settings that make no sense at 0 or below, and that the trainers do not all check."""


@dataclass(frozen=True)
class Plan:
    """A stage, a model, hardware and settings: everything that `train` needs to know."""

    stage: str
    model: Model
    hardware: Any = "here"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        said = ", ".join(f"{k}={v!r}" for k, v in sorted(self.settings.items()))
        return f"Plan({self.stage!r}, {self.model.name!r}, hardware={self._where!r}, {said})"

    def _repr_html_(self) -> str:
        from .display import escape, html_table

        head = escape(f"{self.stage} of {self.model.name}, hardware: {self._where}")
        rows = [{"setting": k, "value": str(v)} for k, v in sorted(self.settings.items())]
        return f"<p>{head}</p>{html_table(rows)}"

    @property
    def _where(self) -> str:
        return getattr(self.hardware, "name", self.hardware)

    # ------------------------------------------------------------------------- what it will cost

    @cached_property
    def estimate(self) -> Estimate:
        """The prediction: memory, FLOPs, time, money (`cost/plan.py`)."""
        from .studies import predict

        return predict(self)

    @property
    def ledger(self):
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

    def cheaper(self):
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
        from .display import Display

        return Display(text(self.estimate), *parts(self.estimate))

    def config(self, output_dir: str = "unused"):
        """The trainer's own settings object. Raises ValueError naming a setting it lacks."""
        from dataclasses import fields

        from .launch.machine import settle

        if self.stage not in STAGES:
            raise ValueError(f"{self.stage} has no trainer, and no trainer's settings")
        settle()
        cls = _config_class(self.stage)
        own = {f.name for f in fields(cls) if f.init}
        known = own | LORA.keys() | EXTRA.keys()
        for name in self.settings:
            if name not in known:
                hint = f"; {did_you_mean(name, known)}".rstrip("; ")
                raise ValueError(f"{cls.__name__} has no setting {name!r}{hint}")
            _check_type(name, self.settings[name], cls.__dataclass_fields__.get(name))
        from .trainers.trl_stages import trl_settings

        settings = {k: v for k, v in self.settings.items() if k in own}
        return cls(
            **(settings | {"output_dir": output_dir})
            if self.stage == "ppo"
            else trl_settings(settings, output_dir)
        )

    @property
    def lora(self) -> dict[str, Any]:
        """The arguments of peft's LoraConfig; {} where the whole model is trained."""
        if not self.settings.get("lora_r"):
            return {}
        said = {LORA[name]: self.settings[name] for name in LORA if name in self.settings}
        return {"target_modules": "all-linear", "lora_alpha": 2 * said["r"]} | said


def plan(
    stage: str,
    model: str | Model = "tiny",
    *,
    hardware: Any = "here",
    data: Data | str | Path | None = None,
    **settings,
) -> Plan:
    """Plan a stage for a model: the lab's defaults, then your settings.

    `stage`: sft, reward, ppo, dpo, rloo, grpo, or inference (prefill and decode, which is planned
    only). Settings are the fields of TRL's config of that stage, for PPO of our PPOConfig;
    `lora_r=16` trains LoRA adapters instead of the whole model (`LORA`); what is no trainer's
    (lengths, GPUs, sharding, `rewards`, …) is in `cost.setup.EXTRA`. `hardware`: a name of the
    catalogue, a Hardware, or "here". With `data` the lengths and the number of rows are those of
    the data. No weights are loaded. Raises ValueError for an unknown stage, model or device.
    """
    if stage not in PLANNED:
        hint = did_you_mean(stage, PLANNED)
        raise ValueError(f"no stage {stage!r}; {hint}choose from {', '.join(PLANNED)}")
    handle, settings = load(model), _one_length(stage, settings)
    chosen = {**DEFAULTS[stage], **settings, **named(settings)}
    if {"rows", "num_train_epochs", "total_episodes"} & settings.keys() - {"max_steps"}:
        chosen["max_steps"] = settings.get("max_steps", -1)  # not the lab's own number of steps
    find_hardware(hardware)
    if data is not None:
        found = planned_lengths(stage, handle, load_data(data), chosen)
        chosen = {**found, **chosen}
    return Plan(stage, handle, hardware, chosen)


def _one_length(stage: str, settings: dict[str, Any]) -> dict[str, Any]:
    """TRL's name of the longest response as ours."""
    if stage not in ("rloo", "grpo") or "max_completion_length" not in settings:
        return settings
    if "response_length" in settings:
        raise ValueError("response_length is max_completion_length: say one of them")
    rest = {k: v for k, v in settings.items() if k != "max_completion_length"}
    return {**rest, "response_length": settings["max_completion_length"]}


def _check_type(name: str, value: Any, field) -> None:
    """Numbers are numbers and switches are switches: the trainers find out much later."""
    said = "int" if name == "lora_r" else str(getattr(field, "type", ""))
    kinds = set(re.findall(r"\w+", said))
    if said.startswith("list[float]") and value is not None:
        if not isinstance(value, (list, tuple)) or not all(map(_is_number, value)):
            raise ValueError(f"{name} must be a list of numbers, got {value!r}")
        return
    if (value is None and "None" in kinds) or "str" in kinds:
        return
    if kinds & {"int", "float"} and not _is_number(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if "bool" in kinds and not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    if name in POSITIVE and not 0 < value < float("inf"):
        raise ValueError(f"{name} must be above 0, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _config_class(stage: str):
    if stage == "ppo":
        from .ppo.config import PPOConfig

        return PPOConfig
    if stage in ("rloo", "grpo"):
        from .trainers import online

        return online.RLOOConfig if stage == "rloo" else online.GRPOConfig
    import trl

    return {"sft": trl.SFTConfig, "reward": trl.RewardConfig, "dpo": trl.DPOConfig}[stage]


# ------------------------------------------------------------------------------------- training


def train(
    plan: Plan | str,
    data: Data | str | Path = "stories",
    *,
    reward_funcs: Callable | Sequence[Callable] | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    quiet: bool = False,
    should_stop: Callable[[], bool] | None = None,
    background: bool = False,
) -> Run | Training:
    """Train what was planned and return the run. `plan` may be a stage's name.

    The run's folder (`out`, else runs/<stage>-<number>) holds settings, metrics, samples, the
    ledger (predicted before, measured while it ran) and the final model. Interrupting (Ctrl-C, the
    notebook's stop button) or a true `should_stop()` ends training and keeps what there is. In a
    notebook a dashboard draws while it trains, and stays as a picture. `background`: train in a
    thread, so that the notebook stays free, and return a `Training` at once: `.stop()`, `.wait()`.
    `reward_funcs`: functions that PPO, RLOO and GRPO learn from, `f(prompts=…, completions=…,
    completion_ids=…) → list of floats` or None, beside the rewards of the plan. Raises
    ValueError before anything is written when the settings or the data do not fit the stage.

    `resume`: PPO goes on from the last checkpoint of the run in `out`, to the same figures as if it
    had never stopped; the plan must be the one that it was started with. A finished run is
    returned as it is; where there is none yet, training begins.
    """
    if isinstance(plan, str):
        plan = globals()["plan"](plan)
    if resume:
        _check_resume(plan.stage, out, overwrite)
    check_free()
    stop = Stop(should_stop) if background else should_stop
    view = open_dashboard(plan, quiet, stop)  # first: importing the trainers takes seconds
    try:
        work = _prepared(plan, data, reward_funcs, out, overwrite, resume, quiet)
        if isinstance(work, Run):
            return work
        if background:
            started, view = Training(work, stop, view), None
            return started
        return work(should_stop=stop, dashboard=view)
    finally:
        if view is not None:
            view.end()


def _prepared(
    plan: Plan, data: Any, reward_funcs: Any, out: Any, overwrite: bool, resume: bool, quiet: bool
) -> Run | Callable[..., Run]:
    """All that can be refused without loading a model; → what is left to do, or the run that is
    finished already."""
    rank, processes = place()
    if processes > 1 and (plan.stage != "ppo" or not out):
        raise ValueError("several processes train PPO, in a folder that all of them know (out)")
    data, plan = load_data(data), settled(plan, reward_funcs)
    _check(plan, data)
    functions = reward_functions(plan, data, reward_funcs)
    said = {
        "stage": plan.stage,
        "model": plan.model.name,
        "settings": dict(plan.settings),
        "data": data.name,
        "seed": plan.settings.get("seed", 42),
    }
    old = Run.reopen(out, **said) if resume else None
    if old is not None and old.status == "finished":
        return old
    folder = Path(out) if out else free_folder(plan.stage)

    def open_run() -> Run:
        if rank:  # the first process writes, the others only train
            return Follower(out)
        return old or Run.create(folder, hardware=plan._where, overwrite=overwrite, **said)

    from .trainers.run_stage import run_plan

    return partial(run_plan, plan, data, functions, open_run, quiet=quiet, resume=bool(old))


def _check(plan: Plan, data: Data) -> None:
    """Refuse what cannot work before anything is loaded."""
    if plan.stage not in STAGES:
        raise ValueError(f"{plan.stage} is planned only; to train, choose from {', '.join(STAGES)}")
    _check_reporters(plan.config().report_to)
    if line := unplannable(plan.settings):
        raise ValueError(line)
    need = {"sft": data.sft, "reward": data.preferences, "dpo": data.preferences}
    if not need.get(plan.stage, data.prompts).train:
        what = "completion" if plan.stage == "sft" else "chosen and rejected"
        raise ValueError(f"{data.name} has nothing to train {plan.stage} on: no {what} fields")


def _check_reporters(names: Sequence[str]) -> None:
    """Refuse a tracker that transformers does not know, or that is not installed."""
    from transformers.integrations import integration_utils as trackers

    known, here = trackers.INTEGRATION_TO_CALLBACK, trackers.get_available_reporting_integrations()
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ValueError(f"report_to={name!r}: {hint}transformers has {', '.join(known)}")
        if name not in here:
            raise ValueError(
                f"report_to={name!r} is not installed: pip install {name}, or leave it out"
            )


def _check_resume(stage: str, out: Any, overwrite: bool) -> None:
    if stage != "ppo":
        raise ValueError(f"only PPO can be resumed, not {stage}: leave resume out")
    if not out:
        raise ValueError("resume needs the run's folder: say which (out)")
    if overwrite:
        raise ValueError("resume goes on with a run, overwrite replaces it: say one of them")


def free_folder(stage: str) -> Path:
    number = 1
    while (folder := Path("runs") / f"{stage}-{number}").exists():
        number += 1
    return folder
