"""Rollouts: sample responses, then pass them through models that play the four roles.

Shapes: b = responses, p = prompt length, t = response length, s = p + t, n = real response tokens.
Prompts are padded on the left, so every response starts at position p; responses are padded on the
right. A pass moves its rows to the left; it is a trunk's pass and a head on the positions that
matter: a model's own head would make logits of prompts and of padding as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from ..data.lengths import LEAST_TOKENS_SAVED, by_length
from .logprobs import language_head, logprobs_and_entropy, scored_logprobs
from .losses import to_fp32
from .sampling import sample_tokens, uniforms


def pad_prompts(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Left-pad token lists (rule 5). → input_ids (b, p) and a boolean mask (b, p).

    An empty prompt is one padding token: a response needs a position to start from.
    """
    prompts = [prompt if len(prompt) else [pad_token_id] for prompt in prompts]
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_token_id)
    mask = torch.zeros((len(prompts), width), dtype=torch.bool)
    for row, prompt in enumerate(prompts):
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


def concat_prompt_response(
    prompt_ids: Tensor, prompt_mask: Tensor, responses: Tensor, mask: Tensor, pad: int
):
    """Prompt and truncated response as one sequence: ids (b, p+t), attention mask (b, p+t)."""
    ids = torch.cat([prompt_ids, responses.masked_fill(~mask, pad)], 1)
    return ids, torch.cat([prompt_mask, mask], 1)


def width_of(mask: Tensor) -> int:
    """Tokens of the longest row."""
    return int(mask.sum(1).max())


def forward_model(model, ids: Tensor, mask: Tensor):
    """One scoring pass of rows moved to the left, as wide as the longest: positions count real
    tokens from 0 (rule 5), and since nobody looks ahead, what pads a row on the right needs no
    mask: attention takes its fast path."""
    width, real = width_of(mask), mask.sum(1, keepdim=True)
    place = torch.arange(width, device=mask.device)
    source = mask.long().argmax(1, keepdim=True) + place
    moved = ids.gather(1, source.clamp(max=ids.shape[1] - 1)).masked_fill(place >= real, 0)
    return model(input_ids=moved, use_cache=False)


def places_of(said: Tensor) -> Tensor:
    """Where in the flattened mask its True positions are. (b, t) → (n,)"""
    return said.flatten().nonzero().squeeze(1)


def gather_masked(values: Tensor, said: Tensor) -> Tensor:
    """The numbers at the n True positions of a mask. (b, t) → (n,)"""
    return values.flatten()[places_of(said)]


def scatter_masked(values: Tensor, said: Tensor) -> Tensor:
    """(n,) numbers to the n True positions of a mask, zeros elsewhere. → (b, t)"""
    return values.new_zeros(said.shape).masked_scatter(said, values)


def response_hidden_states(model, ids: Tensor, mask: Tensor, said: Tensor) -> Tensor:
    """What the trunk says at t−1 of every response token of `said` (10). ids, mask: (b, s), said:
    (b, t) → hidden states (n, h), and nothing of padding.

    The last token predicts nothing and is left out of the pass.
    """
    ids, mask = ids[:, :-1], mask[:, :-1]
    hidden = forward_model(trunk_of(model), ids, mask).last_hidden_state
    place = torch.arange(said.shape[1], device=ids.device) + (ids.shape[1] - said.shape[1])
    at = place - mask.long().argmax(1, keepdim=True)  # in the rows that were moved
    at = at + torch.arange(len(ids), device=ids.device).unsqueeze(1) * hidden.shape[1]
    return hidden.flatten(0, 1).index_select(0, gather_masked(at, said))


Passes = list[Tensor]
"""Rows that pass together, pass by pass."""


def length_buckets(mask: Tensor, rows: int, least: int = LEAST_TOKENS_SAVED) -> Passes:
    """Rows of like length together, at most `rows` of them (`lengths.by_length`). mask: (b, s)"""
    parts = by_length(mask.sum(1).tolist(), rows, least)
    return [torch.tensor(part, device=mask.device) for part in parts]


def shape_of(passes: Passes, mask: Tensor, said: Tensor | None = None) -> tuple[int, ...]:
    """What the FLOPs of scoring passes are linear in: tokens, pairs, rows of logits, rows. `mask`:
    of what passes; without `said` there are no logits."""
    sizes = [(len(rows), width_of(mask[rows])) for rows in passes]
    tokens, pairs = (sum(n * s**power for n, s in sizes) for power in (1, 2))
    logits = () if said is None else (int(said.sum()),)
    return tokens, pairs, *logits, len(mask)


def trunk_of(model):
    """The transformer below the head of a language, reward or value model; adapters stay in it."""
    model = model.get_base_model() if hasattr(model, "peft_config") else model
    return getattr(model, model.base_model_prefix)


def score_head(model, hidden: Tensor) -> Tensor:
    """The score of each hidden state, (…, h) → (…). `score_offset` of its config belongs to the
    head (rule 16)."""
    scores = model.score(hidden).squeeze(-1)
    return to_fp32(scores) + getattr(model.config, "score_offset", 0.0)


def token_values(model, ids: Tensor, mask: Tensor, said: Tensor) -> Tensor:
    """The value head at the positions before the response tokens of `said`. → (b, t), fp32."""
    return scatter_masked(score_head(model, response_hidden_states(model, ids, mask, said)), said)


def sequence_scores(model, ids: Tensor, mask: Tensor) -> Tensor:
    """The reward model's score of each sequence, at its last real token. → (b,) fp32 (rule 6)."""
    hidden = forward_model(trunk_of(model), ids, mask).last_hidden_state
    last = mask.sum(1) - 1  # rows were moved to the left
    return score_head(model, hidden[torch.arange(len(ids), device=ids.device), last])


def map_chunks(function: Callable[..., Tensor], passes: Passes | int, *tensors: Tensor) -> Tensor:
    """Apply `function` to some rows of `tensors` at a time and join: what it makes inside is freed
    (24). → (b, …)

    passes: from `length_buckets`, or how many rows at a time; the second tensor is the mask.
    """
    found = None
    for rows in length_buckets(tensors[1], passes) if isinstance(passes, int) else passes:
        part = function(*(x[rows] for x in tensors))
        found = part.new_zeros(len(tensors[1]), *part.shape[1:]) if found is None else found
        found[rows] = part
    return found


def response_logprobs(
    model, ids, mask, responses, temperature=1.0, passes: Passes | int = 32
) -> Tensor:
    """log π of every response token, without keeping logits beyond a pass. → (b, t) fp32, 0 where
    the mask says there is none."""

    def one(ids, mask, responses):
        said = mask[:, -responses.shape[1] :]
        hidden = response_hidden_states(model, ids, mask, said)
        return scatter_masked(
            scored_logprobs(model, hidden, gather_masked(responses, said), temperature), said
        )

    return map_chunks(one, passes, ids, mask, responses)


def response_values(model, ids, mask, said, passes: Passes | int = 32) -> Tensor:
    """The value at every response token of `said`. → (b, t) fp32, 0 elsewhere."""
    return map_chunks(lambda *part: token_values(model, *part), passes, ids, mask, said)


def logprobs_and_values(
    model, value, ids, mask, responses, said, temperature=1.0, passes: Passes | int = 32
):
    """`response_logprobs` and `response_values` from one pass of the trunk that the two share."""

    def one(ids, mask, responses, said):
        hidden = response_hidden_states(model, ids, mask, said)
        logprobs = scored_logprobs(model, hidden, gather_masked(responses, said), temperature)
        both = logprobs, score_head(value, hidden)
        return torch.stack([scatter_masked(x, said) for x in both], -1)

    return map_chunks(one, passes, ids, mask, responses, said).unbind(-1)


def trained_logprobs(model, hidden: Tensor, responses: Tensor, said: Tensor, temperature: float):
    """log π with its gradient, and the entropy, of the response tokens of `said`, whose hidden
    states (n, h) are given. → (b, t) each."""
    logits = language_head(model, hidden)
    both = logprobs_and_entropy(logits, gather_masked(responses, said), temperature)
    return tuple(scatter_masked(x, said) for x in both)


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

    @cached_property  # looks into numbers, which a GPU has to be waited for
    def work(self) -> tuple[tuple[int, ...], int]:
        """Of one pass: what its FLOPs are linear in, and its real tokens."""
        whole = [torch.arange(len(self.ids))]
        return shape_of(whole, self.attention[:, :-1], self.value_mask), int(self.attention.sum())

    def passes(self, rows: int, least: int) -> Passes:
        """Places of rows of like length, pass by pass (`length_buckets`)."""
        return length_buckets(self.attention, rows, least)
