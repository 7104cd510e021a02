"""KTO, with TRL's KTOTrainer: answers that are each labelled good or bad, no pairs needed.

Kahneman-Tversky optimisation (Ethayarajh et al., 2402.01306): a good answer should be more likely
under the policy than under the reference by more than the policy has drifted on the whole, a bad
one less likely. The drift, a KL, is estimated in each batch from answers to *other* prompts.
"""

from __future__ import annotations

import random

from datasets import Dataset
from trl import KTOConfig, KTOTrainer

from .trl import Rows


class TokenizedKTOTrainer(KTOTrainer):
    """KTOTrainer that takes rows with `prompt_ids`, `completion_ids` and `label`.

    Raises ValueError for a batch of one row, in which there is no other prompt.
    """

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: object, args: KTOConfig, *_: object
    ) -> Dataset:
        if "KL_completion_ids" in dataset.column_names:
            return dataset
        return Dataset.from_list(mismatched(dataset.to_list(), args))


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
    if not rows:
        raise ValueError("KTO needs an answer to another prompt: one row alone has none")
    found = []
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        answers = [row["completion_ids"] for row in batch]
        found += [
            {**row, "KL_completion_ids": other}
            for row, other in zip(batch, [answers[-1], *answers[:-1]], strict=True)
        ]
    return found
