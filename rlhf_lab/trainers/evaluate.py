"""What a model is worth, on prompts and pairs that no stage has trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..data.schema import Example, Prompt
from ..data.tokenize import encoded_rows, prompt_of, prompt_rows, row_prompt_ids
from ..ppo.losses import kl_estimate
from ..ppo.rollout import concat_prompt_response, response_logprobs
from ..ppo.sampling import pad_prompts
from ..ppo.texts import sample_ids, score_texts, which_ended

if TYPE_CHECKING:
    from ..data.load import Data
    from ..models.load import Model

GoldReward: TypeAlias = Callable[..., float]
"""Prompt, response → 0 to 10."""


@dataclass
class Answers:
    """One response to each prompt, as it was sampled, and its figures: what is reported are their
    means."""

    prompts: Sequence[Prompt | Example]
    prompt_ids: list[list[int]]
    ids: list[list[int]]
    """up to and with the stop token, where one was sampled"""
    texts: list[str]
    ended: list[bool]
    """whether a stop token was sampled"""
    figures: dict[str, list[float]]

    def rows(self) -> list[Example]:
        """One for each response, as a run records it."""
        names = ("prompt_ids", "ids", "ended", *self.figures)
        columns = (self.prompt_ids, self.ids, self.ended, *self.figures.values())
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def answers_to(
    tokenizer: Tokenizer, prompts: Sequence[Prompt | Example], ids: list[list[int]], limit: int
) -> Answers:
    """Sampled responses of at most `limit` tokens, one for each prompt, read and measured."""
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    figures = {"length": [float(len(text.split())) for text in texts]}
    asked = [row_prompt_ids(tokenizer, p) for p in prompts]
    return Answers(prompts, asked, ids, texts, which_ended(tokenizer, ids, limit), figures)


def padded_answers(
    pad: int, prompts: Sequence[list[int]], responses: Sequence[list[int]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompts and responses, as ids, to pass through a model: → (ids (b, s), attention (b, s),
    responses (b, t), their mask (b, t))."""
    prompt_ids, prompt_mask = pad_prompts(prompts, pad)
    rows = pad_sequence([torch.tensor(x) for x in responses], batch_first=True, padding_value=pad)
    mask = pad_sequence([torch.ones(len(x)).bool() for x in responses], batch_first=True)
    whole = concat_prompt_response(prompt_ids, prompt_mask, rows, mask, pad)
    ids, attention, rows, mask = (x.to(device) for x in (*whole, rows, mask))
    return ids, attention, rows, mask


def held_out_prompts(model: Model, data: Data, count: int, length: int) -> list[Example]:
    """At most so many held-out prompts that leave room for a response of `length` tokens. Raises
    ValueError for none."""
    rows = (data.prompts.test or data.prompts.train)[:count]
    kept, _ = prompt_rows(model.tokenizer, rows, model.context - length)
    if not kept:
        raise ValueError(f"{data.name} has no prompt that leaves room for {length} tokens")
    return kept


@torch.no_grad()
def _logprobs(
    models: Sequence[PreTrainedModel],
    pad: int,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
) -> Iterator[tuple[list[int], list[Tensor], Tensor]]:
    """64 responses at a time: → their places (b,), log-probs of their tokens under each model, and
    a mask of these tokens, (b, t)."""
    order = sorted(range(len(responses)), key=lambda i: len(responses[i]))
    for start in range(0, len(order), 64):
        part = order[start : start + 64]
        asked, sampled = [prompts[i] for i in part], [responses[i] for i in part]
        ids, attention, rows, mask = padded_answers(pad, asked, sampled, models[0].device)
        yield part, [response_logprobs(m, ids, attention, rows) for m in models], mask


def kl_from_reference(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt | Example],
    responses: Sequence[list[int]],
) -> Tensor:
    """k1 and k3 estimates of KL(policy‖reference) in nats per response, of its sampled ids.
    → (n, 2)."""
    encoded = [row_prompt_ids(tokenizer, p) for p in prompts]
    out = torch.empty(len(responses), 2)
    both = model, reference
    for part, (new, old), mask in _logprobs(both, tokenizer.pad_token_id, encoded, responses):
        for column, kind in enumerate(("k1", "k3")):
            out[part, column] = (kl_estimate(new, old, kind) * mask).sum(1).cpu()
    return out


def kl_per_token(answers: Answers) -> float:
    """KL to the reference of `policy_report` in nats a token, by k3."""
    return sum(answers.figures["kl_k3"]) / sum(map(len, answers.ids))


def perplexity(model: PreTrainedModel, tokenizer: Tokenizer, rows: Sequence[Example]) -> float:
    """Of the rows' completions, their ends included: exp of the mean nats a token."""
    encoded = [
        (prompt, ids) for _, prompt, (ids,) in encoded_rows(tokenizer, rows, ["completion"], {})
    ]
    prompts, responses = zip(*encoded, strict=True)
    nats, tokens = 0.0, 0
    for _, (logprobs,), mask in _logprobs([model], tokenizer.pad_token_id, prompts, responses):
        nats -= float((logprobs * mask).double().sum())
        tokens += int(mask.sum())
    return math.exp(nats / tokens)


def score_answers(
    reward_model: PreTrainedModel,
    tokenizer: Tokenizer,
    reward_tokenizer: Tokenizer | None,
    answers: Answers,
) -> Tensor:
    """The reward model's score of each response's sampled ids; of its text, where the model has a
    tokenizer of its own. → (n,)."""
    if reward_tokenizer is None or reward_tokenizer is tokenizer:
        return score_texts(reward_model, tokenizer, answers.prompt_ids, answers.ids)
    asked, texts, ended = answers.prompts, answers.texts, answers.ended
    return score_texts(reward_model, reward_tokenizer, asked, texts, ended=ended)


def policy_report(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt | Example],
    *,
    gold_parts: Callable[..., dict[str, float]] | None = None,
    gold_reward: GoldReward | None = None,
    reward_model: PreTrainedModel | None = None,
    reward_tokenizer: Tokenizer | None = None,
    reference: PreTrainedModel | None = None,
    max_new_tokens: int = 64,
    seed: int = 1234,
) -> tuple[dict[str, float], Answers]:
    """Sample one response per prompt. → means of its figures, the responses.

    `prompts`: prompts, or rows with one each.
    `gold_reward`, `gold/<part>`: means over prompts; `reward`: the reward model's mean score, in
    tokens of `reward_tokenizer` where it has its own;
    `kl`, `kl_k3`: nats per response from `reference`; `length`: words. All are of what was sampled:
    a response that did not end is not given an end.
    """
    sampled = sample_ids(model, tokenizer, prompts, max_new_tokens=max_new_tokens, seed=seed)
    answers = answers_to(tokenizer, prompts, [ids for (ids,) in sampled], max_new_tokens)
    figures = answers.figures
    pairs = list(zip(map(prompt_of, prompts), answers.texts, strict=True))
    if gold_reward:
        figures["gold_reward"] = [gold_reward(p, r) for p, r in pairs]
    if gold_parts:
        parts = [gold_parts(p, r) for p, r in pairs]
        figures |= {f"gold/{name}": [p[name] for p in parts] for name in parts[0]}
    if reward_model is not None:
        scores = score_answers(reward_model, tokenizer, reward_tokenizer, answers)
        figures["reward"] = scores.tolist()
    if reference is not None:
        kl = kl_from_reference(model, reference, tokenizer, answers.prompt_ids, answers.ids)
        figures["kl"], figures["kl_k3"] = kl.T.tolist()
    return {name: sum(x) / len(x) for name, x in figures.items()}, answers


def pair_scores(
    reward_model: PreTrainedModel, tokenizer: Tokenizer, pairs: Sequence[Example]
) -> Tensor:
    """Scores of the chosen and of the rejected response, of the pairs that the chat template can
    write. → (n, 2)."""
    encoded = list(encoded_rows(tokenizer, pairs, ["chosen", "rejected"], {}))
    prompts = [prompt for _, prompt, _ in encoded]
    each = [[answers[i] for *_, answers in encoded] for i in (0, 1)]
    return torch.stack([score_texts(reward_model, tokenizer, prompts, ids) for ids in each], 1)


def pair_accuracy(
    reward_model: PreTrainedModel, tokenizer: Tokenizer, pairs: Sequence[Example]
) -> tuple[float, Tensor]:
    """Share of pairs whose chosen response scores higher. → accuracy, score differences (n,), of
    the pairs that the chat template can write. Accuracy is NaN where a score is no number."""
    chosen, rejected = pair_scores(reward_model, tokenizer, pairs).unbind(1)
    margin = chosen - rejected
    known = bool(margin.isfinite().all())
    return float((margin > 0).float().mean()) if known else math.nan, margin


def gold_gaps(pairs: Sequence[Example], gold_reward: GoldReward) -> Tensor:
    """Gold reward of the chosen response minus that of the rejected one. → (n,)."""
    return torch.tensor(
        [
            gold_reward(p["prompt"], p["chosen"]) - gold_reward(p["prompt"], p["rejected"])
            for p in pairs
        ]
    )


def noise_free_accuracy(pairs: Sequence[Example], margin: Tensor, gold_reward: GoldReward) -> float:
    """Accuracy where the higher gold reward is the better one; ties of the gold are left out.
    margin: (n,) score of the chosen response less that of the rejected one."""
    gaps = gold_gaps(pairs, gold_reward)
    clear = gaps.abs() > 1e-9
    return float(((margin > 0) == (gaps > 0))[clear].float().mean())


def win_rate(before: Tensor, after: Tensor) -> float:
    """Share of prompts whose response after scores higher than the one before; ties count half.
    before, after: (n,) scores of the reward model."""
    return float(((after > before).float() + (after == before).float() / 2).mean())
