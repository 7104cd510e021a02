"""Rows as a trainer sees them: token ids as tensors, for who writes a loss by hand."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..data.load import Data
from ..data.tokenize import encoded_rows
from ..stages import STAGES


class Sequences(NamedTuple):
    """Prompts with one answer each, padded on the right."""

    ids: Tensor  # (b, t) token ids, eos included
    real: Tensor  # (b, t) True where a token is no padding
    response: Tensor  # (b, t) True where it belongs to the answer

    def __repr__(self) -> str:
        rows, width = self.ids.shape
        tokens = f"{int(self.response.sum())} response tokens of {int(self.real.sum())} real ones"
        return f"Sequences({rows} × {width}: {tokens})"


def first_batch(
    stage: str, tokenizer: Tokenizer, data: Data, rows: int, split: str = "train"
) -> dict[str, Sequences]:
    """The first `rows` rows of a stage's split: {column: its sequences}. Raises ValueError for a
    stage whose rows hold no answers, and for data without rows for it."""
    spec = STAGES[stage]
    if not spec.columns:
        raise ValueError(f"{stage} samples its answers: there is no batch before it has")
    examples = getattr(getattr(data, spec.rows), split)[:rows]
    dropped: dict[str, int] = {}
    encoded = list(encoded_rows(tokenizer, examples, spec.columns, dropped))
    if not encoded:
        raise ValueError(f"{data.name} has no rows for {stage}: {dropped or 'none to train on'}")
    return {
        column: _padded([(prompt, ids[i]) for _, prompt, ids in encoded], tokenizer.pad_token_id)
        for i, column in enumerate(spec.columns)
    }


def _padded(rows: list[tuple[list[int], list[int]]], pad: int) -> Sequences:
    def stacked(made: list[list[int]], fill: int) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in made], True, fill)

    ids = stacked([prompt + answer for prompt, answer in rows], pad)
    real = stacked([[1] * len(prompt + answer) for prompt, answer in rows], 0).bool()
    response = stacked([[0] * len(p) + [1] * len(a) for p, a in rows], 0).bool()
    return Sequences(ids, real, response)
