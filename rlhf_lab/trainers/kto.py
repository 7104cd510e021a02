"""KTO, with TRL's KTOTrainer: answers that are each labelled good or bad, no pairs needed.

Kahneman-Tversky optimisation (Ethayarajh et al., 2402.01306): a good answer should be more likely
under the policy than under the reference by more than the policy has drifted on the whole, a bad
one less likely. The drift, a KL, is estimated in each batch from answers to *other* prompts.
"""

from __future__ import annotations

import random

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from trl import KTOConfig, KTOTrainer

from ..ppo.logprobs import AnyModel
from .job import Figures, Job, train_against_reference
from .trl import Rows, data_set, without_printer


class TokenizedKTOTrainer(KTOTrainer):
    """KTOTrainer that takes rows whose tokens were made already."""

    def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
        return dataset


def build(
    model: AnyModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Rows,
    held_out: Rows,
    args: KTOConfig,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """Its trainer. The reference is a frozen copy, for a model with adapters the model without.

    `train`, `held_out`: rows with `prompt_ids`, `completion_ids`, `label`. Raises ValueError for a
    batch of one row, in which there is no other prompt.
    """
    lora = None
    if hasattr(model, "peft_config"):
        lora, model = model.peft_config["default"], model.unload()
    trainer = TokenizedKTOTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        callbacks=callbacks,
        peft_config=lora,
        train_dataset=data_set(mismatched(train, args)),
        eval_dataset=data_set(mismatched(held_out, args)),
    )
    return without_printer(trainer)


def mismatched(rows: Rows, args: KTOConfig) -> Rows:
    """Rows in the order in which they are trained on, each with an answer to another prompt.

    As TRL: within a batch the answers move on by one row (`KL_completion_ids`), and the order is
    that of the data set. It is shuffled here first, or the two answers of a pair, which stand side
    by side, would be taken for answers to different prompts. A last batch of one row is left out.
    """
    if args.loss_type == "apo_zero_unpaired":  # has no such term
        return list(rows)
    size, rows = args.per_device_train_batch_size, list(rows)
    random.Random(args.seed).shuffle(rows)
    if len(rows) % size == 1:
        rows.pop()
    found = []
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        answers = [row["completion_ids"] for row in batch]
        found += [
            {**row, "KL_completion_ids": other}
            for row, other in zip(batch, [answers[-1], *answers[:-1]], strict=True)
        ]
    return found


def train(job: Job) -> Figures:
    return train_against_reference(job, build)
