"""One stage from a plan to its figures: the training, and what is measured before and after it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from ..data.load import Data
from ..data.reward_sources import gold_metrics
from ..data.tokenize import prompt_text
from ..ppo.adapters import POLICY, SCORE_FILE
from ..runs.ledger import ONLINE
from ..runs.progress import Progress
from ..runs.run import Run
from ..studies import predicted
from .prepare import Prepared, prepare, reward_adapter


@dataclass
class Job:
    """One training in progress: what the stage functions below share."""

    plan: Any
    data: Data
    run: Run
    meter: Any
    ready: Prepared
    quiet: bool
    should_stop: Callable[[], bool] | None
    resume: bool = False
    """go on from the run's last checkpoint"""
    dashboard: Any = None
    """a dashboard that shows the run while it is made"""
    stopped: bool = False
    """whether somebody ended the training early: what is left is saved, and not judged"""

    @property
    def tokenizer(self):
        return self.plan.model.tokenizer

    @property
    def args(self):
        return self.plan.config(str(self.run.folder / "trainer"))

    def progress(self, total: int):
        """What counts the steps of the loop: the dashboard, a line of text, or nothing."""
        if self.dashboard is not None:
            return self.dashboard.follow(total)
        return None if self.quiet else Progress(total, self.plan.stage)

    def save(self, model) -> None:
        """A model in the transformers layout, its tokenizer beside it; adapters in `adapter/`."""
        if not self.run.writes:
            return
        adapted = hasattr(model, "peft_config")
        folder = self.run.folder / ("adapter" if adapted else "model")
        model.save_pretrained(folder, **({"selected_adapters": [POLICY]} if adapted else {}))
        self.tokenizer.save_pretrained(folder)

    def whole(self, model):
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


def _looped(job: Job, work: Callable[[], Any]) -> float:
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


def _costs(job: Job, seconds: float) -> dict[str, Any]:
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


def _trl_stage(job: Job, role: str, start: Callable) -> tuple[Any, dict[str, Any]]:
    """Run one of TRL's trainers on the model of a role; → trainer, costs."""
    from .trl_stages import Watch

    watch = Watch(job.meter, role, job.run.log, job.progress, job.should_stop)
    ready = job.ready
    trainer = start(ready.models[role], job.tokenizer, ready.train, ready.test, job.args, watch)
    seconds = _looped(job, trainer.train)
    watch.close()
    job.save(trainer.model)  # before anything else can fail or be interrupted
    return trainer, _costs(job, seconds)


def _trl_policy(job: Job, start: Callable) -> tuple[Any, dict[str, Any]]:
    """Train the policy with TRL; → the trained model, costs and held-out loss."""
    trainer, figures = _trl_stage(job, "policy", start)
    if job.ready.test and not job.stopped:
        figures["eval_loss"] = trainer.evaluate()["eval_loss"]
    return job.whole(trainer.model), figures


def _sft(job: Job):
    from .trl_stages import sft_trainer

    before, _ = _policy_figures(job, job.ready.models["policy"], keep="base")
    model, figures = _trl_policy(job, sft_trainer)
    after, _ = _policy_figures(job, model, keep="sft")
    return figures | _before_after(before, after)


def _reward(job: Job):
    from .evaluate import noise_free_accuracy, pair_accuracy
    from .trl_stages import reward_trainer, set_score_offset

    trainer, figures = _trl_stage(job, "reward", reward_trainer)
    model = job.whole(trainer.model)
    pairs = job.data.preferences.test
    if pairs and not job.stopped:
        accuracy, margin = pair_accuracy(model, job.tokenizer, pairs)
        figures |= {"accuracy": accuracy, "held_out_pairs": len(pairs)}
        if job.data.has_gold:
            figures["accuracy_ceiling"] = job.data.accuracy_ceiling(pairs)
            gold = job.data.gold_reward
            figures["noise_free_accuracy"] = noise_free_accuracy(pairs, margin, gold)
    # Rule 16: demonstrations score 0 on average; kept in the config, where PPO finds it.
    demonstrations = (job.data.sft.train or job.data.preferences.train)[:256]
    figures["score_offset"] = set_score_offset(model, job.tokenizer, demonstrations)
    job.save(model)
    if job.plan.lora:  # what its config says of a whole model
        beside = job.run.folder / "adapter" / SCORE_FILE
        beside.write_text(json.dumps({"score_offset": figures["score_offset"]}) + "\n")
    return figures


def _dpo(job: Job):
    from .trl_stages import dpo_trainer

    before, told = _policy_figures(job, job.ready.models["policy"], keep="sft")
    model, figures = _trl_policy(job, dpo_trainer)
    after, answers = _policy_figures(job, model, job.plan.model.sft, keep="dpo")
    figures |= _before_after(before, after)
    if "reward" in job.plan.model.paths:
        figures |= _wins(job, job.plan.model.reward, told, answers)
    return figures


def _ppo(job: Job):
    from ..ppo.trainer import PPOTrainer

    roles, adapter = job.ready.models, reward_adapter(job.plan)
    trainer = PPOTrainer(
        job.args,
        job.tokenizer,
        roles["policy"],
        roles["reference"],
        roles["reward"],
        job.ready.train,
        roles["value"],
        reward_funcs=job.ready.functions,
        reward_processing_class=None if adapter else job.plan.model.reward_tokenizer,
        eval_dataset=[{"prompt": p} for p in job.ready.prompts],
        metric_funcs=gold_metrics(job.data),
        meter=job.meter,
        on_sample=job.run.sample,
        should_stop=job.should_stop,
    )
    policy, reference, reward = trainer.policy, trainer.reference, trainer.reward_model
    kept = any(row.get("when") == "sft" for row in job.run.samples)
    before, told = _policy_figures(job, policy, reward_model=reward, keep="" if kept else "sft")
    if job.resume:
        done = trainer.restore()
        job.run.rewind(done)
        if not job.quiet:
            print(f"ppo: going on after iteration {done} of {trainer.iterations}", flush=True)
    bar, earlier = job.progress(trainer.iterations - trainer.state.global_step), trainer.seconds

    def record(step: int, metrics: dict) -> None:
        job.run.log(step, **metrics)
        if bar and "kl" in metrics:  # not held-out figures
            shown = {"reward": "reward", "KL": "kl", "gold": "gold_reward"}
            bar.update(
                1, "  ".join(f"{n} {metrics[k]:.2f}" for n, k in shown.items() if k in metrics)
            )

    trainer.on_log = record
    seconds = _looped(job, trainer.train)
    job.meter.close()
    if bar:
        bar.close()
    model = getattr(policy, "switched", lambda: policy)()
    job.save(model)
    after, answers = _policy_figures(job, policy, reference, reward, keep="ppo")
    figures = _costs(job, earlier + seconds) | _before_after(before, after)
    figures |= _wins(job, reward, told, answers)
    job.whole(model)  # last: whoever shares the base with it is lost
    return figures


def _online(job: Job):
    """RLOO and GRPO, with the figures of PPO."""
    from .online import OnlineWatch, RewardFunction, online_trainer

    roles, stage = job.ready.models, job.plan.stage
    reward = roles.get("reward")
    before, told = _policy_figures(job, roles["policy"], reward_model=reward, keep="sft")
    reward_function = RewardFunction(
        reward,
        job.tokenizer,
        job.args,
        meter=job.meter,
        on_sample=job.run.sample,
        metric_funcs=gold_metrics(job.data),
        reward_funcs=job.ready.functions,
        reward_tokenizer=job.plan.model.reward_tokenizer,
    )
    watch = OnlineWatch(job.meter, reward_function, job.run.log, job.progress, job.should_stop)
    trainer = online_trainer(
        roles["policy"],
        roles.get("reference"),
        job.tokenizer,
        job.ready.train,
        job.args,
        reward_function,
        watch,
    )
    seconds = _looped(job, trainer.train)
    watch.close()
    job.save(trainer.model)
    reference = roles.get("reference") or job.plan.model.sft
    after, answers = _policy_figures(job, job.whole(trainer.model), reference, reward, keep=stage)
    figures = _costs(job, seconds) | _before_after(before, after)
    return figures | _wins(job, reward, told, answers)


def _policy_figures(
    job: Job, model, reference=None, reward_model=None, keep=""
) -> tuple[dict[str, float], list[str]]:
    """What a policy is worth on held-out prompts, and what it said; `keep` records some of it."""
    from .evaluate import policy_report

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


def _wins(job: Job, reward_model, before: list[str], after: list[str]) -> dict[str, float]:
    """How often the reward model prefers the response after training to the one before."""
    from .evaluate import win_rate

    if not before or not after or reward_model is None:
        return {}
    rate = win_rate(reward_model, job.plan.model.reward_tokenizer, job.ready.prompts, before, after)
    return {"win_rate": rate}


def _before_after(before: dict, after: dict) -> dict[str, float]:
    """Figures after training, and those from before as `before/<name>`."""
    return after | {f"before/{name}": value for name, value in before.items()}


STAGE_FUNCTIONS = {
    "sft": _sft,
    "reward": _reward,
    "ppo": _ppo,
    "dpo": _dpo,
    "rloo": _online,
    "grpo": _online,
}


def run_plan(
    plan,
    data: Data,
    functions: Sequence[Callable],
    open_run: Callable[[], Run],
    *,
    quiet: bool,
    should_stop: Callable[[], bool] | None,
    resume: bool,
    dashboard: Any = None,
) -> Run:
    """Train what was planned, with all that surrounds it; → the run that `open_run` makes, once
    everything is loaded. `dashboard`: what shows it while it trains."""
    from ..metering.meter import Meter

    say = dashboard.say if dashboard is not None else lambda text: None
    say("loading models and data")
    ready = prepare(plan, data, quiet, functions)
    foretold = predicted(plan, data, quiet)
    run, meter = open_run(), Meter(plan.stage)
    quiet = quiet or not run.writes  # of several processes the first one speaks
    job = Job(
        plan,
        data,
        run,
        meter,
        ready,
        quiet,
        should_stop,
        resume,
        dashboard=dashboard if run.writes else None,
    )
    if job.dashboard is not None:
        job.dashboard.open(run, lambda: foretold + meter.ledger())
        say("judging the model before training")
    try:
        figures = STAGE_FUNCTIONS[plan.stage](job)
    except KeyboardInterrupt:  # before the loop, or after it
        meter.close()
        job.stopped, figures = True, {}
    except BaseException as error:
        meter.close()  # what was being counted would be counted on and on
        run.save_ledger(foretold + meter.ledger())
        run.finish("failed", error=f"{type(error).__name__}: {error}")
        raise
    run.save_ledger(foretold + meter.ledger())
    run.finish("stopped" if job.stopped else "finished", **figures)
    if not job.stopped and run.writes:  # the model is there: its checkpoints have served
        shutil.rmtree(run.folder / "trainer", ignore_errors=True)
    return run
