"""Rollouts: sample responses, then pass them through models that play the four roles.

Shapes: b = responses, p = prompt length, t = response length, s = p + t. Prompts are padded on the
left, so every response starts at position p; responses are padded on the right. A pass is a trunk's
pass and a head on the positions that matter: a model's own head in a scoring pass would make logits
of the prompt as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..lengths import PASS, by_length
from .logprobs import language_head, logprobs_and_entropy, scored_logprobs
from .maths import wide
from .sampling import sample_tokens, uniforms


def pad_prompts(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Left-pad token lists (rule 5). → input_ids (b, p) and a boolean mask (b, p)."""
    width = max(1, *map(len, prompts))  # even an empty prompt needs a position to start from
    ids = torch.full((len(prompts), width), pad_token_id)
    mask = torch.zeros((len(prompts), width), dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        if len(prompt):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = True
    return ids, mask


def positions_of(mask: Tensor) -> Tensor:
    """Position ids = exclusive cumulative sum of the mask (rule 5; N+ detail 5). (b, s)."""
    return (mask.long().cumsum(1) - mask.long()).clamp(min=0)


@torch.no_grad()
def generate(
    model,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    keys: Tensor,
    *,
    max_new_tokens: int,
    stop_token_id: int | None,
    pad_token_id: int,
    temperature: float = 1.0,
) -> Tensor:
    """Sample one response per prompt with a KV cache. (b, p) → responses (b, t), t ≤ the limit.

    Noise is keyed per row (`sampling.row_keys`). A row leaves the batch when it has stopped, so
    nothing is computed for finished rows. Sampling uses the temperature only (rule 1);
    temperature 0 takes the likeliest token.
    """
    rows = torch.arange(prompt_ids.shape[0], device=prompt_ids.device)  # those still running
    out = prompt_ids.new_full((len(rows), max_new_tokens), pad_token_id)
    mask, tokens, cache, length = prompt_mask, prompt_ids.masked_fill(~prompt_mask, 0), None, 0
    positions = positions_of(mask)
    for length in range(1, max_new_tokens + 1):
        result = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits, cache = result.logits[:, -1].float(), result.past_key_values
        if temperature == 0:
            tokens = logits.argmax(-1)
        else:
            tokens = sample_tokens(logits, uniforms(keys[rows], length - 1), temperature)
        out[rows, length - 1] = tokens
        going = tokens != stop_token_id if stop_token_id is not None else tokens >= 0
        positions = positions[:, -1:] + 1
        if not going.all():
            if not going.any():
                break
            keep = going.nonzero().squeeze(1)
            rows, tokens, positions, mask = (x[keep] for x in (rows, tokens, positions, mask))
            cache.batch_select_indices(keep)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        tokens = tokens.unsqueeze(1)
    return out[:, :length]


def join(prompt_ids: Tensor, prompt_mask: Tensor, responses: Tensor, mask: Tensor, pad: int):
    """Prompt and truncated response as one sequence: ids (b, p+t), attention mask (b, p+t)."""
    ids = torch.cat([prompt_ids, responses.masked_fill(~mask, pad)], 1)
    return ids, torch.cat([prompt_mask, mask], 1)


def forward_model(model, ids: Tensor, mask: Tensor, **kwargs):
    """One scoring pass: padding replaced by token 0, positions counted from the mask (rule 5)."""
    return model(
        input_ids=ids.masked_fill(~mask, 0),
        attention_mask=mask,
        position_ids=positions_of(mask),
        use_cache=False,
        **kwargs,
    )


def before_responses(model, ids: Tensor, mask: Tensor, length: int) -> Tensor:
    """What the trunk says at t−1 of every response token (10). → hidden states (b, length, h).

    The last token predicts nothing and is left out of the pass.
    """
    return forward_model(trunk_of(model), ids[:, :-1], mask[:, :-1]).last_hidden_state[:, -length:]


Passes = list[tuple[Tensor, slice]]
"""Rows that pass together, pass by pass, and the columns of their sequences that hold tokens."""


def like_rows(mask: Tensor, rows: int, least: int = PASS) -> Passes:
    """Rows of like length together, at most `rows` of them (`lengths.by_length`). mask: (b, s),
    padded on the left, on the right, or on both sides."""
    places = torch.arange(mask.shape[1], device=mask.device)
    first = mask.long().argmax(1)
    last = (mask * places).argmax(1)
    middle = int(first.max())
    before, after = (middle - first).tolist(), (last + 1 - middle).tolist()
    found = []
    for part in by_length(before, after, rows, least):
        columns = slice(middle - max(before[i] for i in part), middle + max(after[i] for i in part))
        found.append((torch.tensor(part, device=mask.device), columns))
    return found


def shape_of(passes: Passes, ids: Tensor, responses: Tensor | None = None) -> tuple[int, ...]:
    """`pass_shape` of all passes together; without `responses` there are no rows of logits."""
    sizes = [(len(rows), at.stop - at.start, at.stop) for rows, at in passes]
    tokens, pairs = (sum(n * s**power for n, s, _ in sizes) for power in (1, 2))
    if responses is None:
        return tokens, pairs, len(ids)
    prompt = ids.shape[1] - responses.shape[1]
    return tokens, pairs, sum(n * (stop - prompt) for n, _, stop in sizes), len(ids)


def pass_shape(ids: Tensor, responses: Tensor) -> tuple[int, int, int, int]:
    """What the FLOPs of a scoring pass are linear in: tokens, pairs, rows of logits, rows."""
    rows, length = ids.shape
    return rows * length, rows * length**2, responses.numel(), rows


def trunk_of(model):
    """The transformer below the head of a language, reward or value model; adapters stay in it."""
    model = model.get_base_model() if hasattr(model, "peft_config") else model
    return getattr(model, model.base_model_prefix)


def score_head(model, hidden: Tensor) -> Tensor:
    """The score of each hidden state, (…, h) → (…). `score_offset` of its config belongs to the
    head (rule 16)."""
    scores = model.score(hidden).squeeze(-1)
    return wide(scores) + getattr(model.config, "score_offset", 0.0)


def token_values(model, ids: Tensor, mask: Tensor, length: int) -> Tensor:
    """The value head at the positions before each response token. → (b, length), fp32."""
    return score_head(model, before_responses(model, ids, mask, length))


def sequence_scores(model, ids: Tensor, mask: Tensor) -> Tensor:
    """The reward model's score of each sequence, at its last real token. → (b,) fp32 (rule 6)."""
    hidden = forward_model(trunk_of(model), ids, mask).last_hidden_state
    last = (mask.long() * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    return score_head(model, hidden[torch.arange(len(ids), device=ids.device), last])


def in_passes(
    function: Callable[..., Tensor], passes: Passes | int, ids: Tensor, mask: Tensor,
    responses: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Apply `function` to some rows at a time, without the columns that are padding in all of them,
    and join: what it makes inside is freed (24). → (b, …); where it says something of every token
    of `responses`, (b, t, …) with zeros beyond the longest response of a pass.

    passes: from `like_rows`, or how many rows at a time.
    """
    found = None
    for rows, at in like_rows(mask, passes) if isinstance(passes, int) else passes:
        part = [ids[rows, at], mask[rows, at]]
        if responses is not None:
            part.append(responses[rows, : responses.shape[1] - mask.shape[1] + at.stop])
        said = function(*part)
        if found is None:
            by_token = () if responses is None else (responses.shape[1],)
            found = said.new_zeros(len(mask), *by_token, *said.shape[1 + len(by_token) :])
        found[(rows,) if responses is None else (rows, slice(said.shape[1]))] = said
    return found


def response_logprobs(
    model, ids, mask, responses, temperature=1.0, passes: Passes | int = 32
) -> Tensor:
    """log π of every response token, without keeping logits beyond a pass. → (b, t) fp32."""

    def one(ids, mask, responses):
        hidden = before_responses(model, ids, mask, responses.shape[1])
        return scored_logprobs(model, hidden, responses, temperature)

    return in_passes(one, passes, ids, mask, responses)


def response_values(model, ids, mask, responses, passes: Passes | int = 32) -> Tensor:
    """The value at every response token. → (b, t) fp32."""

    def one(ids, mask, responses):
        return token_values(model, ids, mask, responses.shape[1])

    return in_passes(one, passes, ids, mask, responses)


def logprobs_and_values(
    model, value, ids, mask, responses, temperature=1.0, passes: Passes | int = 32
):
    """`response_logprobs` and `response_values` from one pass of the trunk that the two share."""

    def one(ids, mask, responses):
        hidden = before_responses(model, ids, mask, responses.shape[1])
        logprobs = scored_logprobs(model, hidden, responses, temperature)
        return torch.stack([logprobs, score_head(value, hidden)], -1)

    return in_passes(one, passes, ids, mask, responses).unbind(-1)


def trained_logprobs(model, hidden: Tensor, responses: Tensor, temperature: float):
    """The same with gradients, and the entropy. hidden: (b, t, h) → log π, entropy (b, t) each."""
    logits = language_head(model, hidden).flatten(0, 1)
    both = logprobs_and_entropy(logits, responses.flatten(), temperature)
    return tuple(x.view(responses.shape) for x in both)


@dataclass
class Rollout:
    """A batch of responses and all that is known of them before the update. b rows each."""

    index: Tensor  # (b,) which prompt of the data set
    ids: Tensor  # (b, s) left-padded prompt + response, padded after the stop token
    attention: Tensor  # (b, s) True on real tokens
    responses: Tensor  # (b, t)
    mask: Tensor  # (b, t) True up to and including the stop token
    value_mask: Tensor  # (b, t) where values count; `mask`, but for the parity switch
    logprobs: Tensor  # (b, t) log π_old
    ref_logprobs: Tensor  # (b, t) log π_ref
    values: Tensor  # (b, t) V_old
    scores: Tensor  # (b,) reward of the whole response
    advantages: Tensor  # (b, t) whitened
    returns: Tensor  # (b, t)

    def rows(self, chosen: Tensor) -> Rollout:
        return Rollout(**{f.name: getattr(self, f.name)[chosen] for f in fields(self)})

    @property
    def work(self) -> tuple[tuple[int, ...], int]:
        """Of one pass: what its FLOPs are linear in, and its real tokens."""
        return pass_shape(self.ids, self.responses), int(self.attention.sum())

    def passes(self, rows: int, least: int) -> list[Tensor]:
        """Places of rows of like length, pass by pass (`like_rows`)."""
        said = self.mask | self.value_mask
        real = torch.cat([self.attention[:, : -said.shape[1]], said], 1)
        return [places for places, _ in like_rows(real, rows, least)]

    def trimmed(self) -> Rollout:
        """Without the columns that are padding in every row: prompts on the left, responses on the
        right."""
        t = self.responses.shape[1]
        prompt, said = self.attention[:, :-t].any(0), (self.mask | self.value_mask).any(0)
        left = len(prompt) - int(prompt.sum())
        right = t - max(1, int(said.sum()))
        ends = {"ids": slice(left, -right or None), "attention": slice(left, -right or None)}
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return Rollout(**{
            n: x[:, ends.get(n, slice(t - right))] if x.dim() == 2 else x for n, x in parts.items()
        })  # fmt: skip
