"""PPO as a stage: our trainer, with the figures of a run around it."""

from __future__ import annotations

from ..data.reward_sources import gold_metrics
from ..ppo.trainer import PPOTrainer
from .job import (
    Figures,
    Job,
    before_and_after,
    cost_figures,
    policy_figures,
    run_loop,
    win_rate_figures,
)
from .prepare import reward_adapter


def train(job: Job) -> Figures:
    roles, adapter = job.ready.models, reward_adapter(job.plan, job.args.layout)
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
    before, first = policy_figures(job, policy, reward_model=reward, keep="" if kept else "sft")
    if job.resume:
        done = trainer.restore()
        job.run.rewind(done)
        if not job.quiet:
            print(f"ppo: going on after iteration {done} of {trainer.iterations}", flush=True)
    bar, earlier = job.progress(trainer.iterations - trainer.state.global_step), trainer.seconds

    def record(step: int, metrics: dict[str, float]) -> None:
        job.run.log(step, **metrics)
        if bar and "kl" in metrics:  # not held-out figures
            shown = {"reward": "reward", "KL": "kl", "gold": "gold_reward"}
            bar.update(
                1, "  ".join(f"{n} {metrics[k]:.2f}" for n, k in shown.items() if k in metrics)
            )

    trainer.on_log = record
    seconds = run_loop(job, trainer.train)
    job.meter.close()
    if bar:
        bar.close()
    model = getattr(policy, "switched", lambda: policy)()
    job.save(model)
    after, last = policy_figures(job, policy, reference, reward, keep="ppo")
    figures = cost_figures(job, earlier + seconds) | before_and_after(before, after)
    figures |= win_rate_figures(job, reward, first, last)
    job.whole(model)  # last: whoever shares the base with it is lost
    return figures
