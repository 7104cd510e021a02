"""What is known of a response token by token, as the rollout inspector reads it.

A record is lists of one length, a place for each response token:

    text        the token as it reads; without the special ones, joined, they are the response
    logprob     log π of the policy that sampled, nats
    log_ratio   log π − log π_ref, nats: the k1 estimate of the KL of that token
    value       what the critic expected before the token was said
    reward      what the token earned: −β·KL, and the score on the last one
    advantage   whitened, as trained on
    return      what the critic learns: advantage before whitening + value

and `special`, the places of special tokens. A record has the figures that its maker knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.tokenize import encode_prompt, encode_response
from .losses import response_mask
from .rollout import Rollout, concat_prompt_response, pad_prompts, response_logprobs

DIGITS, DECIMALS = 4, 6  # a record is text in a file that grows with every iteration


@torch.no_grad()
def token_record(
    tokenizer, rows: Rollout, rewards: Tensor | None = None
) -> list[dict[str, list[Any]]]:
    """A record for each response of a few rows of a rollout (`rollout.rows(…)`).

    rewards: (b, t) what `compute_advantages` made of KL and score, of the same rows; None for
    held-out prompts: then advantage and return are not known either.
    """
    figures = {
        "logprob": rows.logprobs,
        "log_ratio": rows.logprobs - rows.ref_logprobs,
        "value": rows.values,
    }
    if rewards is not None:
        figures |= {"reward": rewards, "advantage": rows.advantages, "return": rows.returns}
    # One copy from the device, whatever there is to keep.
    numbers = torch.stack([x.float() for x in figures.values()]).cpu()
    kept = zip(rows.responses.cpu(), rows.mask.cpu(), numbers.unbind(1), strict=True)
    return [_record(tokenizer, ids[m].tolist(), figures, x[:, m]) for ids, m, x in kept]


@torch.no_grad()
def score_tokens(
    policy, reference, tokenizer, prompt, response: str | list[int], temperature: float = 1.0
) -> dict[str, list[Any]]:
    """The record of any response to any prompt: log π and, with a reference, the log-ratio.

    For what a run kept as text only (SFT, DPO, held-out prompts). A text is scored with its stop
    token, as if it had stopped there.
    """
    answer = torch.tensor([encode_response(tokenizer, response)])
    mask = response_mask(answer, tokenizer.eos_token_id)
    ids, attention = pad_prompts([encode_prompt(tokenizer, prompt)], tokenizer.pad_token_id)
    ids, attention = concat_prompt_response(ids, attention, answer, mask, tokenizer.pad_token_id)
    what = [x.to(next(policy.parameters()).device) for x in (ids, attention, answer)]
    figures = {"logprob": response_logprobs(policy, *what, temperature)}
    if reference is not None:
        what = [x.to(next(reference.parameters()).device) for x in what]
        there = response_logprobs(reference, *what, temperature).to(figures["logprob"].device)
        figures["log_ratio"] = figures["logprob"] - there
    numbers = torch.stack([x.float() for x in figures.values()]).cpu()
    return _record(tokenizer, answer[mask].tolist(), figures, numbers[:, mask])


def token_texts(tokenizer, ids: Sequence[int]) -> tuple[list[str], list[int]]:
    """How each token reads, and the places of special ones, which read as they are called.

    The others, joined, are what the tokenizer makes of all of them, and a token is what it adds to
    the ones before. A character of several tokens (a byte-level tokenizer's "é") belongs to the
    token that completes it; those before it read as "".
    """
    added = tokenizer.added_tokens_decoder.items()
    special = {i for i, token in added if token.special} | set(tokenizer.all_special_ids)
    places = [k for k, i in enumerate(ids) if i in special]
    plain = [i for i in ids if i not in special]
    whole, start, texts = tokenizer.decode(plain), 0, []
    for count in range(1, len(plain) + 1):
        end = _agreeing(tokenizer.decode(plain[:count]), whole, start)
        end = len(whole) if count == len(plain) else end
        texts.append(whole[start:end])
        start = end
    for k in places:
        texts.insert(k, str(tokenizer.convert_ids_to_tokens(ids[k])))
    return texts, places


def _agreeing(part: str, whole: str, start: int) -> int:
    """How far the two read alike, from `start` on, which is where they are known to."""
    end = min(len(part), len(whole))
    if part[start:end] == whole[start:end]:
        return max(end, start)
    return next(i for i in range(start, end) if part[i] != whole[i])


def _record(tokenizer, ids: list[int], names, numbers: Tensor) -> dict[str, list[Any]]:
    """numbers: (figure, token), in the order of `names`."""
    texts, special = token_texts(tokenizer, ids)
    figures = zip(names, numbers.tolist(), strict=True)
    return {"text": texts, "special": special} | {n: [_short(x) for x in xs] for n, xs in figures}


def _short(x: float) -> float:
    """DIGITS significant ones; below DECIMALS it is rounding that fp32 left."""
    return round(float(f"{x:.{DIGITS}g}"), DECIMALS)
