"""Supervised fine-tuning, with TRL's SFTTrainer."""

from __future__ import annotations

from datasets import Dataset
from trl import SFTTrainer

from .job import Figures, Job, before_and_after, policy_figures, train_policy
from .trl import without_printer


def build(model, tokenizer, train, held_out, args, callbacks):
    """Supervised fine-tuning with TRL's SFTTrainer; loss on the response only."""
    trainer = SFTTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        callbacks=callbacks,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(held_out) if held_out else None,
    )
    return without_printer(trainer)


def train(job: Job) -> Figures:
    before, _ = policy_figures(job, job.ready.models["policy"], keep="base")
    model, figures = train_policy(job, build)
    after, _ = policy_figures(job, model, keep="sft")
    return figures | before_and_after(before, after)
