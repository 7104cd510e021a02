"""The maths of RLHF against numbers worked out by hand and against exact enumeration.

pytest tests/ppo/test_losses.py
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ppo_kit import one_later
from torch import tensor
from torch.testing import assert_close

from rlhf_lab.ppo import losses

DOUBLE = torch.float64
relaxed = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 2**31)


def batch(seed: int, *, rows: int = 4, length: int = 6):
    """Random rewards, values (double) and a mask whose rows are as long as they like, ≥ 1."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, rows, length, generator=g, dtype=DOUBLE).unbind()
    lengths = torch.randint(1, length + 1, (rows, 1), generator=g)
    return x, y, torch.arange(length) < lengths


# ---------------------------------------------------------------------------- masked mean, whiten


def test_masked_mean_averages_the_real_positions_only():
    values = tensor([[1.0, 2.0, 900.0], [6.0, 900.0, 900.0]])
    mask = tensor([[True, True, False], [True, False, False]])
    assert losses.masked_mean(values, mask) == 3.0  # (1 + 2 + 6) / 3
    assert losses.masked_mean(values, torch.zeros_like(mask)) == 0.0


def test_whiten_by_hand():
    """Real positions 1, 2, 3: mean 2, unbiased variance ((−1)² + 0 + 1²) / 2 = 1."""
    values = tensor([[1.0, 2.0], [3.0, 50.0]], dtype=DOUBLE)
    mask = tensor([[True, True], [True, False]])
    assert_close(losses.whiten(values, mask), tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=DOUBLE))
    kept = losses.whiten(values, mask, shift_mean=False)  # the mean, 2, comes back
    assert_close(kept, tensor([[1.0, 2.0], [3.0, 0.0]], dtype=DOUBLE))


def test_whiten_scales_by_the_unbiased_deviation():
    """Real positions 0 and 4: variance 8 (unbiased), not 4: ±2 becomes ±2/√8."""
    out = losses.whiten(tensor([[0.0, 4.0]], dtype=DOUBLE), tensor([[True, True]]))
    assert_close(out, tensor([[-2.0, 2.0]], dtype=DOUBLE) / math.sqrt(8))


@pytest.mark.parametrize("shift_mean", [True, False])
def test_a_position_alone_is_not_whitened(shift_mean):
    """models.md 11: it has no deviation to be measured in."""
    out = losses.whiten(tensor([[3.0, 7.0]]), tensor([[True, False]]), shift_mean)
    assert_close(out, tensor([[3.0, 0.0]]))


@relaxed
@given(seeds)
def test_whitened_values_have_mean_0_and_variance_1(seed):
    values, _, mask = batch(seed)
    real = losses.whiten(3 * values + 7, mask)[mask]
    assert_close(real.mean(), tensor(0.0, dtype=DOUBLE), atol=1e-6, rtol=0)
    assert_close(real.var(), tensor(1.0, dtype=DOUBLE), atol=1e-5, rtol=0)  # var() is unbiased


@relaxed
@given(seeds, st.floats(0.5, 20), st.floats(-50, 50))
def test_whiten_does_not_see_scale_or_shift(seed, scale, shift):
    values, _, mask = batch(seed)
    assert_close(
        losses.whiten(values * scale + shift, mask), losses.whiten(values, mask), atol=1e-5, rtol=0
    )


# ------------------------------------------------------------------------------------------- GAE


def test_gae_by_hand():
    """γ = 1, λ = 0.95, three tokens, the score 1 on the last.

    δ₂ = 1.0 + 0   − 0.3 =  0.7   A₂ =  0.7
    δ₁ = −0.2 + 0.3 − 0.4 = −0.3   A₁ = −0.3 + 0.95 · 0.7   = 0.365
    δ₀ =  0.1 + 0.4 − 0.5 =  0.0   A₀ =  0.0 + 0.95 · 0.365 = 0.34675
    """
    rewards = tensor([[0.1, -0.2, 1.0]], dtype=DOUBLE)
    values = tensor([[0.5, 0.4, 0.3]], dtype=DOUBLE)
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = losses.compute_gae(rewards, values, mask, gamma=1.0, lam=0.95)
    assert_close(advantages, tensor([[0.34675, 0.365, 0.7]], dtype=DOUBLE))
    # returns = A + V
    assert_close(returns, tensor([[0.84675, 0.765, 1.0]], dtype=DOUBLE))


def test_gae_discounts_by_hand():
    """γ = ½, λ = ½, two tokens: A₁ = 1 − 2 = −1; A₀ = (0 + ½·2 − 1) + ¼·(−1) = −¼."""
    advantages, _ = losses.compute_gae(
        tensor([[0.0, 1.0]]), tensor([[1.0, 2.0]]), torch.ones(1, 2, dtype=torch.bool), 0.5, 0.5
    )
    assert advantages.tolist() == [[-0.25, -1.0]]


@relaxed
@given(seeds)
def test_gae_with_lambda_1_is_reward_to_go_minus_value(seed):
    rewards, values, mask = batch(seed)
    advantages, returns = losses.compute_gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    assert_close(returns, to_go)
    assert_close(advantages, (to_go - values) * mask)


@relaxed
@given(seeds)
def test_gae_with_lambda_0_is_the_one_step_error(seed):
    rewards, values, mask = batch(seed)
    advantages, _ = losses.compute_gae(rewards, values, mask, gamma=0.9, lam=0.0)
    following = torch.cat([(values * mask)[:, 1:], torch.zeros(len(values), 1)], 1)
    assert_close(advantages, (rewards + 0.9 * following - values) * mask)


@relaxed
@given(seeds)
def test_gae_equals_its_definition_as_a_sum(seed):
    """A_t = Σ_l (γλ)^l δ_{t+l}, row by row over the real tokens: no recursion, no mask."""
    rewards, values, mask = batch(seed)
    advantages, _ = losses.compute_gae(rewards, values, mask, 0.9, 0.8)
    for row in range(len(values)):
        n = int(mask[row].sum())
        r, v = rewards[row, :n].tolist(), values[row, :n].tolist() + [0.0]
        delta = [r[t] + 0.9 * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            expected = sum((0.9 * 0.8) ** k * d for k, d in enumerate(delta[t:]))
            assert advantages[row, t].item() == pytest.approx(expected)


@relaxed
@given(seeds, st.floats(-1e6, 1e6))
def test_masked_positions_never_matter(seed, garbage):
    """Whatever stands beyond the end of a response, every result is the same."""
    x, y, mask = batch(seed)
    dirty_x, dirty_y = x.masked_fill(~mask, garbage), y.masked_fill(~mask, -garbage)
    clean_x, clean_y = x * mask, y * mask
    results = {
        "masked_mean": lambda a, b: losses.masked_mean(a, mask),
        "whiten": lambda a, b: losses.whiten(a, mask),
        "compute_gae": lambda a, b: losses.compute_gae(a, b, mask),
        "pg_loss": lambda a, b: losses.pg_loss(a, a + 0.1, b, mask),
        "vf_loss": lambda a, b: losses.vf_loss(a, a + 0.3, b, mask),
        "token_rewards": lambda a, b: losses.token_rewards(a, b[:, 0] * 0 + 2, mask, 0.1),
        "explained_variance": lambda a, b: losses.explained_variance(a, b, mask),
    }
    if mask.sum() < 3:
        return
    for name, result in results.items():
        assert_close(
            result(dirty_x, dirty_y),
            result(clean_x, clean_y),
            msg=lambda m, name=name: f"{name}: {m}",
        )


def test_returns_are_taken_before_whitening():
    """Whitening the advantages afterwards must not change what the critic learns."""
    rewards, values, mask = batch(0)
    advantages, returns = losses.compute_gae(rewards, values, mask)
    before = returns.clone()
    whitened = losses.whiten(advantages, mask)
    assert_close(returns, before, rtol=0, atol=0)
    assert_close(returns, advantages + values * mask)
    assert not torch.allclose(returns, whitened + values * mask)


# --------------------------------------------------------------------------- stops and the score

EOS = 9
TOKENS = tensor([[EOS, 1, 1, 1], [1, EOS, 1, EOS], [1, 1, 1, EOS], [1, 1, 1, 1]])


def test_first_stop_is_the_first_of_several_or_the_length():
    assert losses.first_stop(TOKENS, EOS).tolist() == [0, 1, 3, 4]
    assert losses.first_stop(TOKENS, None).tolist() == [4, 4, 4, 4]
    two_ends = tensor([[1, 2, 8, EOS], [1, EOS, 8, 1], [8, 1, 1, 1], [1, 1, 2, 2]])
    assert losses.first_stop(two_ends, (EOS, 8)).tolist() == [2, 1, 0, 4]


def test_response_mask_keeps_the_stop_token_and_nothing_after_it():
    assert losses.response_mask(TOKENS, EOS).sum(1).tolist() == [1, 2, 4, 4]
    assert losses.response_mask(TOKENS, EOS)[1].tolist() == [True, True, False, False]
    assert losses.response_mask(TOKENS, None).all()


def test_a_response_without_stop_loses_the_penalty():
    scores, stopped = tensor([2.0, 2.0]), tensor([True, False])
    assert losses.missing_stop_score(scores, stopped, 1.5).tolist() == [2.0, 0.5]
    assert losses.missing_stop_score(scores, stopped, None).tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    "length, expected",
    [
        (2, [-0.1, -0.2 + 5, 0.0, 0.0]),  # ends early: on its last token
        (4, [-0.1, -0.2, -0.3, -0.4 + 5]),  # ends exactly at the limit
        (0, [5.0, 0.0, 0.0, 0.0]),  # empty: the score is not lost
    ],
)
def test_the_score_lands_on_the_last_real_token(length, expected):
    """β = 0.1 and KL 1, 2, 3, 4: −0.1, −0.2, …; the score 5 on top of the last."""
    kl = tensor([[1.0, 2.0, 3.0, 4.0]])
    mask = (torch.arange(4) < length).unsqueeze(0)
    assert_close(losses.token_rewards(kl, tensor([5.0]), mask, 0.1), tensor([expected]))


def test_a_mask_moved_on_puts_the_score_one_later_only_where_padding_exists():
    """What the parity benchmark does to be as TRL."""
    kl = torch.zeros(2, 3)
    mask = tensor([[True, True, False], [True, True, True]])
    late = losses.token_rewards(kl, tensor([5.0, 5.0]), one_later(mask), 0.1)
    assert late.tolist() == [[0, 0, 5], [0, 0, 5]]


@relaxed
@given(seeds, st.floats(0, 1))
def test_rewards_of_a_response_add_up_to_score_minus_beta_kl(seed, beta):
    kl, scores, mask = batch(seed)
    rewards = losses.token_rewards(kl, scores[:, 0], mask, beta)
    assert_close(rewards.sum(1), scores[:, 0] - beta * (kl * mask).sum(1))


# ---------------------------------------------------------------------------------------- losses


def one(x: float):
    return tensor([[x]], dtype=DOUBLE)


@pytest.mark.parametrize(
    "ratio, advantage, loss, clipped",
    [
        (1.0, 2.0, -2.0, 0),
        (1.5, 2.0, -2.4, 1),  # a good token is not pushed beyond 1.2
        (0.5, 2.0, -1.0, 0),  # but may always be pulled back
        (1.5, -2.0, 3.0, 0),
        (0.5, -2.0, 1.6, 1),  # a bad token is not pushed below 0.8
    ],
)
def test_pg_loss_by_hand(ratio, advantage, loss, clipped):
    got, was_clipped = losses.pg_loss(
        one(math.log(ratio)), one(0.0), one(advantage), tensor([[True]]), clip=0.2
    )
    assert got.item() == pytest.approx(loss)
    assert was_clipped.item() == clipped


@pytest.mark.parametrize(
    "ratio, advantage, moves", [(1.5, 1, False), (0.5, -1, False), (1.1, 1, True), (1.5, -1, True)]
)
def test_a_clipped_token_has_no_gradient(ratio, advantage, moves):
    logprob = one(math.log(ratio)).requires_grad_()
    losses.pg_loss(logprob, one(0.0), one(advantage), tensor([[True]]))[0].sum().backward()
    assert bool(logprob.grad.abs() > 0) is moves


def test_at_ratio_1_the_gradient_is_that_of_the_policy_gradient():
    """Before the first update, ∇loss = −A ∇log π."""
    logprobs, advantages, mask = batch(3)
    logprobs.requires_grad_()
    losses.pg_loss(logprobs, logprobs.detach(), advantages, mask)[0].sum().backward()
    assert_close(logprobs.grad, -advantages * mask)


def test_weight_multiplies_the_loss_of_each_token():
    logprobs, advantages, mask = batch(4)
    plain, _ = losses.pg_loss(logprobs, logprobs, advantages, mask)
    doubled, _ = losses.pg_loss(
        logprobs, logprobs, advantages, mask, weight=torch.full_like(plain, 2)
    )
    assert_close(doubled, 2 * plain)


@pytest.mark.parametrize(
    "value, old, target, loss, clipped",
    [
        (1.0, 1.0, 3.0, 2.0, 0),  # ½·2²
        (2.0, 1.0, 3.0, 0.5 * 1.8**2, 1),  # clipped to 1.2: the larger loss counts
        (0.0, 1.0, 3.0, 4.5, 0),  # moved away from the target: ½·3² is larger than ½·2.2²
    ],
)
def test_vf_loss_by_hand(value, old, target, loss, clipped):
    got, was_clipped = losses.vf_loss(one(value), one(old), one(target), tensor([[True]]))
    assert got.item() == pytest.approx(loss)
    assert was_clipped.item() == clipped


def test_explained_variance_of_a_perfect_a_constant_and_a_wrong_critic():
    returns = tensor([[1.0, 2.0, 3.0, 99.0]])
    mask = tensor([[True, True, True, False]])
    perfect, constant = returns.clone(), torch.full_like(returns, 2.0)
    assert losses.explained_variance(perfect, returns, mask) == 1.0
    assert losses.explained_variance(constant, returns, mask) == 0.0
    # returns − values = 2, 4, 6: variance 4 against 1, so 1 − 4.
    assert losses.explained_variance(-returns, returns, mask) == -3.0
    assert losses.explained_variance(returns, returns, mask & False).isnan()


def test_importance_weight_is_the_capped_ratio_and_carries_no_gradient():
    train = tensor([[0.0, math.log(0.5), math.log(9.0)]], requires_grad=True)
    weight = losses.importance_weight(train, torch.zeros(1, 3), cap=2.0)
    assert_close(weight, tensor([[1.0, 0.5, 2.0]]))
    assert not weight.requires_grad


@pytest.mark.parametrize(
    "kl, expected",
    [
        (6.0, 0.1),  # on target
        (12.0, 0.1 * (1 + 0.2 * 64 / 1000)),  # twice the target: the error is clipped to 0.2
        (0.0, 0.1 * (1 - 0.2 * 64 / 1000)),
        (6.6, 0.1 * (1 + 0.1 * 64 / 1000)),  # 10 % above: not clipped
    ],
)
def test_adaptive_kl_coefficient_by_hand(kl, expected):
    assert losses.adapt_kl_coef(0.1, kl, 6.0, 1000, 64) == pytest.approx(expected)


# ---------------------------------------------------------------------- log-probabilities and KL


def test_token_logprobs_divide_the_logits_by_the_temperature():
    """Logits 0 and 1 at T = ½ are 0 and 2: log π = 2 − log(1 + e²)."""
    logits = tensor([[[0.0, 1.0]]])
    got = losses.token_logprobs(logits, tensor([[1]]), temperature=0.5)
    assert got.item() == pytest.approx(2 - math.log(1 + math.exp(2)))


def test_unknown_kl_estimator_is_refused():
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        losses.kl_estimate(one(0.0), one(0.0), "k4")


@pytest.fixture
def two():
    """A policy (its logits are the parameters) and a reference over five tokens."""
    g = torch.Generator().manual_seed(0)
    theta, ref = torch.randn(2, 5, generator=g, dtype=DOUBLE).unbind()
    return theta.clone().requires_grad_(), ref.log_softmax(0)


def expected(theta, ref, kind):
    """E over tokens of π of the estimate: enumerated, not sampled. π itself is held still."""
    logp = theta.log_softmax(0)
    return (logp.exp().detach() * losses.kl_estimate(logp, ref, kind)).sum()


def reverse_kl(theta, ref):
    """KL(π‖ref), exact and differentiable."""
    logp = theta.log_softmax(0)
    return (logp.exp() * (logp - ref)).sum()


def forward_kl(theta, ref):
    """KL(ref‖π), exact and differentiable."""
    return (ref.exp() * (ref - theta.log_softmax(0))).sum()


def gradient(loss, theta):
    return torch.autograd.grad(loss, theta)[0]


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_unbiased_estimates_of_the_kl(two, kind):
    assert_close(expected(*two, kind), reverse_kl(*two))


def test_k2_is_biased_and_k3_is_never_negative(two):
    theta, ref = two
    assert abs(expected(theta, ref, "k2") - reverse_kl(theta, ref)) > 1e-2
    assert (losses.kl_estimate(theta.log_softmax(0), ref, "k3") >= 0).all()
    assert (losses.kl_estimate(theta.log_softmax(0), ref, "k1") < 0).any()


@pytest.mark.parametrize(("kind", "cosine"), [("k1", 1.0), ("k2", 0.2), ("k3", 0.0)])
def test_as_a_reward_only_k1_has_the_gradient_of_the_kl(kind, cosine):
    """Where the estimate is a reward, its gradient is E[estimate · ∇log π]. Its cosine with that of
    the KL, as the help of `kl_estimator` has it: the mean of 50 policies over 1,024 tokens, each
    near its reference."""
    found = []
    for seed in range(50):
        g = torch.Generator().manual_seed(seed)
        theta, noise = torch.randn(2, 1024, generator=g, dtype=DOUBLE).unbind()
        theta, ref = theta.clone().requires_grad_(), (theta + 0.3 * noise).log_softmax(0)
        logp = theta.log_softmax(0)
        reward = losses.kl_estimate(logp, ref, kind).detach()
        as_reward = gradient((logp.exp().detach() * reward * logp).sum(), theta)
        true = gradient(reverse_kl(theta, ref), theta)
        found.append(torch.nn.functional.cosine_similarity(as_reward, true, dim=0))
    assert torch.stack(found).mean() == pytest.approx(cosine, abs=0.03)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_summed_over_a_response_the_estimate_is_the_kl_of_the_response(kind):
    """All 4 × 4 responses of two tokens, the second distribution depending on the first token."""
    g = torch.Generator().manual_seed(1)
    first = torch.randn(2, 4, generator=g, dtype=DOUBLE)
    second = torch.randn(2, 4, 4, generator=g, dtype=DOUBLE)
    pi, ref = ((a.log_softmax(-1), b.log_softmax(-1)) for a, b in zip(first, second, strict=True))
    exact = estimate = 0.0
    for a in range(4):
        for b in range(4):
            logp = torch.stack([pi[0][a], pi[1][a, b]])
            logr = torch.stack([ref[0][a], ref[1][a, b]])
            p = logp.sum().exp()
            exact += p * (logp.sum() - logr.sum())
            estimate += p * losses.kl_estimate(logp, logr, kind).sum()
    assert_close(estimate, exact)


def test_k1_as_a_loss_has_no_expected_gradient(two):
    """E[∇(log π − log ref)] = Σ π ∇log π = ∇Σ π = 0: minimising k1 by autograd does nothing."""
    got = gradient(expected(*two, "k1"), two[0])
    assert_close(got, torch.zeros(5, dtype=DOUBLE))
    assert gradient(reverse_kl(*two), two[0]).abs().max() > 1e-2  # what it should have been


def test_k2_as_a_loss_has_the_gradient_of_the_reverse_kl(two):
    assert_close(gradient(expected(*two, "k2"), two[0]), gradient(reverse_kl(*two), two[0]))


def test_k3_as_a_loss_has_the_gradient_of_the_forward_kl(two):
    got = gradient(expected(*two, "k3"), two[0])
    assert_close(got, gradient(forward_kl(*two), two[0]))
    assert not torch.allclose(got, gradient(reverse_kl(*two), two[0]))
