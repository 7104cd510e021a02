"""What every stage's training shares: the job, its loop, its figures before and after."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

from ..data.load import Data
from ..data.reward_sources import RewardFunction
from ..data.rows_left import response_limit
from ..data.tokenize import prompt_text, stop_ids
from ..launch.processes import any_process, from_all, load_whole
from ..metering.meter import Meter
from ..models.weights import dequantised, embeddings, grow_embeddings
from ..ppo.adapters import POLICY
from ..ppo.compiled import compile_layers
from ..ppo.logprobs import AnyModel
from ..ppo.losses import LossFunction
from ..runs.json_files import JsonObject
from ..runs.progress import Bar, Progress
from ..runs.run import Run
from ..stages import STAGES
from .diverged import broken_weight, diverged
from .evaluate import Answers, policy_report, score_answers, win_rate
from .prepare import Prepared

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

    from ..planning import Plan, TrainerArgs
    from ..ppo.trainer import PPOTrainer
    from ..widgets.dashboard import Dashboard
    from .trl import Watch

Figures: TypeAlias = JsonObject
Evaluated: TypeAlias = tuple[Figures, Answers | None]
"""Figures of a policy, and its responses to the held-out prompts; empty for a run that stopped."""


def save_model(
    model: AnyModel, tokenizer: PreTrainedTokenizerBase, folder: Path, **how: object
) -> None:
    """A model in the transformers layout, its tokenizer beside it; `how`: of `save_pretrained`."""
    if generation := getattr(model, "generation_config", None):  # others stop where we did
        ends = list(stop_ids(tokenizer))
        generation.eos_token_id = ends if len(ends) > 1 else ends[0]
    model.save_pretrained(folder, **how)
    tokenizer.save_pretrained(folder)


@dataclass
class Job:
    """One training in progress: what the stage functions below share."""

    plan: Plan
    data: Data
    run: Run
    meter: Meter
    ready: Prepared
    args: TrainerArgs
    """settings as the stage's trainer takes them"""
    quiet: bool
    should_stop: Callable[[], bool] | None
    functions: Sequence[RewardFunction] = ()
    """what the stage learns from beside a reward model"""
    losses: Mapping[str, LossFunction] = field(default_factory=dict)
    """functions in place of PPO's own (`ppo/losses.py`)"""
    trainer: type[PPOTrainer] | None = None
    """in place of PPO's own: a specimen of the bug zoo"""
    resume: bool = False
    """go on from the run's last checkpoint"""
    dashboard: Dashboard | None = None
    """shows the run while it is made"""
    weights: Mapping[str, Tensor] | None = None
    """of a model that was trained sharded: all of them on the first process, {} on others"""
    stopped: bool = False
    """whether training was ended early: the model is saved, and not evaluated"""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.plan.model.tokenizer

    def progress(self, total: int, done: int = 0) -> Bar | None:
        """What counts the steps of the loop, of which `done` were made by an earlier process: the
        dashboard, a line of text, or nothing."""
        if self.dashboard is not None:
            return self.dashboard.follow(total, done)
        return None if self.quiet else Progress(total, self.plan.stage, done=done)

    def say(self, state: str) -> None:
        """Tell what goes on while no step is made, where somebody looks."""
        if self.dashboard is not None:
            self.dashboard.say(state)

    def save(self, model: AnyModel) -> None:
        """A model in the transformers layout, its tokenizer beside it; adapters in `adapter/`."""
        if not self.run.writes:
            return
        adapted = hasattr(model, "peft_config")
        folder = self.run.folder / ("adapter" if adapted else "model")
        # Without embeddings, which are not trained: where they were given a row for padding, what
        # was saved with them would not fit the base (peft saves them then).
        alone = {"selected_adapters": [POLICY], "save_embedding_layers": False}
        how = {"state_dict": self.weights, **(alone if adapted else {})}
        save_model(model, self.tokenizer, folder, **how)

    def whole(self, model: AnyModel, anew: bool = False) -> AnyModel:
        """The trained model with its adapters merged in, saved, `anew` into a base that is loaded
        again; one without them as it is. Of one that was trained sharded over TRL a copy, which
        each process has whole."""
        if self.weights is not None:
            any_process(False)  # the first one has saved it
            load_whole()
            self.weights, kind = None, "reward" if self.plan.stage == "reward" else "sft"
            saved = self.plan.model.with_stage(kind, self.run.folder / "model")
            return getattr(saved, kind).to(self.args.device)
        if not self.run.writes:
            return model
        anew = anew and hasattr(model, "peft_config")
        if anew or self.plan.settings.get("load_in_4bit"):  # into weights that were never rounded
            from peft import PeftModel

            of, spec = self.plan.model, STAGES[self.plan.stage]
            scores = spec.roles[0] == "reward"
            start = of.new_reward() if scores else getattr(of, spec.starts_from)
            model = PeftModel.from_pretrained(dequantised(start), self.run.folder / "adapter")
        if hasattr(model, "peft_config"):
            model = model.merge_and_unload(adapter_names=[POLICY])
            self.save(model)
        return model


def run_loop(job: Job, work: Callable[[], object]) -> float:
    """Run the training loop until its end or an interrupt; → seconds. A stop that comes from
    another thread (`background.Stop`) interrupts nothing but this."""
    start, asked = time.perf_counter(), job.should_stop
    try:
        with getattr(asked, "armed", nullcontext)():
            work()
        job.stopped = any_process(bool(asked and asked()))
    except KeyboardInterrupt:
        job.stopped = True
    return time.perf_counter() - start


def cost_figures(job: Job, seconds: float) -> Figures:
    """What every stage reports of its cost (measured) and of the rows it could not use."""
    samples = getattr(job.args, "distill_from", "student") == "student"
    phase = "rollout" if STAGES[job.plan.stage].online and samples else "forward"
    tokens = sum(from_all(sum(n for (p, _), n in job.meter.tokens.items() if p == phase)))
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "tensor_peak_bytes": max(from_all(job.meter.ledger().peak())),
        "process_peak_bytes": max(from_all(job.meter.peak)),
        "rows": len(job.ready.train),
        "dropped": job.ready.counts,
    }


def train_role(job: Job) -> tuple[Trainer, Figures]:
    """Run TRL's trainer of the stage on the model that it trains; → trainer, costs."""
    from .trl import Watch, make_trainer  # PPO needs no TRL

    ready, role = job.ready, STAGES[job.plan.stage].roles[0]
    watch = Watch(job.meter, job.run.log, job.progress, job.should_stop)
    data = (ready.train, ready.test)
    model, tokenizer = ready.models[role], job.tokenizer
    handle = job.plan.model
    reference = (lambda: handle.sft) if "reference" in STAGES[job.plan.stage].roles else None
    trainer = make_trainer(
        job.plan.stage, model, tokenizer, *data, job.args, [watch], reference=reference
    )
    return trainer, run_trainer(job, trainer, watch)


def run_trainer(job: Job, trainer: Trainer, watch: Watch) -> Figures:
    """Train with TRL, from the last checkpoint where the job goes on, and save the model; → costs.
    Raises `Diverged`."""
    from .checkpoint import Checkpoints

    resume = job.run.checkpoints[0] if job.resume else None
    trainer.add_callback(saved := Checkpoints(trainer, job.meter, resume, watch.counter))
    if resume:
        job.run.rewind(done := int(resume.name.split("-")[1]))
        if not job.quiet:
            print(f"{job.plan.stage}: going on after step {done}", flush=True)
    compiled = bool(job.plan.settings.get("torch_compile"))
    if compiled:
        beside = (getattr(trainer, name, None) for name in ("ref_model", "teacher_model"))
        compile_layers(*filter(None, (trainer.model, *beside, job.ready.models.get("reward"))))
    with job.meter.compiling(compiled):
        run_loop(
            job, partial(trainer.train, resume_from_checkpoint=str(resume) if resume else None)
        )
    seconds = saved.seconds
    watch.close()
    # Schedule-free optimizers train beside the average that is the model; Trainer goes over to that
    # one for its evaluations alone (transformers 5.23).
    if callable(averaged := getattr(trainer.optimizer, "eval", None)):
        averaged()
    if name := broken_weight(trainer.model):
        raise diverged(job.plan.stage, job.args, f"{name} holds NaN or infinity")
    zero = trainer.accelerator.state.deepspeed_plugin
    if trainer.is_fsdp_enabled or zero is not None and zero.zero_stage == 3:
        job.weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
    job.save(trainer.model)  # before anything else can fail or be interrupted
    return cost_figures(job, seconds)


def train_policy(job: Job) -> Figures:
    """SFT, DPO and KTO: train the policy with TRL; one that is held near a reference is compared
    with it, the SFT model that it began as."""
    spec, model = STAGES[job.plan.stage], job.plan.model
    compared = "reference" in spec.roles
    before = evaluate_policy(job, job.ready.models["policy"], keep=spec.starts_from)
    trainer, figures = train_role(job)
    if job.ready.test and not job.stopped:
        figures["eval_loss"] = trainer.evaluate()["eval_loss"]
    policy = job.whole(trainer.model)
    after = evaluate_policy(job, policy, model.sft if compared else None)
    reward = model.reward if compared and "reward" in model.paths else None
    if reward is not None and not model.foreign_reward:
        grow_embeddings(reward, embeddings(policy))
    return figures | before_and_after(job, before, after, reward)


def evaluate_policy(
    job: Job,
    model: AnyModel,
    reference: AnyModel | None = None,
    reward_model: AnyModel | None = None,
    keep: str = "",
) -> Evaluated:
    """Figures of a policy on held-out prompts, and its responses. They are recorded under a name,
    `keep` or that of the stage: all as ids and numbers, 32 to read, not again in a run that is
    resumed."""
    prompts, keep = job.ready.prompts, keep or job.plan.stage
    if not prompts or job.stopped:
        return {}, None
    if keep == STAGES[job.plan.stage].starts_from:
        job.say("evaluating the model as it was before training")
    gold = job.data.has_gold
    with job.meter.phase("evaluation"):
        figures, answers = policy_report(
            model,
            job.tokenizer,
            prompts,
            reference=reference,
            reward_model=reward_model,
            gold_parts=job.data.gold_parts if gold else None,
            gold_reward=job.data.gold_reward if gold else None,
            reward_tokenizer=job.plan.model.reward_tokenizer if reward_model else None,
            max_new_tokens=response_limit(job.plan.settings),
        )
    if not any(row.get("when") == keep for row in job.run.samples):
        rows = [{"when": keep, **row} for row in answers.rows()]
        job.run.evaluated(rows)
        shown = [{n: row[n] for n in ("prompt_ids", "ids", "when")} for row in rows[:32]]
        for row, prompt, text in zip(shown, prompts, answers.texts, strict=False):
            row |= {"prompt": prompt_text(prompt), "response": text}
        job.run.sample(0, shown)
    return figures, answers


def before_and_after(
    job: Job, before: Evaluated, after: Evaluated, reward_model: AnyModel | None
) -> Figures:
    """Figures after training, those from before as `before/<name>`, and how often the reward model
    prefers the response after training to the one before."""
    figures = after[0] | {f"before/{name}": value for name, value in before[0].items()}
    if before[1] and after[1] and reward_model is not None:
        scorer = reward_model, job.tokenizer, job.plan.model.reward_tokenizer
        old, new = (score_answers(*scorer, answers) for answers in (before[1], after[1]))
        figures["win_rate"] = win_rate(old, new)
    return figures
