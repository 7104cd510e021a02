"""Supervised fine-tuning, with TRL's SFTTrainer."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from .job import Figures, Job, before_and_after, policy_figures, train_policy
from .trl import Rows, data_set, without_printer


def build(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Rows,
    held_out: Rows,
    args: SFTConfig,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """Supervised fine-tuning with TRL's SFTTrainer; loss on the response only."""
    trainer = SFTTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        callbacks=callbacks,
        train_dataset=data_set(train),
        eval_dataset=data_set(held_out),
    )
    return without_printer(trainer)


def train(job: Job) -> Figures:
    before, _ = policy_figures(job, job.ready.models["policy"], keep="base")
    model, figures = train_policy(job, build)
    after, _ = policy_figures(job, model, keep="sft")
    return figures | before_and_after(before, after)
