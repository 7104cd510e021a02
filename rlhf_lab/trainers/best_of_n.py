"""Best-of-n: draw n responses from a policy, keep the one that the reward model likes best.

The baseline that trains nothing: all of its cost falls on every answer (n responses are sampled
and scored for one that is read), where PPO pays once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..data.schema import Example, Prompt
from ..data.tokenize import prompt_of
from ..display import counted
from ..models.weights import embeddings, grow_embeddings
from ..ppo.texts import sample_ids
from .evaluate import GoldReward, answers_to, score_answers


@dataclass
class Drawn:
    """`samples` responses to each of p prompts: what each scores, is worth, and took."""

    texts: list[list[str]]
    scores: Tensor  # (p, samples) fp64, of the reward model
    golds: Tensor | None  # (p, samples) fp64, where the data have a gold reward
    tokens: Tensor  # (p, samples), eos counted


def draw(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    reward_model: PreTrainedModel,
    prompts: Sequence[Prompt | Example],
    samples: int,
    *,
    gold_reward: GoldReward | None = None,
    reward_tokenizer: Tokenizer | None = None,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 99,
    progress: Callable[[int], None] | None = None,
) -> Drawn:
    """Sample and score, as the evaluation of every stage does."""
    ids = sample_ids(
        model,
        tokenizer,
        prompts,
        samples=samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        progress=progress,
    )
    if reward_tokenizer in (None, tokenizer):
        grow_embeddings(reward_model, embeddings(model))
    asked, sampled = [p for p in prompts for _ in range(samples)], [a for row in ids for a in row]
    answers = answers_to(tokenizer, asked, sampled, max_new_tokens)
    scores = score_answers(reward_model, tokenizer, reward_tokenizer, answers)
    pairs = zip(map(prompt_of, asked), answers.texts, strict=True)
    golds = None if gold_reward is None else [gold_reward(p, t) for p, t in pairs]
    shape = len(prompts), samples
    return Drawn(
        [answers.texts[i : i + samples] for i in range(0, len(asked), samples)],
        scores.double().view(shape),
        None if golds is None else torch.tensor(golds, dtype=torch.float64).view(shape),
        torch.tensor([[len(r) for r in row] for row in ids]),
    )


def order_weights(total: int, n: int) -> Tensor:
    """How often each of `total` sorted samples is the largest of n drawn without replacement.

    The i-th smallest is the largest of C(i−1, n−1) of the C(total, n) subsets. → (total,) fp64.
    """
    if not 1 <= n <= total:
        raise ValueError(f"best of {n} out of {counted(total, 'sample')}: choose 1 to {total}")
    ways = math.comb(total, n)
    return torch.tensor([math.comb(i, n - 1) / ways for i in range(total)], dtype=torch.float64)


def expected_best(scores: Tensor, values: Tensor, n: int) -> Tensor:
    """The mean of `values` where n of the samples are drawn and that of highest score is kept,
    over all subsets of n: as if they had all been tried. scores, values: (p, total) → (p,).

    An unbiased estimate of best-of-n's value from more samples than n. Of equal scores the later
    sample counts as the higher one.
    """
    order = scores.argsort(dim=1, stable=True)
    return values.gather(1, order) @ order_weights(scores.shape[1], n).to(values)
