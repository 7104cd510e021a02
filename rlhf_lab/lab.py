"""Where the wings meet: plan a stage, train it, and read the run.

    import rlhf_lab as lab
    run = lab.train(lab.plan("ppo", "tiny"))          # or lab.train("ppo")
    run.show()

A plan holds a stage, a model, hardware and settings; training a plan uses exactly those. A run is
a folder that `lab.Run.load` reads without any training code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .data import Data, load_data
from .models import Model, load
from .runs import Run

STAGES = ("sft", "reward", "ppo", "dpo")

_TRL = {
    "logging_steps": 5,
    "logging_first_step": True,
    "per_device_eval_batch_size": 64,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "max_length": 512,
}
DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "sft": {**_TRL, "learning_rate": 1e-3, "per_device_train_batch_size": 32,
            "num_train_epochs": 1},
    "reward": {**_TRL, "learning_rate": 4e-4, "per_device_train_batch_size": 32,
               "num_train_epochs": 2},
    "dpo": {**_TRL, "learning_rate": 3e-4, "per_device_train_batch_size": 32,
            "num_train_epochs": 1, "beta": 0.5},
    "ppo": {"learning_rate": 1e-3, "per_device_train_batch_size": 64, "num_mini_batches": 2,
            "num_ppo_epochs": 2, "max_steps": 44, "response_length": 64, "temperature": 1.0,
            "kl_coef": 0.15, "missing_eos_penalty": 1.0, "report_to": "none",
            "local_rollout_forward_batch_size": 32},
})  # fmt: skip
"""The lab's settings of each stage, chosen for the bundled model; the rest are the library's.

PPO and DPO hold the policy nearer to the reference (`kl_coef`, `beta`) than is best for the reward
alone: further out the language begins to break.
"""

HELD_OUT = 512
"""Held-out prompts that a policy is judged on before and after training."""


@dataclass(frozen=True)
class Plan:
    """A stage, a model, hardware and settings: everything that `train` needs to know."""

    stage: str
    model: Model
    hardware: str = "here"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        said = ", ".join(f"{k}={v!r}" for k, v in sorted(self.settings.items()))
        return f"Plan({self.stage!r}, {self.model.name!r}, hardware={self.hardware!r}, {said})"

    def _repr_html_(self) -> str:
        from .widgets.text import escape, html_table

        head = escape(f"{self.stage} of {self.model.name}, hardware: {self.hardware}")
        rows = [{"setting": k, "value": str(v)} for k, v in sorted(self.settings.items())]
        return f"<p>{head}</p>{html_table(rows)}"

    def config(self, output_dir: str = "unused"):
        """The trainer's own settings object. Raises ValueError naming a setting it lacks."""
        from dataclasses import fields

        from .stages.machine import settle

        settle()
        cls = _config_class(self.stage)
        known = {f.name for f in fields(cls) if f.init}
        for name in self.settings:
            if name not in known:
                raise ValueError(f"{cls.__name__} has no setting {name!r}{_nearest(name, known)}")
        from .stages.trl_stages import trl_settings

        settings = dict(self.settings)
        return cls(**(settings | {"output_dir": output_dir})
                   if self.stage == "ppo" else trl_settings(settings, output_dir))  # fmt: skip


def plan(stage: str, model: str | Model = "tiny", *, hardware: str = "here", **settings) -> Plan:
    """Plan a stage (sft, reward, ppo, dpo) for a model: the lab's defaults, then your settings.

    Settings are the fields of TRL's SFTConfig, RewardConfig and DPOConfig, and of our PPOConfig.
    No weights are loaded. Raises ValueError for an unknown stage or model.
    """
    if stage not in STAGES:
        raise ValueError(f"no stage {stage!r}{_nearest(stage, STAGES)}: {', '.join(STAGES)}")
    return Plan(stage, load(model), hardware, {**DEFAULTS[stage], **settings})


def _nearest(name: str, known) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _config_class(stage: str):
    if stage == "ppo":
        from .stages.ppo_config import PPOConfig

        return PPOConfig
    import trl

    return {"sft": trl.SFTConfig, "reward": trl.RewardConfig, "dpo": trl.DPOConfig}[stage]


# ------------------------------------------------------------------------------------- training


@dataclass
class Job:
    """One training in progress: what the stage functions below share."""

    plan: Plan
    data: Data
    run: Run
    meter: Any
    quiet: bool
    should_stop: Callable[[], bool] | None

    @property
    def tokenizer(self):
        return self.plan.model.tokenizer

    @property
    def args(self):
        return self.plan.config(str(self.run.folder / "trainer"))

    @property
    def seed(self) -> int:
        return int(self.plan.settings.get("seed", 42))

    def progress(self, total: int):
        from .widgets.progress import Progress

        return None if self.quiet else Progress(total, self.plan.stage)

    def save(self, model) -> None:
        """The trained model in the transformers layout, its tokenizer beside it."""
        model.save_pretrained(self.run.folder / "model")
        self.tokenizer.save_pretrained(self.run.folder / "model")


def train(
    plan: Plan | str,
    data: Data | str | Path = "stories",
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    should_stop: Callable[[], bool] | None = None,
) -> Run:
    """Train what was planned and return the run. `plan` may be a stage's name.

    The run's folder (`out`, else runs/<stage>-<number>) holds settings, metrics, samples, the
    ledger and the final model. Interrupting (Ctrl-C, the notebook's stop button) or a true
    `should_stop()` ends training cleanly and keeps what there is. Raises ValueError before
    anything is written when the settings or the data do not fit the stage.
    """
    if isinstance(plan, str):
        plan = globals()["plan"](plan)
    data = load_data(data)
    _check(plan, data)
    from .cost.meter import Meter

    run = Run.create(
        Path(out) if out else free_folder(plan.stage), stage=plan.stage, model=plan.model.name,
        settings=dict(plan.settings), data=data.name, seed=plan.settings.get("seed", 42),
        hardware=plan.hardware, overwrite=overwrite,
    )  # fmt: skip
    job = Job(plan, data, run, Meter(plan.stage), quiet, should_stop)
    try:
        figures, stopped = _FUNCTIONS[plan.stage](job)
    except BaseException as error:
        run.save_ledger(job.meter.ledger())
        run.finish("failed", error=f"{type(error).__name__}: {error}")
        raise
    run.save_ledger(job.meter.ledger())
    run.finish("stopped" if stopped else "finished", **figures)
    return run


def _check(plan: Plan, data: Data) -> None:
    """Refuse what cannot work before a folder is made."""
    plan.config()
    need = {"sft": data.sft, "reward": data.preferences, "dpo": data.preferences}
    if not need.get(plan.stage, data.prompts).train:
        what = "completion" if plan.stage == "sft" else "chosen and rejected"
        raise ValueError(f"{data.name} has nothing to train {plan.stage} on: no {what} fields")
    if plan.stage == "ppo" and "reward" not in plan.model.paths:
        raise ValueError(
            f"PPO needs a reward model: train one first (rlhf-lab train reward --model "
            f"{plan.model.name}) and use model.with_stage('reward', run.model_path)"
        )


def free_folder(stage: str) -> Path:
    number = 1
    while (folder := Path("runs") / f"{stage}-{number}").exists():
        number += 1
    return folder


def _stoppable(work: Callable[[], Any], should_stop) -> tuple[float, bool]:
    """Run the training loop; → seconds, whether it was stopped early."""
    start = time.perf_counter()
    try:
        work()
    except KeyboardInterrupt:
        return time.perf_counter() - start, True
    return time.perf_counter() - start, bool(should_stop and should_stop())


def _watched(job: Job, role: str):
    from .stages.trl_stages import Watch

    return Watch(job.meter, role, job.run.log, job.progress, job.should_stop)


def _costs(job: Job, seconds: float) -> dict[str, float]:
    """What every stage reports of its cost: measured."""
    phase = "rollout" if job.plan.stage == "ppo" else "forward"
    tokens = sum(n for (p, _), n in job.meter.tokens.items() if p == phase)
    return {"seconds": seconds, "tokens_per_second": tokens / seconds, "peak_bytes": job.meter.peak}


def _trl_stage(job: Job, model, role: str, start: Callable, rows) -> tuple[Any, float, bool, dict]:
    """Run one of TRL's trainers; → trainer, seconds, stopped, dropped rows by reason."""
    trainer, dropped = start(
        model, job.tokenizer, rows.train, rows.test, job.args, _watched(job, role)
    )
    seconds, stopped = _stoppable(trainer.train, job.should_stop)
    job.save(trainer.model)
    return trainer, seconds, stopped, dropped


def _sft(job: Job):
    from .stages.trl_stages import sft_trainer

    model = job.plan.model.base
    before = _policy_figures(job, model, keep="base")
    trainer, seconds, stopped, dropped = _trl_stage(job, model, "policy", sft_trainer, job.data.sft)
    figures = _costs(job, seconds) | {"dropped": dropped}
    if job.data.sft.test:
        figures["eval_loss"] = trainer.evaluate()["eval_loss"]
    return figures | _before_after(before, _policy_figures(job, trainer.model, keep="sft")), stopped


def _reward(job: Job):
    from .models import new_reward_model
    from .stages.evaluate import noise_free_accuracy, pair_accuracy
    from .stages.trl_stages import reward_trainer, set_score_offset

    paths = job.plan.model.paths
    model = new_reward_model(paths.get("sft", paths["base"]), job.tokenizer, job.seed)
    trainer, seconds, stopped, dropped = _trl_stage(
        job, model, "reward", reward_trainer, job.data.preferences
    )
    figures = _costs(job, seconds) | {"dropped": dropped}
    pairs = job.data.preferences.test
    if pairs:
        accuracy, margin = pair_accuracy(trainer.model, job.tokenizer, pairs)
        figures |= {"accuracy": accuracy, "held_out_pairs": len(pairs)}
        if job.data.has_gold:
            figures["accuracy_ceiling"] = job.data.accuracy_ceiling(pairs)
            gold = job.data.gold_reward
            figures["noise_free_accuracy"] = noise_free_accuracy(pairs, margin, gold)
    # Rule 16: demonstrations score 0 on average; kept in the config, where PPO finds it.
    demonstrations = (job.data.sft.train or job.data.preferences.train)[:256]
    figures["score_offset"] = set_score_offset(trainer.model, job.tokenizer, demonstrations)
    job.save(trainer.model)
    return figures, stopped


def _dpo(job: Job):
    from .stages.trl_stages import dpo_trainer

    model, reference = job.plan.model.sft, job.plan.model.sft
    before = _policy_figures(job, model, keep="sft")
    trainer, seconds, stopped, dropped = _trl_stage(
        job, model, "policy", dpo_trainer, job.data.preferences
    )
    after = _policy_figures(job, trainer.model, reference, keep="dpo")
    figures = _costs(job, seconds) | {"dropped": dropped} | _before_after(before, after)
    if job.data.preferences.test:
        figures |= {k: v for k, v in trainer.evaluate().items() if k == "eval_loss"}
    return figures, stopped


def _ppo(job: Job):
    from .stages.ppo import PPOTrainer

    model = job.plan.model
    policy, reference, reward, value = model.sft, model.sft, model.reward, model.reward
    before = _policy_figures(job, policy, reward_model=reward, keep="sft")
    trainer = PPOTrainer(
        job.args, job.tokenizer, policy, reference, reward, job.data.prompts.train, value,
        metric_funcs=_gold_metrics(job.data), meter=job.meter, on_sample=job.run.sample,
        should_stop=job.should_stop,
    )  # fmt: skip
    bar = job.progress(trainer.iterations)

    def record(step: int, metrics: dict) -> None:
        job.run.log(step, **metrics)
        if bar:
            shown = {"reward": "reward", "KL": "kl", "gold": "gold_reward"}
            bar.update(
                1, "  ".join(f"{n} {metrics[k]:.2f}" for n, k in shown.items() if k in metrics)
            )

    trainer.on_log = record
    seconds, stopped = _stoppable(trainer.train, job.should_stop)
    if bar:
        bar.close()
    job.save(trainer.policy)
    after = _policy_figures(job, trainer.policy, reference, reward, keep="ppo")
    return _costs(job, seconds) | _before_after(before, after), stopped


def _gold_metrics(data: Data) -> dict[str, Callable]:
    """The gold reward and its parts as functions that PPO watches (it never trains on them)."""
    if not data.has_gold:
        return {}
    from .gold import PARTS

    def watch(score: Callable[[str, str], float]) -> Callable:
        def values(prompts, completions, **_):
            return [score(p, c) for p, c in zip(prompts, completions, strict=True)]

        return values

    parts = {
        f"gold/{name}": watch(lambda p, c, name=name: data.gold_parts(p, c)[name]) for name in PARTS
    }
    return {"gold_reward": watch(data.gold_reward), **parts}


def _policy_figures(job: Job, model, reference=None, reward_model=None, keep="") -> dict:
    """What a policy is worth on held-out prompts; `keep` records samples under that name."""
    from .stages.evaluate import policy_report

    prompts = [r["prompt"] for r in (job.data.prompts.test or job.data.prompts.train)[:HELD_OUT]]
    if not prompts:
        return {}
    gold = job.data.has_gold
    with job.meter.phase("evaluation"):
        figures, responses = policy_report(
            model, job.tokenizer, prompts, reference=reference, reward_model=reward_model,
            gold_parts=job.data.gold_parts if gold else None,
            gold_reward=job.data.gold_reward if gold else None,
            max_new_tokens=int(job.plan.settings.get("response_length", 64)),
        )  # fmt: skip
    if keep:
        rows = zip(prompts[:32], responses, strict=False)
        job.run.sample(0, [{"prompt": p, "response": r, "when": keep} for p, r in rows])
    return figures


def _before_after(before: dict, after: dict) -> dict[str, float]:
    """Figures after training, and those from before as `before/<name>`."""
    return after | {f"before/{name}": value for name, value in before.items()}


_FUNCTIONS = {"sft": _sft, "reward": _reward, "ppo": _ppo, "dpo": _dpo}
