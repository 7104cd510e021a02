"""What a model is worth, on prompts and pairs that no stage has trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..data.schema import Example, Prompt
from ..data.tokenize import encode_prompt, encode_response, encoded_rows, stop_ids
from ..ppo.losses import kl_estimate, response_mask
from ..ppo.rollout import concat_prompt_response, response_logprobs
from ..ppo.sampling import pad_prompts
from ..ppo.texts import sample_texts, score_texts

GoldReward: TypeAlias = Callable[..., float]
"""Prompt, response → 0 to 10."""


@torch.no_grad()
def kl_from_reference(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
) -> Tensor:
    """k1 and k3 estimates of KL(policy‖reference) in nats per response. → (n, 2).

    A response that is text only is scored with its stop token, as if it had stopped there.
    """
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    pairs = zip(responses, prompts, strict=True)
    answers = [encode_response(tokenizer, r, p) for r, p in pairs]
    encoded = [encode_prompt(tokenizer, p) for p in prompts]
    out = torch.empty(len(answers), 2)
    order = sorted(range(len(answers)), key=lambda i: len(answers[i]))
    for start in range(0, len(order), 64):
        part = order[start : start + 64]
        prompt_ids, prompt_mask = pad_prompts([encoded[i] for i in part], pad)
        width = max(len(answers[i]) for i in part)
        rows = torch.full((len(part), width), eos)
        for row, i in enumerate(part):
            rows[row, : len(answers[i])] = torch.tensor(answers[i])
        mask = response_mask(rows, stop_ids(tokenizer))
        ids, attention = (
            x.to(model.device)
            for x in concat_prompt_response(prompt_ids, prompt_mask, rows, mask, pad)
        )
        rows, mask = rows.to(model.device), mask.to(model.device)
        new, old = (response_logprobs(m, ids, attention, rows) for m in (model, reference))
        for column, kind in enumerate(("k1", "k3")):
            out[part, column] = (kl_estimate(new, old, kind) * mask).sum(1).cpu()
    return out


def policy_report(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    prompt_ids: Sequence[Prompt] | None = None,
    gold_parts: Callable[..., dict[str, float]] | None = None,
    gold_reward: GoldReward | None = None,
    reward_model: PreTrainedModel | None = None,
    reward_tokenizer: Tokenizer | None = None,
    reference: PreTrainedModel | None = None,
    max_new_tokens: int = 64,
    seed: int = 1234,
) -> tuple[dict[str, float], list[str]]:
    """Sample one response per prompt. → means of its figures, the responses.

    `prompt_ids`: the prompts' tokens, where they were made before.
    `gold_reward`, `gold/<part>`: means over prompts; `reward`: the reward model's mean score, in
    tokens of `reward_tokenizer` where it has its own;
    `kl`, `kl_k3`: nats per response from `reference`; `length`: words.
    """
    asked = prompts if prompt_ids is None else prompt_ids
    sampled = sample_texts(model, tokenizer, asked, max_new_tokens=max_new_tokens, seed=seed)
    responses = [s[0] for s in sampled]
    figures = {"length": sum(len(r.split()) for r in responses) / len(responses)}
    if gold_reward:
        golds = [gold_reward(p, r) for p, r in zip(prompts, responses, strict=True)]
        figures["gold_reward"] = sum(golds) / len(golds)
    if gold_parts:
        parts = [gold_parts(p, r) for p, r in zip(prompts, responses, strict=True)]
        for name in parts[0]:
            figures[f"gold/{name}"] = sum(p[name] for p in parts) / len(parts)
    if reward_model is not None:
        theirs = reward_tokenizer or tokenizer
        read = asked if theirs is tokenizer else prompts
        figures["reward"] = float(score_texts(reward_model, theirs, read, responses).mean())
    if reference is not None:
        kl = kl_from_reference(model, reference, tokenizer, asked, responses).mean(0)
        figures["kl"], figures["kl_k3"] = float(kl[0]), float(kl[1])
    return figures, responses


def pair_accuracy(
    reward_model: PreTrainedModel, tokenizer: Tokenizer, pairs: Sequence[Example]
) -> tuple[float, Tensor]:
    """Share of pairs whose chosen response scores higher. → accuracy, score differences (n,), of
    the pairs that the chat template can write. Accuracy is NaN where a score is no number."""
    encoded = list(encoded_rows(tokenizer, pairs, ["chosen", "rejected"], {}))
    prompts = [prompt for _, prompt, _ in encoded]
    chosen = score_texts(reward_model, tokenizer, prompts, [a[0] for *_, a in encoded])
    rejected = score_texts(reward_model, tokenizer, prompts, [a[1] for *_, a in encoded])
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
    """Accuracy where the higher gold reward is the better one; ties of the gold are left out."""
    gaps = gold_gaps(pairs, gold_reward)
    clear = gaps.abs() > 1e-9
    return float(((margin > 0) == (gaps > 0))[clear].float().mean())


def win_rate(
    reward_model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    before: Sequence[str],
    after: Sequence[str],
) -> float:
    """Share of prompts whose response after scores higher than the one before; ties count half.

    `tokenizer`: the reward model's.
    """
    old, new = (score_texts(reward_model, tokenizer, prompts, texts) for texts in (before, after))
    return float(((new > old).float() + (new == old).float() / 2).mean())
