"""PPO as a stage: our trainer, with the figures of a run around it."""

from __future__ import annotations

from torch import Tensor

from ..data.reward_sources import gold_metrics
from ..ppo.checkpoint import take_settings
from ..ppo.trainer import PPOTrainer
from ..runs.progress import note
from .job import Figures, Job, before_and_after, cost_figures, evaluate_policy, run_loop
from .prepare import reward_adapter


def train(job: Job) -> Figures:
    roles, adapter = job.ready.models, reward_adapter(job.plan, job.args.layout)
    trainer = (job.trainer or PPOTrainer)(
        job.args,
        job.tokenizer,
        roles["policy"],
        roles["reference"],
        roles["reward"],
        job.ready.train,
        roles["value"],
        reward_funcs=job.functions,
        reward_processing_class=None if adapter else job.plan.model.reward_tokenizer,
        eval_dataset=job.ready.prompts,
        metric_funcs=gold_metrics(job.data),
        meter=job.meter,
        on_sample=job.run.sample,
        should_stop=job.should_stop,
        replaced=job.losses,
    )
    policy, reference, reward = trainer.policy, trainer.reference, trainer.reward_model
    models = trainer.sharding
    with models.gathered(policy), models.passes(reward):
        before = evaluate_policy(job, policy, reward_model=reward, keep="sft")
    if job.resume:
        done, clone = trainer.restore(), job.run.config.get("clone", {})
        if done == clone.get("step"):  # a checkpoint of the run that it was cloned from
            take_settings(trainer, clone["changed"])
        job.run.rewind(done)
        if not job.quiet:
            print(f"ppo: going on after iteration {done} of {trainer.iterations}", flush=True)
    bar, earlier = job.progress(trainer.iterations, trainer.state.global_step), trainer.seconds

    def record(step: int, metrics: dict[str, float]) -> None:
        job.run.log(step, **metrics)
        if bar and "kl" in metrics:  # not held-out figures
            bar.update(1, note(metrics))

    trainer.on_log = record
    seconds = run_loop(job, trainer.train)
    job.meter.close()
    if bar:
        bar.close()
    model = getattr(policy, "switched", lambda: policy)()
    if models.even:  # each process has parts of it
        weights: dict[str, Tensor] = models.state(model)
        job.weights = weights if job.run.writes else {}
    job.save(model)
    job.weights = None
    with models.gathered(policy), models.passes(reference, reward):
        after = evaluate_policy(job, policy, reference, reward)
        figures = before_and_after(job, before, after, reward)
    figures = cost_figures(job, earlier + seconds) | figures
    job.whole(model, anew=models.even)  # last: whoever shares the base with it is lost
    return figures
