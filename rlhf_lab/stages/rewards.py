"""What a response is worth: the reward model's score and reward functions, added up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .rollout import in_chunks, sequence_scores
from .texts import call_reward, decode


def call_rewards(
    functions: Sequence[Callable], tokenizer, rows: list[dict], responses: Tensor, mask: Tensor
) -> list[Tensor]:
    """What each function says of the responses, decoded once for all of them. → (b,) each."""
    if not functions:
        return []
    texts = decode(tokenizer, responses, mask)
    ids = [r[m].tolist() for r, m in zip(responses, mask, strict=True)]
    return [call_reward(f, rows, texts, ids) for f in functions]


class Rewards:
    """Scores whole responses. `model`: the reward model or None; `functions`: as GRPOTrainer calls
    them."""

    def __init__(self, model, functions: Callable | Sequence[Callable] | None, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.functions = [functions] if callable(functions) else list(functions or ())
        if model is None and not self.functions:
            raise ValueError("PPO needs a reward_model or reward_funcs")

    def score(
        self, ids: Tensor, attention: Tensor, responses: Tensor, mask: Tensor, rows: list[dict],
        chunk: int,
    ) -> Tensor:  # fmt: skip
        """One score for each response, `chunk` rows at a time through the model. → (b,) fp32."""
        scores = torch.zeros(len(ids), device=ids.device)
        if (judge := self.model) is not None:
            scores = in_chunks(lambda *x: sequence_scores(judge, *x), chunk, ids, attention)
        for said in call_rewards(self.functions, self.tokenizer, rows, responses, mask):
            # A reward of None does not apply: it adds nothing.
            scores = scores + said.nan_to_num(0.0).to(scores)
        return scores
