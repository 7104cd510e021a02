"""From text to tokens and back: sampling and scoring of texts, and records token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.chat import EncodedPrompt
from ..data.schema import Dropped, Example, Prompt
from ..data.tokenize import encode_prompt, encode_response, row_prompt_ids, stop_ids
from .logprobs import AnyModel
from .losses import response_mask
from .rollout import Advantages, Rollout, concat_prompt_response, response_logprobs, sequence_scores
from .sampling import generate, pad_prompts, row_keys

Tokenizer = PreTrainedTokenizerBase
Row = Example
"""A row of a data set: `prompt` (text or messages) or ready-made `input_ids`, other columns."""
TokenRecord = dict[str, list[str] | list[int] | list[float]]
"""Figures of a response, token by token, as the rollout inspector reads them: lists of one length.

    text        the token as it reads; without the special ones, joined, they are the response
    logprob     log π of the policy that sampled, nats
    log_ratio   log π − log π_ref, nats: the k1 estimate of the KL of that token
    value       what the critic expected before the token was sampled
    reward      what the token earned: −β·KL, and the score on the last one
    advantage   whitened, as trained on
    return      what the critic learns: advantage before whitening + value

and `special`, the places of special tokens. A figure that was not computed is left out.
"""
DIGITS, DECIMALS = 4, 6  # a record is text in a file that grows with every iteration


@torch.no_grad()
def sample_ids(
    model: AnyModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt | Row],
    *,
    samples: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    batch: int = 256,
    numbers: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[list[list[int]]]:
    """`samples` responses for each prompt, as ids up to and with the stop token. A seed gives the
    same to prompts of the same `numbers` [their places]."""
    model.eval()
    jobs = [(i, s) for i in range(len(prompts)) for s in range(samples)]
    encoded = [row_prompt_ids(tokenizer, p) for p in prompts]
    jobs.sort(key=lambda job: len(encoded[job[0]]))  # less padding; the noise does not change
    sampled: dict[tuple[int, int], list[int]] = {}
    for start in range(0, len(jobs), batch):
        part = jobs[start : start + batch]
        asked = {i: place for place, i in enumerate(dict.fromkeys(i for i, _ in part))}
        ids, mask = pad_prompts([encoded[i] for i in asked], tokenizer.pad_token_id)
        index = torch.tensor([(numbers[i] if numbers else i, s) for i, s in part])
        prompt_of = torch.tensor([asked[i] for i, _ in part], device=model.device)
        keys = row_keys(seed, 0, index[:, 0], index[:, 1])
        responses = generate(
            model,
            ids.to(model.device),
            mask.to(model.device),
            keys.to(model.device),
            max_new_tokens=max_new_tokens,
            stop_token_ids=stop_ids(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            temperature=temperature,
            prompt_of=prompt_of if len(asked) < len(part) else None,
        )
        real = response_mask(responses, stop_ids(tokenizer))
        for job, row, m in zip(part, responses, real, strict=True):
            sampled[job] = row[m].tolist()
        if progress:
            progress(len(part))
    return [[sampled[i, s] for s in range(samples)] for i in range(len(prompts))]


def which_ended(tokenizer: Tokenizer, rows: Sequence[list[int]], limit: int) -> list[bool]:
    """Which sampled responses ended by themselves: short of the limit, or with a stop token."""
    stops = stop_ids(tokenizer)
    return [len(ids) < limit or ids[-1] in stops for ids in rows]


def decode(tokenizer: Tokenizer, responses: Tensor, mask: Tensor | None = None) -> list[str]:
    """Text of each response where the mask is True (without one up to the stop token), special
    tokens left out. responses, mask: (b, t)."""
    if mask is None:
        mask = response_mask(responses, stop_ids(tokenizer))
    rows = [r[m].tolist() for r, m in zip(responses, mask, strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


def encode_pair(
    tokenizer: Tokenizer, prompt: Prompt | Row, response: str | list[int], ended: bool = True
) -> list[int]:
    """Prompt and response as one sequence of ids; what closes a text is left out of one that was
    cut. Ids are taken as they are."""
    read = EncodedPrompt(tokenizer, prompt)
    try:
        answer = read.response_ids(response)
    except Dropped:  # the reward model's template cannot write what was sampled
        answer = EncodedPrompt(tokenizer, read.ids).response_ids(response)
    if isinstance(response, str) and not ended:
        answer = answer[:-1]
    return read.ids + answer


@torch.no_grad()
def score_texts(
    model: AnyModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt | Row],
    responses: Sequence[str | list[int]],
    batch: int = 256,
    ended: Sequence[bool] | None = None,
) -> Tensor:
    """The reward model's score of each (prompt, response), ids or text; a text is ended as in
    training, where it had `ended` (None: all had). → (n,).

    `tokenizer`: the reward model's.
    """
    model.eval()
    rows = [
        encode_pair(tokenizer, p, r, end)
        for p, r, end in zip(prompts, responses, ended or [True] * len(responses), strict=True)
    ]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    scores = torch.empty(len(rows))
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        ids, mask = pad_prompts([rows[i] for i in part], tokenizer.pad_token_id)
        device = next(model.parameters()).device
        scores[part] = sequence_scores(model, ids.to(device), mask.to(device)).cpu()
    return scores


# ------------------------------------------------------------------------------- token by token


@torch.no_grad()
def token_record(
    tokenizer: Tokenizer, rows: Rollout, advantages: Advantages | None = None
) -> list[TokenRecord]:
    """A record for each response of some rows of a rollout (`rollout.rows(…)`).

    advantages: of the same rows; None for held-out prompts, which nothing is learned from.
    """
    figures = {
        "logprob": rows.logprobs,
        "log_ratio": rows.logprobs - rows.ref_logprobs,
        "value": rows.values,
    }
    if advantages is not None:
        figures |= {
            "reward": advantages.rewards,
            "advantage": advantages.advantages,
            "return": advantages.returns,
        }
    # One copy from the device, whatever there is to record.
    numbers = torch.stack([x.float() for x in figures.values()]).cpu()
    responses = zip(rows.responses.cpu(), rows.mask.cpu(), numbers.unbind(1), strict=True)
    return [_record(tokenizer, ids[m].tolist(), figures, x[:, m]) for ids, m, x in responses]


@torch.no_grad()
def score_tokens(
    policy: AnyModel,
    reference: AnyModel | None,
    tokenizer: Tokenizer,
    prompt: Prompt,
    response: str | list[int],
    temperature: float = 1.0,
) -> TokenRecord:
    """The record of any response to any prompt: log π and, with a reference, the log-ratio.

    For what a run recorded as text only (SFT, DPO, held-out prompts). A text is scored with its
    stop token, as if it had stopped there.
    """
    answer = torch.tensor([encode_response(tokenizer, response, prompt)])
    mask = response_mask(answer, stop_ids(tokenizer))
    ids, attention = pad_prompts([encode_prompt(tokenizer, prompt)], tokenizer.pad_token_id)
    ids, attention = concat_prompt_response(ids, attention, answer, mask, tokenizer.pad_token_id)

    def logprobs(model: AnyModel) -> Tensor:
        device = next(model.parameters()).device
        sequence = ids.to(device), attention.to(device), answer.to(device)
        return response_logprobs(model, *sequence, temperature)

    figures = {"logprob": logprobs(policy)}
    if reference is not None:
        ref = logprobs(reference).to(figures["logprob"].device)
        figures["log_ratio"] = figures["logprob"] - ref
    numbers = torch.stack([x.float() for x in figures.values()]).cpu()
    return _record(tokenizer, answer[mask].tolist(), figures, numbers[:, mask])


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[list[str], list[int]]:
    """How each token reads, and the places of special ones, which read as they are called.

    The others, joined, are what the tokenizer makes of all of them, and a token is what it adds to
    the ones before. A character of several tokens (a byte-level tokenizer's "é") belongs to the
    token that completes it; those before it read as "".
    """
    added = tokenizer.added_tokens_decoder.items()
    special = {i for i, token in added if token.special} | set(tokenizer.all_special_ids)
    places = [k for k, i in enumerate(ids) if i in special]
    plain = [i for i in ids if i not in special]
    whole, start, texts = str(tokenizer.decode(plain)), 0, list[str]()
    for count in range(1, len(plain) + 1):
        end = _agreeing(str(tokenizer.decode(plain[:count])), whole, start)
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


def _record(
    tokenizer: Tokenizer, ids: list[int], names: Iterable[str], numbers: Tensor
) -> TokenRecord:
    """numbers: (figure, token), in the order of `names`."""
    texts, special = token_texts(tokenizer, ids)
    record: TokenRecord = {"text": texts, "special": special}
    for name, figures in zip(names, numbers.tolist(), strict=True):
        record[name] = [_short(x) for x in figures]
    return record


def _short(x: float) -> float:
    """DIGITS significant ones; below DECIMALS it is rounding that fp32 left."""
    return round(float(f"{x:.{DIGITS}g}"), DECIMALS)
