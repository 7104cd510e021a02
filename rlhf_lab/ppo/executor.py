"""How the trainer's loops run: over the tokens of a response, and over the rows of a batch.

`PPOTrainer` and `Rewards` take an `Executor`. This one does all of the work. The x-ray passes one
that does the first turns of each loop and counts the others (`simulate/shortcuts.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from ..data.lengths import LEAST_TOKENS_SAVED, by_length
from ..stages import Setting
from . import losses, sampling
from .sampling import LanguageModel

Buckets = list[Tensor]
"""Rows that pass together, pass by pass: the places of each, (rows,)."""


class Executor:
    """The loops of `PPOTrainer`, each turn of them. `even`: every process makes the same number of
    passes, since each is one of all processes."""

    even = False

    def generate(self, model: LanguageModel, *prompts: Tensor, **settings: Setting) -> Tensor:
        """`sampling.generate`: token by token. (b, p) → (b, t)."""
        return sampling.generate(model, *prompts, **settings)

    def length_buckets(self, mask: Tensor, rows: int, least: int = LEAST_TOKENS_SAVED) -> Buckets:
        """Rows of like length together, at most `rows` of them (`lengths.by_length`).

        mask: (b, s); least: tokens of padding that one more pass has to save.
        """
        parts = by_length(mask.sum(1).tolist(), rows, sys.maxsize if self.even else least)
        return [torch.tensor(part, device=mask.device) for part in parts]

    def map_chunks(
        self, function: Callable[..., Tensor], buckets: Buckets, *tensors: Tensor
    ) -> Tensor:
        """Rule 24: no logits of a whole rollout are ever held: apply `function` to the rows of one
        bucket at a time; what it makes inside is freed. tensors: (b, …) each → (b, …)."""
        out: Tensor | None = None
        for rows in buckets:
            part = function(*(x[rows] for x in tensors))
            out = part.new_zeros(len(tensors[0]), *part.shape[1:]) if out is None else out
            out[rows] = part
        assert out is not None, "no rows"
        return out

    def compute_gae(
        self, rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
    ) -> tuple[Tensor, Tensor]:
        """`losses.compute_gae`: token by token from the last. (b, t) → (b, t), (b, t)."""
        return losses.compute_gae(rewards, values, mask, gamma, lam)

    def run_minibatch(
        self, train: Callable[[Tensor], dict[str, float]], rows: Tensor
    ) -> dict[str, float]:
        """One optimizer step of an update: `train` on the minibatch's rows, (rows,) places."""
        return train(rows)
