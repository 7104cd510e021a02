"""Rules 9 to 13 of PPO: rewards, returns, whitening. Table: test_ppo_rules_01_08.py."""

from dataclasses import replace

import pytest
import torch
from ppo_kit import (
    PROMPTS,
    RESPONSES,
    close,
    must_fail,
    naive_logprobs,
    one_later,
    one_rollout,
    scored,
    swap,
)

from rlhf_lab.ppo import losses, rollout
from rlhf_lab.ppo.trainer import PPOTrainer

# ----------------------------------------------------------------------------------- rules 9 to 12


def check_score_position(make, tiny):
    """β = 0 leaves the score alone: early end, end at the limit, no end, empty response."""
    trainer = make()
    r = scored(trainer, RESPONSES + [[14, 15, 15]])  # the last is empty: a bare stop token
    adv = trainer.compute_advantages(r, beta=0.0)
    expected = torch.zeros(4, 3)
    for row, column in enumerate((1, 2, 2, 0)):
        expected[row, column] = adv.scores[row]
    close(adv.rewards, expected)


@pytest.mark.parametrize("place", ["one later, as TRL", "first token", "last column"])
def test_rule_09_the_score_lands_on_the_last_token(make, tiny, monkeypatch, place):
    check_score_position(make, tiny)

    def elsewhere(right):
        def rewards(kl, scores, mask, beta):
            if place.startswith("one later"):
                return right(kl, scores, one_later(mask), beta)
            wrong = -beta * kl * mask
            wrong[:, 0 if place == "first token" else -1] += scores
            return wrong

        return rewards

    swap(monkeypatch, losses, "token_rewards", elsewhere)
    with must_fail:
        check_score_position(make, tiny)


def check_logprob_index(trainer):
    """Token t is predicted at t−1; beyond the end both models' log-probs are the same constant."""
    r, *_ = one_rollout(trainer)
    assert not r.mask.all(), "the check needs padding"
    for row in range(4):
        n = int(r.mask[row].sum())
        close(r.logprobs[row, :n], naive_logprobs(trainer.policy, r, row))
    beyond = ~r.mask
    close(r.logprobs[beyond], r.ref_logprobs[beyond], atol=0)
    assert len(set(r.logprobs[beyond].tolist())) == 1


def off_by_one(before):
    def hidden(model, ids, attention, mask):  # of the token itself, where one more column is there
        ids, attention = (torch.cat([x, x[:, -1:]], 1) for x in (ids, attention))
        return before(model, ids, attention, mask)

    return hidden


def other_constant(score):
    def scored(self, *args):
        r = score(self, *args)
        return replace(r, ref_logprobs=r.ref_logprobs.masked_fill(~r.mask, 1.0))

    return scored


@pytest.mark.parametrize(
    "where, name, broken",
    [(rollout, "response_hidden_states", off_by_one), (PPOTrainer, "score", other_constant)],
    ids=["off by one", "two constants"],
)
def test_rule_10_logprobs_come_from_the_position_before(make, monkeypatch, where, name, broken):
    check_logprob_index(make())
    swap(monkeypatch, where, name, broken)
    with must_fail:
        check_logprob_index(make())


def check_rewards(make, tiny):
    """−β(log π − log π_ref) of each token, the score on top of the last; β, γ, λ as documented."""
    trainer = make(models={"ref_model": tiny.lm(7)})
    args = trainer.args
    assert (args.kl_coef, args.gamma, args.lam) == (0.05, 1.0, 0.95)
    r, adv, metrics = one_rollout(trainer, beta=args.kl_coef)
    for row in range(len(PROMPTS)):
        n = int(r.mask[row].sum())
        pi, ref = r.logprobs[row, :n].tolist(), r.ref_logprobs[row, :n].tolist()
        expected = [-0.05 * (a - b) for a, b in zip(pi, ref, strict=True)]
        expected[-1] += float(adv.scores[row])
        close(adv.rewards[row], expected + [0.0] * (r.mask.shape[1] - n))
    assert metrics["kl"] > 0.1  # nats per response, summed over its tokens
    close(metrics["kl"], float((r.logprobs - r.ref_logprobs).sum() / len(PROMPTS)))
    close(metrics["objective"], metrics["score"] - 0.05 * metrics["kl"])


@pytest.mark.parametrize(
    "broken",
    [
        lambda right: lambda kl, s, m, beta: right(-kl, s, m, beta),
        lambda right: lambda kl, s, m, beta: right(kl, 0 * s, m, beta),
        lambda right: lambda kl, s, m, beta: right(kl, beta * s, m, 1.0),
    ],
    ids=["sign of the KL", "no score", "beta on the score"],
)
def test_rule_11_reward_is_score_minus_beta_kl(make, tiny, monkeypatch, broken):
    check_rewards(make, tiny)
    swap(monkeypatch, losses, "token_rewards", broken)
    with must_fail:
        check_rewards(make, tiny)


def check_returns(make, tiny):
    """Plain Python GAE over each response's own tokens; returns from unwhitened advantages."""
    trainer = make(models={"ref_model": tiny.lm(7)})
    r, adv, _ = one_rollout(trainer)
    for row in range(len(PROMPTS)):
        n = int(r.mask[row].sum())
        reward, value = adv.rewards[row].tolist(), r.values[row].tolist()
        advantage, expected = 0.0, [0.0] * r.mask.shape[1]
        for t in reversed(range(n)):
            following = value[t + 1] if t + 1 < n else 0.0
            advantage = reward[t] + following - value[t] + 0.95 * advantage
            expected[t] = advantage + value[t]
        close(adv.returns[row], expected)


def whitened_returns(gae):
    def broken(rewards, values, mask, *args):
        advantages, _ = gae(rewards, values, mask, *args)
        return advantages, (losses.whiten(advantages, mask) + values) * mask

    return broken


def forwards(gae):
    def broken(rewards, values, mask, *args):
        advantages, returns = gae(rewards.flip(1), values.flip(1), mask.flip(1), *args)
        return advantages.flip(1), returns.flip(1)

    return broken


def bootstraps_beyond_the_end(gae):
    """Values beyond the end are taken for real, as without a mask."""

    def broken(rewards, values, mask, *args):
        advantages, returns = gae(rewards, values + 0.5 * ~mask, torch.ones_like(mask), *args)
        return advantages * mask, returns * mask

    return broken


@pytest.mark.parametrize("broken", [whitened_returns, forwards, bootstraps_beyond_the_end])
def test_rule_12_returns_are_advantages_plus_values(make, tiny, monkeypatch, broken):
    check_returns(make, tiny)
    swap(monkeypatch, losses, "compute_gae", broken)
    with must_fail:
        check_returns(make, tiny)


# ----------------------------------------------------------------------------------------- rule 13


def check_whitening(make):
    """Over the real tokens of the whole rollout: mean 0, unbiased variance 1; 0 elsewhere."""
    trainer = make(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    r, adv, _ = one_rollout(trainer)
    raw = (adv.returns - r.values)[r.mask]
    expected = (raw - raw.mean()) / raw.std(unbiased=True)
    close(adv.advantages[r.mask], expected, atol=1e-4)
    assert not adv.advantages[~r.mask].any()


def row_by_row(whiten):
    def broken(values, mask, **kwargs):
        rows = [
            whiten(v[None], m[None]) if m.sum() > 1 else 0 * v[None]
            for v, m in zip(values, mask, strict=True)
        ]
        return torch.cat(rows)

    return broken


@pytest.mark.parametrize(
    "broken",
    [
        row_by_row,
        lambda right: lambda v, m, **k: right(v, torch.ones_like(m), **k) * m,
        lambda right: lambda v, m, **k: right(v, m, **{**k, "shift_mean": False}),
        lambda right: lambda v, m, **k: right(v, m, **k) * (m.sum() / (m.sum() - 1)) ** 0.5,
    ],
    ids=["row by row", "unmasked", "keeps the mean", "biased variance"],
)
def test_rule_13_advantages_are_whitened_over_the_batch(make, monkeypatch, broken):
    check_whitening(make)
    swap(monkeypatch, losses, "whiten", broken)
    with must_fail:
        check_whitening(make)


def check_whitened_rewards(make):
    """Off by default; when on, deviation 1 and the mean stays."""
    plain = make()
    _, before, _ = one_rollout(plain)
    assert not plain.args.whiten_rewards
    trainer = make(whiten_rewards=True)
    r, after, _ = one_rollout(trainer)
    before, after = before.rewards[r.mask], after.rewards[r.mask]
    close(after.std(), 1.0, atol=1e-4)
    close(after.mean(), before.mean(), atol=1e-5)


def test_rule_13_whitened_rewards_keep_their_mean(make, monkeypatch):
    check_whitened_rewards(make)
    swap(
        monkeypatch,
        losses,
        "whiten",
        lambda right: lambda v, m, **k: right(v, m, **{**k, "shift_mean": True}),
    )
    with must_fail:
        check_whitened_rewards(make)


def trained_weights(make, tiny, monkeypatch, size, accumulate):
    """Weights after two iterations in real double precision (`.float()` inside is lifted)."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    models = {
        "model": tiny.lm(0, "gpt2").double(),
        "reward_model": tiny.rm(1, "gpt2").double(),
        "value_model": tiny.rm(1, "gpt2").double(),
    }
    trainer = make(
        models=models,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulate,
        total_episodes=16,
        learning_rate=1e-3,
    )
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def check_accumulation(make, tiny, monkeypatch):
    whole = trained_weights(make, tiny, monkeypatch, 8, 1)
    for size, accumulate in ((1, 8), (2, 4)):
        other = trained_weights(make, tiny, monkeypatch, size, accumulate)
        close(other, whole, atol=1e-7)


def mean_of_means(compute_losses):
    """Each pass divides by its own tokens: short responses weigh more than long ones."""

    def broken(self, mb, adv, tokens):
        share = len(mb.ids) / self.args.rollout_batch_size
        return compute_losses(self, mb, adv, mb.mask.sum() / share)

    return broken


def test_rule_13_one_times_eight_equals_eight_times_one(make, tiny, monkeypatch):
    check_accumulation(make, tiny, monkeypatch)
    swap(monkeypatch, PPOTrainer, "compute_losses", mean_of_means)
    with must_fail:
        check_accumulation(make, tiny, monkeypatch)
