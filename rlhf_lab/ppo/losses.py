"""The maths of PPO as pure functions of tensors, in the order in which `trainer.py` uses it.

Notation: b = responses, t = response positions, n = real (unmasked) positions. A `mask` is True
where a position is real. N+ = Huang et al., "The N+ Implementation Details of RLHF with PPO"
(arXiv 2403.17031); where it or CleanRL has a name for a quantity, that name is used here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import reduce
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------------------------- masked statistics


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the True positions of a mask; 0 when there are none. values, mask: (b, t) → ()."""
    mask = mask.to(values.dtype)
    return (values * mask).sum() / mask.sum().clamp(min=1)


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale the real positions to variance 1 and, with `shift_mean`, to mean 0 (rule 13: over the
    whole batch).

    values, mask: (b, t) → (b, t), 0 where masked. The variance is the unbiased one. A position
    alone has none: it stays as it is (one response of one token).
    """
    m = mask.to(values.dtype)
    count = m.sum()
    if count < 2:
        return values * m
    mean = (values * m).sum() / count
    variance = (((values - mean) ** 2) * m).sum() / (count - 1)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * m


# ---------------------------------------------------------------------------- log-probabilities, KL


def to_fp32(x: Tensor) -> Tensor:
    """fp32 at least: what is rounded to 16 bits is not added up in 16 bits. (…) → (…)."""
    return x.float() if x.element_size() < 4 else x


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log π(token) of each token. logits: (…, vocab), tokens: (…) → (…), fp32.

    Rule 2: the logits are divided by the sampling temperature first.
    """
    logp = F.log_softmax(to_fp32(logits) / temperature, dim=-1)
    return logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k1") -> Tensor:
    """Rule 19: estimate KL(π‖π_ref) of each token from samples of π, in nats. All (b, t).

    k1 = log π − log π_ref is unbiased; k2 = k1²/2 is biased with low variance;
    k3 = e^(−k1) − 1 + k1 is unbiased and never negative (Schulman, "Approximating KL
    divergence", 2020). Raises ValueError for another kind.
    """
    k1 = logprobs - ref_logprobs
    if kind == "k1":
        return k1
    if kind == "k2":
        return 0.5 * k1**2
    if kind == "k3":
        return torch.expm1(-k1) + k1
    raise ValueError(f"kl estimator {kind!r}: choose k1, k2 or k3")


def kl_bound(n: int) -> float:
    """log n − (n−1)/n: KL(best-of-n ‖ policy) in nats per response is at most this.

    Stiennon et al. (2009.01325) use it as the value; Beirami et al. (2401.01879) show that it is
    an upper bound, reached where no response is drawn twice.
    """
    return math.log(n) - (n - 1) / n


# --------------------------------------------------------------------------- rewards and advantages


StopTokens: TypeAlias = int | Collection[int] | None
"""The token, or all tokens, at which a response ends; None: it never does."""


def is_stop(tokens: Tensor, stop_token_ids: int | Collection[int]) -> Tensor:
    """Which tokens end a response. (…) → (…) bool."""
    ids = (stop_token_ids,) if isinstance(stop_token_ids, int) else stop_token_ids
    return reduce(torch.logical_or, (tokens == stop for stop in ids))


def first_stop(tokens: Tensor, stop_token_ids: StopTokens) -> Tensor:
    """Position of the first stop token, or t where there is none. tokens: (b, t) → (b,)."""
    length = tokens.shape[1]
    if stop_token_ids is None:
        return torch.full((tokens.shape[0],), length, device=tokens.device)
    positions = torch.arange(length, device=tokens.device).expand_as(tokens)
    stops = is_stop(tokens, stop_token_ids)
    return torch.where(stops, positions, length).amin(1) if length else positions


def response_mask(tokens: Tensor, stop_token_ids: StopTokens) -> Tensor:
    """Rule 7: a response ends after its first stop token: True up to and with it.

    tokens: (b, t) → (b, t)."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    return positions <= first_stop(tokens, stop_token_ids).unsqueeze(1)


def missing_stop_score(
    scores: Tensor, stopped: Tensor, penalty: float | None, fixed: float | None = None
) -> Tensor:
    """Rule 8: a response that never stops loses a penalty (N+ detail 23), or gets a fixed score.

    scores, stopped: (b,) → (b,)."""
    if fixed is not None:
        return torch.where(stopped, scores, fixed)
    return scores if penalty is None else scores - penalty * (~stopped).to(scores.dtype)


def score_constants(scores: Tensor) -> tuple[float, float]:
    """Mean and standard deviation that give the first rollout's scores mean 0 and variance 1.

    Ziegler et al. (1909.08593, section 2.1) normalise rewards so at the start of training and
    never again. scores: (b,). Where all scores are equal the deviation is 1: they are only shifted.
    """
    values = scores.double()
    std = float(values.std(correction=0))
    return float(values.mean()), std if std > 0 else 1.0


def normalised_scores(
    scores: Tensor, mean: float | None, std: float | None, clip: float | None
) -> Tensor:
    """(score − mean) / std where the constants are known, then clipped to ±clip. (b,) → (b,)."""
    if mean is not None and std is not None:
        scores = (scores - mean) / std
    return scores if clip is None else scores.clamp(-clip, clip)


def token_rewards(kl: Tensor, scores: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Rule 11: −β·KL on every real token; rule 9: the score lands on the last of them.

    kl, mask: (b, t); scores: (b,) → (b, t). The last real token is the stop token when there is
    one. A response without real tokens keeps its score on position 0.
    """
    m = mask.to(kl.dtype)
    last = (mask.sum(1) - 1).clamp(min=0, max=kl.shape[1] - 1)
    rewards = -beta * kl * m
    return rewards.scatter_add(1, last.unsqueeze(1), scores.to(kl.dtype).unsqueeze(1))


def compute_gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    positions: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 1506.02438; rule 12: over response tokens
    only, and returns are made before whitening).

    rewards, values, mask: (b, t) → advantages, returns: (b, t). Backwards from the end:
    δ_t = r_t + γ·V_{t+1} − V_t and A_t = δ_t + γλ·A_{t+1}; beyond the last real token V and A
    are 0. returns = A + V. `positions`: which of the t are worked on; None is all of them.
    """
    m = mask.to(values.dtype)
    values, rewards = values * m, rewards * m
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    following = torch.zeros_like(running)
    for t in reversed(range(values.shape[1]) if positions is None else positions):
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = (delta + gamma * lam * running) * m[:, t]
        advantages[:, t] = running
        following = values[:, t]
    return advantages, advantages + values


# ------------------------------------------------------------------------------------------ losses


def pg_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rule 14: the clipped policy-gradient loss of each token (Schulman et al. 1707.06347, eq. 7).

    All (b, t) → loss, and clipped: 1 where clipping makes it larger; (b, t), 0 where masked. The
    trainer takes the token mean over the whole minibatch. A `weight` multiplies each token's loss
    (`importance_weight`).
    """
    m = mask.to(logprobs.dtype)
    ratio = torch.exp((logprobs - old_logprobs) * m)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = torch.maximum(unclipped, clipped) * m
    if weight is not None:
        loss = loss * weight
    return loss, (clipped > unclipped).to(logprobs.dtype) * m


def vf_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Rule 14: the clipped value loss of each token, ½·max((V−R)², (clip(V, V_old ± clip)−R)²).

    All (b, t) → loss, and clipped: 1 where clipping makes it larger; (b, t), 0 where masked.
    """
    m = mask.to(values.dtype)
    near = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    unclipped, clipped = (values - returns) ** 2, (near - returns) ** 2
    return 0.5 * torch.maximum(unclipped, clipped) * m, (clipped > unclipped).to(values.dtype) * m


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(returns − values)/Var(returns) over real positions; 1 is a perfect critic.

    values, returns, mask: (b, t) → (). NaN with fewer than two real positions.
    """
    r, error = returns[mask].double(), (returns - values)[mask].double()
    if r.numel() < 2:
        return torch.tensor(float("nan"))
    total = ((r - r.mean()) ** 2).sum()
    return 1 - ((error - error.mean()) ** 2).sum() / total.clamp(min=1e-12)


def importance_weight(train_logprobs: Tensor, rollout_logprobs: Tensor, cap: float = 2.0) -> Tensor:
    """Rule 21: min(π_train/π_rollout, cap) of each token, for samples of an engine that differs.

    All (b, t); without a gradient.
    """
    return torch.exp(train_logprobs - rollout_logprobs).clamp(max=cap).detach()


def adapt_kl_coef(beta: float, kl: float, target: float, horizon: int, episodes: int) -> float:
    """Rule 18: β adapts to a target KL (Ziegler et al. 1909.08593).

    β·(1 + clip(KL/target − 1, ±0.2)·episodes/horizon); KL and target in nats per response.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * episodes / horizon)


# ------------------------------------------------------------------------- other people's functions


LossFunction: TypeAlias = Callable[..., Any]
"""A function that is called as the one of this module that it stands in for."""
REPLACEABLE = ("token_rewards", "whiten", "compute_gae", "pg_loss", "vf_loss")
"""Functions in whose place `PPOTrainer` takes others."""


class LossFunctions:
    """The functions of this module as attributes, some of them replaced."""

    def __init__(self, replaced: Mapping[str, LossFunction]) -> None:
        vars(self).update(replaced)

    def __getattr__(self, name: str) -> LossFunction:
        if name not in REPLACEABLE:
            raise AttributeError(f"{name} is none of {', '.join(REPLACEABLE)}")
        function: LossFunction = globals()[name]
        return function
