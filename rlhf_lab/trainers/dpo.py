"""Direct preference optimisation, with TRL's DPOTrainer."""

from __future__ import annotations

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from ..ppo.logprobs import AnyModel
from .job import Figures, Job, train_against_reference
from .trl import Rows, data_set, without_printer


class TokenizedDPOTrainer(DPOTrainer):
    """DPOTrainer that takes rows whose tokens were made already."""

    def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
        return dataset


def build(
    model: AnyModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Rows,
    held_out: Rows,
    args: DPOConfig,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """Direct preference optimisation with TRL's DPOTrainer.

    The reference is a frozen copy, for a model with adapters the model with its adapters off. TRL
    takes adapters that are there already for trained ones, of which it would keep a second set as
    the reference: it gets the model without them, and their config.
    """
    lora = None
    if hasattr(model, "peft_config"):
        lora, model = model.peft_config["default"], model.unload()
    trainer = TokenizedDPOTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        callbacks=callbacks,
        peft_config=lora,
        train_dataset=data_set(train),
        eval_dataset=data_set(held_out),
    )
    return without_printer(trainer)


def train(job: Job) -> Figures:
    return train_against_reference(job, build)
