"""What every stage's training shares: the job, its loop, its figures before and after."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from transformers import PreTrainedTokenizerBase, Trainer

from ..data.load import Data
from ..data.tokenize import prompt_text
from ..metering.meter import Meter
from ..ppo.adapters import POLICY
from ..ppo.logprobs import AnyModel
from ..runs.json_files import JsonObject
from ..runs.progress import Progress
from ..runs.run import Run
from ..stages import ONLINE
from .evaluate import policy_report, win_rate
from .prepare import Prepared
from .trl import Bar, Watch

if TYPE_CHECKING:
    from ..planning import Plan, TrainerArgs
    from ..widgets.dashboard import Dashboard

Build: TypeAlias = Callable[..., Trainer]
"""`build(model, tokenizer, train, held_out, args, callbacks)` -> one of TRL's trainers."""
Figures: TypeAlias = JsonObject


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
    resume: bool = False
    """go on from the run's last checkpoint"""
    dashboard: Dashboard | None = None
    """shows the run while it is made"""
    stopped: bool = False
    """whether training was ended early: the model is saved, and not evaluated"""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.plan.model.tokenizer

    def progress(self, total: int) -> Bar | None:
        """What counts the steps of the loop: the dashboard, a line of text, or nothing."""
        if self.dashboard is not None:
            return self.dashboard.follow(total)
        return None if self.quiet else Progress(total, self.plan.stage)

    def save(self, model: AnyModel) -> None:
        """A model in the transformers layout, its tokenizer beside it; adapters in `adapter/`."""
        if not self.run.writes:
            return
        adapted = hasattr(model, "peft_config")
        folder = self.run.folder / ("adapter" if adapted else "model")
        model.save_pretrained(folder, **({"selected_adapters": [POLICY]} if adapted else {}))
        self.tokenizer.save_pretrained(folder)

    def whole(self, model: AnyModel) -> AnyModel:
        """The trained model with its adapters merged in, saved; one without them as it is."""
        if not self.run.writes:
            return model
        if self.plan.settings.get("load_in_4bit"):  # merged into weights that were never rounded
            from peft import PeftModel

            model = PeftModel.from_pretrained(self.plan.model.sft, self.run.folder / "adapter")
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
        job.stopped = bool(asked and asked())
    except KeyboardInterrupt:
        job.stopped = True
    return time.perf_counter() - start


def cost_figures(job: Job, seconds: float) -> Figures:
    """What every stage reports of its cost (measured) and of the rows it could not use."""
    phase = "rollout" if job.plan.stage in ONLINE else "forward"
    tokens = sum(n for (p, _), n in job.meter.tokens.items() if p == phase)
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_bytes": job.meter.peak,
        "rows": len(job.ready.train),
        "dropped": job.ready.counts,
    }


def train_role(job: Job, role: str, build: Build) -> tuple[Trainer, Figures]:
    """Run one of TRL's trainers on the model of a role; → trainer, costs."""
    watch = Watch(job.meter, role, job.run.log, job.progress, job.should_stop)
    ready = job.ready
    trainer = build(ready.models[role], job.tokenizer, ready.train, ready.test, job.args, [watch])
    seconds = run_loop(job, trainer.train)
    watch.close()
    job.save(trainer.model)  # before anything else can fail or be interrupted
    return trainer, cost_figures(job, seconds)


def train_policy(job: Job, build: Build) -> tuple[AnyModel, Figures]:
    """Train the policy with TRL; → the trained model, costs and held-out loss."""
    trainer, figures = train_role(job, "policy", build)
    if job.ready.test and not job.stopped:
        figures["eval_loss"] = trainer.evaluate()["eval_loss"]
    return job.whole(trainer.model), figures


def policy_figures(
    job: Job,
    model: AnyModel,
    reference: AnyModel | None = None,
    reward_model: AnyModel | None = None,
    keep: str = "",
) -> tuple[Figures, list[str]]:
    """Figures of a policy on held-out prompts, and its responses; `keep`: 32 of them are recorded
    under that name."""
    prompts = job.ready.prompts
    if not prompts or job.stopped:
        return {}, []
    gold = job.data.has_gold
    with job.meter.phase("evaluation"):
        figures, responses = policy_report(
            model,
            job.tokenizer,
            prompts,
            reference=reference,
            reward_model=reward_model,
            gold_parts=job.data.gold_parts if gold else None,
            gold_reward=job.data.gold_reward if gold else None,
            reward_tokenizer=job.plan.model.reward_tokenizer if reward_model else None,
            max_new_tokens=int(job.plan.settings.get("response_length", 64)),
        )
    if keep:
        rows = zip(prompts[:32], responses, strict=False)
        job.run.sample(
            0, [{"prompt": prompt_text(p), "response": r, "when": keep} for p, r in rows]
        )
    return figures, responses


def win_rate_figures(
    job: Job, reward_model: AnyModel | None, before: list[str], after: list[str]
) -> Figures:
    """How often the reward model prefers the response after training to the one before."""
    if not before or not after or reward_model is None:
        return {}
    rate = win_rate(reward_model, job.plan.model.reward_tokenizer, job.ready.prompts, before, after)
    return {"win_rate": rate}


def before_and_after(before: Figures, after: Figures) -> Figures:
    """Figures after training, and those from before as `before/<name>`."""
    return after | {f"before/{name}": value for name, value in before.items()}


def train_against_reference(job: Job, build: Build) -> Figures:
    """DPO and KTO: train the policy with TRL, and compare it with the SFT model it began as."""
    before, first = policy_figures(job, job.ready.models["policy"], keep="sft")
    model, figures = train_policy(job, build)
    after, last = policy_figures(job, model, job.plan.model.sft, keep=job.plan.stage)
    figures |= before_and_after(before, after)
    if "reward" in job.plan.model.paths:
        figures |= win_rate_figures(job, job.plan.model.reward, first, last)
    return figures
