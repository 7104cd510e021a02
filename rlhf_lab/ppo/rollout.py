"""Rollouts: what was sampled, and its passes through the models of the four roles.

Shapes: b = responses, p = prompt length, t = response length, s = p + t, n = real response tokens.
Prompts are padded on the left, so every response starts at position p; responses are padded on the
right. A pass moves its rows to the left; it is a trunk's pass and a head on the positions that
matter: a model's own head would make logits of prompts and of padding as well.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .compiled import is_compiled
from .executor import Buckets, Executor
from .logprobs import AnyModel, language_head, logprobs_and_entropy, scored_logprobs
from .losses import StopTokens, is_stop, to_fp32

if TYPE_CHECKING:
    from typing import Self

    from accelerate import Accelerator

CHUNK = 32
"""Rows of a pass, where nobody chooses."""

# -------------------------------------------------------------------------------- what was sampled


@dataclass(frozen=True)
class _Rows:
    """Tensors of b rows each."""

    def rows(self, places: Tensor) -> Self:
        """The same of some rows. places: (rows,)"""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return type(self)(**{n: None if v is None else v[places] for n, v in values.items()})


@dataclass(frozen=True)
class Samples(_Rows):
    """Prompts and sampled responses; b rows each."""

    index: Tensor  # (b,) which prompt of the data set
    prompt_ids: Tensor  # (b, p) padded on the left
    prompt_mask: Tensor  # (b, p) True on real tokens
    responses: Tensor  # (b, t) whatever stands after the first stop token
    engine_logprobs: Tensor | None = None  # (b, t) log π of another engine (`rollout_engines.py`)


@dataclass(frozen=True)
class Rollout(_Rows):
    """A batch of responses, sampled and scored; b rows each. It never changes."""

    index: Tensor  # (b,) which prompt of the data set
    ids: Tensor  # (b, s) left-padded prompt + response, padded after the stop token
    attention: Tensor  # (b, s) True on real tokens
    responses: Tensor  # (b, t)
    mask: Tensor  # (b, t) True up to and including the stop token
    logprobs: Tensor  # (b, t) log π_old, 0 where masked
    ref_logprobs: Tensor  # (b, t) log π_ref, 0 where masked
    values: Tensor  # (b, t) V_old, 0 where masked
    scores_raw: Tensor  # (b,) what the sources of reward say of the whole response
    engine_logprobs: Tensor | None = None  # (b, t) log π of the engine that sampled, 0 where masked

    def stopped(self, stop_token_ids: StopTokens) -> Tensor:
        """Which responses hold a stop token. → (b,) bool."""
        if stop_token_ids is None:
            return torch.zeros(len(self.ids), dtype=torch.bool, device=self.ids.device)
        return (is_stop(self.responses, stop_token_ids) & self.mask).any(1)

    @cached_property  # looks into numbers, which a GPU has to be waited for
    def work(self) -> tuple[tuple[int, ...], int]:
        """Of one pass: what its FLOPs are linear in, and its real tokens."""
        whole = [torch.arange(len(self.ids))]
        return shape_of(whole, self.attention[:, :-1], self.mask), int(self.attention.sum())


@dataclass(frozen=True)
class Advantages(_Rows):
    """What is learned from a rollout; b rows each."""

    scores: Tensor  # (b,) after normalisation, clipping and penalties
    rewards: Tensor  # (b, t) of each token: −β·KL, and the score on the last one
    advantages: Tensor  # (b, t) whitened
    returns: Tensor  # (b, t) advantages before whitening + values


# ----------------------------------------------------------------------------------- the sequences


def concat_prompt_response(
    prompt_ids: Tensor, prompt_mask: Tensor, responses: Tensor, response_mask: Tensor, pad: int
) -> tuple[Tensor, Tensor]:
    """Prompt (b, p) and truncated response (b, t) as one sequence: ids (b, s), attention (b, s)."""
    ids = torch.cat([prompt_ids, responses.masked_fill(~response_mask, pad)], 1)
    return ids, torch.cat([prompt_mask, response_mask], 1)


def width_of(mask: Tensor) -> int:
    """Tokens of the longest row of a mask (b, s)."""
    return int(mask.sum(1).max())


def forward_model(model: AnyModel, ids: Tensor, mask: Tensor) -> AnyModel:
    """One pass of rows moved to the left, as wide as the longest. ids, mask: (b, s) → the model's
    output, (b, width, …).

    Positions then count real tokens from 0 (rule 5), and since nobody looks ahead, what pads a row
    on the right needs no mask: attention takes its fast path.
    """
    width, real = width_of(mask), mask.sum(1, keepdim=True)
    place = torch.arange(width, device=mask.device)
    source = mask.long().argmax(1, keepdim=True) + place
    moved = ids.gather(1, source.clamp(max=ids.shape[1] - 1)).masked_fill(place >= real, 0)
    return model(input_ids=moved, use_cache=False)


def gather_masked(values: Tensor, mask: Tensor) -> Tensor:
    """The numbers at the n True positions of a mask. values, mask: (b, t) → (n,)."""
    return values.flatten()[mask.flatten().nonzero().squeeze(1)]


def scatter_masked(values: Tensor, mask: Tensor) -> Tensor:
    """Numbers to the n True positions of a mask, zeros elsewhere. (n,), (b, t) → (b, t)."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def response_hidden_states(
    model: AnyModel, ids: Tensor, attention: Tensor, response_mask: Tensor
) -> Tensor:
    """Rule 10: a token's log-probability is read one position before it: the trunk's hidden states
    there. ids, attention: (b, s); response_mask: (b, t) → (n, h), and nothing of padding.

    The last token predicts nothing and is left out of the pass.
    """
    ids, attention, t = ids[:, :-1], attention[:, :-1], response_mask.shape[1]
    hidden = forward_model(trunk_of(model), ids, attention).last_hidden_state
    place = torch.arange(t, device=ids.device) + (ids.shape[1] - t)
    at = place - attention.long().argmax(1, keepdim=True)  # in the rows that were moved
    at = at + torch.arange(len(ids), device=ids.device).unsqueeze(1) * hidden.shape[1]
    states: Tensor = hidden.flatten(0, 1).index_select(0, gather_masked(at, response_mask))
    return states


def shape_of(
    buckets: Buckets, attention: Tensor, response_mask: Tensor | None = None
) -> tuple[int, ...]:
    """What the FLOPs of scoring passes are linear in: tokens, pairs, rows of logits, rows.

    attention: (b, s) of what passes; without `response_mask` (b, t) there are no logits.
    """
    sizes = [(len(rows), width_of(attention[rows])) for rows in buckets]
    tokens, pairs = (sum(n * s**power for n, s in sizes) for power in (1, 2))
    logits = () if response_mask is None else (int(response_mask.sum()),)
    return tokens, pairs, *logits, len(attention)


# ------------------------------------------------------------------------------- trunks and heads


def trunk_of(model: AnyModel) -> AnyModel:
    """The transformer below the head of a language, reward or value model; adapters stay in it."""
    model = model.get_base_model() if hasattr(model, "peft_config") else model
    named = getattr(model, model.base_model_prefix, None)
    return model.model if named is None else named  # Llama 4's text model names what it has not


def score_head(model: AnyModel, hidden: Tensor) -> Tensor:
    """The score of each hidden state. (…, h) → (…) fp32.

    Rule 16: demonstrations score 0 on average: `score_offset` of its config belongs to the head.
    """
    scores = model.score(hidden).squeeze(-1)
    return to_fp32(scores) + float(getattr(model.config, "score_offset", 0.0))


def token_values(model: AnyModel, ids: Tensor, attention: Tensor, response_mask: Tensor) -> Tensor:
    """The value head before each response token. (b, s), (b, s), (b, t) → (b, t) fp32, 0 where
    masked."""
    hidden = response_hidden_states(model, ids, attention, response_mask)
    return scatter_masked(score_head(model, hidden), response_mask)


def sequence_scores(model: AnyModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Rule 6: the last token is found under left padding too: the reward model's score of each
    sequence, read there. ids, mask: (b, s) → (b,) fp32."""
    hidden = forward_model(trunk_of(model), ids, mask).last_hidden_state
    last = mask.sum(1) - 1  # rows were moved to the left
    return score_head(model, hidden[torch.arange(len(ids), device=ids.device), last])


# ------------------------------------------------------------------------- passes of whole rollouts


def response_logprobs(
    model: AnyModel,
    ids: Tensor,
    attention: Tensor,
    responses: Tensor,
    temperature: float = 1.0,
    buckets: Buckets | None = None,
    executor: Executor | None = None,
) -> Tensor:
    """log π of every response token, without keeping logits beyond a pass.

    ids, attention: (b, s); responses: (b, t) → (b, t) fp32, 0 where masked. Without `buckets`,
    `CHUNK` rows of like length pass together.
    """
    executor = executor or Executor()

    def one(ids: Tensor, attention: Tensor, responses: Tensor) -> Tensor:
        mask = attention[:, -responses.shape[1] :]
        hidden = response_hidden_states(model, ids, attention, mask)
        tokens = gather_masked(responses, mask)
        return scatter_masked(scored_logprobs(model, hidden, tokens, temperature), mask)

    buckets = executor.length_buckets(attention, CHUNK) if buckets is None else buckets
    return executor.map_chunks(one, buckets, ids, attention, responses)


def logprobs_and_values(
    model: AnyModel,
    value: AnyModel,
    ids: Tensor,
    attention: Tensor,
    responses: Tensor,
    response_mask: Tensor,
    temperature: float,
    buckets: Buckets,
    executor: Executor,
) -> tuple[Tensor, Tensor]:
    """log π and the value of every response token, from one pass of the trunk that the two models
    share. → (b, t), (b, t), fp32."""

    def one(ids: Tensor, attention: Tensor, responses: Tensor, mask: Tensor) -> Tensor:
        hidden = response_hidden_states(model, ids, attention, mask)
        tokens = gather_masked(responses, mask)
        both = scored_logprobs(model, hidden, tokens, temperature), score_head(value, hidden)
        return torch.stack([scatter_masked(x, mask) for x in both], -1)

    both = executor.map_chunks(one, buckets, ids, attention, responses, response_mask)
    return both[..., 0], both[..., 1]


def trained_logprobs(
    model: AnyModel, hidden: Tensor, responses: Tensor, response_mask: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """log π with its gradient, and the entropy, of the response tokens whose hidden states (n, h)
    are given. responses, response_mask: (b, t) → (b, t), (b, t), 0 where masked."""
    logits = language_head(model, hidden)
    tokens = gather_masked(responses, response_mask)
    fused = is_compiled(model)
    logprobs, entropy = logprobs_and_entropy(logits, tokens, temperature, fused)
    return scatter_masked(logprobs, response_mask), scatter_masked(entropy, response_mask)


# ------------------------------------------------------------------------------ several processes


def gather_rollout(accelerator: Accelerator, mine: Rollout, pad_token_id: int) -> Rollout:
    """The rollouts of all processes as one, those of the first process first.

    Each process samples and scores its own prompts. Then all get all of it (tokens and a few
    numbers for each, which is little beside a model), so that whitening, KL, rewards and shuffling
    are those of one process with the whole batch, and only gradients have to be added up. Prompts
    are padded to the longest of any process on the left, responses on the right.
    """
    if accelerator.num_processes == 1:
        return mine
    t = mine.responses.shape[1]
    p = mine.ids.shape[1] - t
    sizes = accelerator.gather(torch.tensor([[p, t]], device=mine.ids.device)).amax(0)
    left, right = (sizes - torch.tensor([p, t], device=sizes.device)).tolist()
    sides = {"ids": left, "attention": left}
    fill = {"ids": pad_token_id, "responses": pad_token_id}
    whole = {}
    for name in (f.name for f in fields(mine)):
        x = getattr(mine, name)
        if x is None:  # on all processes: they sample with the same engine
            continue
        if x.dim() == 2:
            x = F.pad(x, (sides.get(name, 0), right), value=fill.get(name, 0))
        sent = x.to(torch.uint8) if x.dtype == torch.bool else x  # not every backend knows bool
        whole[name] = accelerator.gather(sent.contiguous()).to(x.dtype)
    return Rollout(**whole)


def shard_rows(accelerator: Accelerator, rows: Tensor) -> Tensor:
    """Of the rows of a minibatch those that this process works on: every n-th. (b,) → (b / n,)."""
    return rows[accelerator.process_index :: accelerator.num_processes]
