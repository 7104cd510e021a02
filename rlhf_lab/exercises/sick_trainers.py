"""PPO with one thing wrong: the trainers of `specimens.yaml`.

Each is `PPOTrainer` with another function, other scores, something changed while one of its methods
runs, or one method of its own; the trainer itself knows nothing of them. What is wrong, and the
cure, stand in the table. Shapes as in `ppo/rollout.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ..ppo import losses
from ..ppo.checkpoint import Metrics
from ..ppo.layouts import Roles
from ..ppo.logprobs import AnyModel
from ..ppo.losses import LossFunction
from ..ppo.rollout import Advantages, Rollout, Samples
from ..ppo.texts import Row, decode
from ..ppo.trainer import PPOTrainer

COLDER = 0.7
"""The wrong temperature, as a share of the right one."""
TOP_K = 3
DROPOUT = 0.1
BONUS = 0.1
"""Reward for each token, of a judge that likes length."""
WORD = "friend"
"""What a judge likes that reads for one word: a point each time."""


# ------------------------------------------------------------------------------ other functions


def with_losses(**functions: LossFunction) -> type[PPOTrainer]:
    """The trainer with other functions in place of those of `losses.py`."""

    class WithLosses(PPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            vars(self.losses).update(functions)

    return WithLosses


def late_score(kl: Tensor, scores: Tensor, mask: Tensor, beta: float) -> Tensor:
    """One position beyond the last token, where there is one: GAE masks it. (b, t)"""
    one_more = torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], 1)
    return losses.token_rewards(kl, scores, one_more, beta)


def kl_rewarded(kl: Tensor, scores: Tensor, mask: Tensor, beta: float) -> Tensor:
    return losses.token_rewards(-kl, scores, mask, beta)


def unwhitened(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    return values * mask


def whitened_with_padding(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Mean and variance over padding too, whose advantages are 0."""
    return losses.whiten(values, torch.ones_like(mask), shift_mean) * mask


def whitened_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    advantages = losses.whiten(losses.compute_gae(rewards, values, mask, gamma, lam)[0], mask)
    return advantages, advantages + values * mask


# ------------------------------------------------------------------------------ other scores


def with_scores(change: Callable[[PPOTrainer, Rollout], Tensor]) -> type[PPOTrainer]:
    """The trainer with other scores of the responses: `change(trainer, rollout) → (b,)`."""

    class WithScores(PPOTrainer):
        def score(self, samples: Samples, rows: Sequence[Row]) -> Rollout:
            r = super().score(samples, rows)
            return replace(r, scores_raw=change(self, r))

    return WithScores


def likes_one_word(trainer: PPOTrainer, r: Rollout) -> Tensor:
    texts = decode(trainer.tokenizer, r.responses, r.mask)
    return r.scores_raw + r.scores_raw.new_tensor([text.lower().count(WORD) for text in texts])


# ----------------------------------------------------------------- changed while a method runs


def during(
    method: str, changed: Callable[[PPOTrainer], AbstractContextManager[object]]
) -> type[PPOTrainer]:
    """The trainer with something changed, by `changed(trainer)`, while a method of its runs."""

    def run(self: PPOTrainer, *args: Any) -> Any:
        with changed(self):
            return getattr(PPOTrainer, method)(self, *args)

    return type("During", (PPOTrainer,), {method: run})


def colder(trainer: PPOTrainer) -> AbstractContextManager[object]:
    temperature = COLDER * trainer.args.temperature
    sampling = replace(trainer.engine.sampling, temperature=temperature)
    return patch.object(trainer.engine, "sampling", sampling)


@contextmanager
def top_k(trainer: PPOTrainer) -> Iterator[None]:
    def keep_likeliest(module: nn.Module, args: object, output: AnyModel) -> None:
        least = output.logits.topk(TOP_K).values[..., -1:]
        output.logits = output.logits.masked_fill(output.logits < least, -torch.inf)

    hook = trainer.policy.register_forward_hook(keep_likeliest)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def dropout(trainer: PPOTrainer) -> Iterator[None]:
    for module in trainer.policy.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = DROPOUT
        if isinstance(module, nn.Dropout):
            module.p = DROPOUT
    trainer.policy.train()
    try:
        yield
    finally:
        trainer.policy.eval()


def unended(trainer: PPOTrainer) -> AbstractContextManager[object]:
    """The rewards read responses without their stop token."""
    right = trainer.rewards.score

    def score(
        ids: Tensor, attention: Tensor, responses: Tensor, mask: Tensor, *rest: Any
    ) -> Tensor:
        mask = without_stop(trainer, responses, mask)
        prompt = attention[:, : -responses.shape[1]]
        return right(ids, torch.cat([prompt, mask], 1), responses, mask, *rest)

    return patch.object(trainer.rewards, "score", score)


def without_stop(trainer: PPOTrainer, tokens: Tensor, mask: Tensor) -> Tensor:
    """A mask that leaves out what ends a response. (b, t), (b, t) → (b, t)"""
    stops = trainer.stop_token_ids
    return mask if stops is None else mask & ~losses.is_stop(tokens, stops)


# ------------------------------------------------------------------------------ other methods


class StopUntrained(PPOTrainer):
    def compute_losses(
        self, mb: Rollout, adv: Advantages, tokens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        cut = replace(mb, mask=without_stop(self, mb.responses, mb.mask))
        return super().compute_losses(cut, adv, tokens)


class ShiftedLogprobs(PPOTrainer):
    def score(self, samples: Samples, rows: Sequence[Row]) -> Rollout:
        r = super().score(samples, rows)
        return replace(r, logprobs=r.logprobs.roll(1, 1) * r.mask)


class ReferenceMoves(PPOTrainer):
    def iterate(self, iteration: int) -> Metrics:
        metrics = super().iterate(iteration)
        self.reference.load_state_dict(self.policy.state_dict())
        return metrics


class ValueFromNoise(PPOTrainer):
    def build_roles(self, *models: AnyModel) -> Roles:
        roles = super().build_roles(*models)
        generator = torch.Generator().manual_seed(self.args.seed)
        std = float(roles.value.config.initializer_range)
        head = roles.value.score.weight
        with torch.no_grad():
            head.copy_(torch.empty(head.shape).normal_(0, std, generator=generator))
        return roles


class GradientsKept(PPOTrainer):
    def setup_optimizer(self) -> None:
        super().setup_optimizer()
        vars(self.optimizer)["zero_grad"] = lambda *_, **__: None


TRAINERS: Mapping[str, type[PPOTrainer]] = {
    "late_score": with_losses(token_rewards=late_score),
    "kl_rewarded": with_losses(token_rewards=kl_rewarded),
    "unwhitened": with_losses(whiten=unwhitened),
    "whitened_with_padding": with_losses(whiten=whitened_with_padding),
    "whitened_returns": with_losses(compute_gae=whitened_returns),
    "reward_saturated": with_scores(lambda _, r: torch.sigmoid(2 * r.scores_raw)),
    "reward_sign": with_scores(lambda _, r: -r.scores_raw),
    "rewards_shuffled": with_scores(lambda _, r: r.scores_raw.roll(1)),
    "likes_length": with_scores(lambda _, r: r.scores_raw + BONUS * r.mask.sum(1)),
    "likes_one_word": with_scores(likes_one_word),
    "unmasked_after_stop": during("score", lambda t: patch.object(t, "stop_token_ids", None)),
    "reward_before_stop": during("score", unended),
    "two_temperatures": during(
        "score", lambda t: patch.object(t.args, "temperature", COLDER * t.args.temperature)
    ),
    "cold_sampling": during("sample", colder),
    "stale_sampler": during("sample", lambda t: patch.object(t, "policy", t.reference)),
    "top_k": during("sample", top_k),
    "dropout": during("iterate", dropout),
    "stop_untrained": StopUntrained,
    "shifted_logprobs": ShiftedLogprobs,
    "reference_moves": ReferenceMoves,
    "value_from_noise": ValueFromNoise,
    "gradients_kept": GradientsKept,
}
"""By the specimen's name; a specimen that is not here is a setting."""
