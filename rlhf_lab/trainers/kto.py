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

    As TRL: within a batch the answers move on by a row (`KL_completion_ids`), and the order is that
    of the data set. It is shuffled here first: files are sorted by label or by prompt, and TRL
    shuffles nothing. Where a row would then meet another answer to its own prompt, answers move on
    by as many rows as leave the fewest such. A last batch of one row is left out.
    """
    size, rows = args.per_device_train_batch_size, list(rows)
    random.Random(args.seed).shuffle(rows)
    if args.loss_type == "apo_zero_unpaired":  # has no such term
        return rows
    if len(rows) % size == 1:
        rows.pop()
    if not rows:
        raise ValueError("KTO needs an answer to another prompt: one row alone has none")
    return [row for i in range(0, len(rows), size) for row in _moved(rows[i : i + size])]


def _moved(batch: Rows) -> Rows:
    """The rows of a batch, each with the answer of the one `by` places before it."""

    def met_again(by: int) -> int:
        return sum(row["prompt_ids"] == batch[i - by]["prompt_ids"] for i, row in enumerate(batch))

    by = min(range(1, max(2, len(batch))), key=met_again)
    return [
        {**row, "KL_completion_ids": batch[i - by]["completion_ids"]} for i, row in enumerate(batch)
    ]
