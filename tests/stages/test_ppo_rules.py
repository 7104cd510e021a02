"""The 24 rules of PPO for language models: each has a check, and a way of breaking the rule.

    pytest tests/stages/test_ppo_rules.py
    pytest tests/stages/test_ppo_rules.py -k rule_07

A test first runs its check on the trainer as it is. Then it breaks the rule on purpose, by a patch
or a setting, and asserts that the same check fails. A check that cannot fail teaches nothing.

    rule                                              test
     1 sample with the temperature only               test_rule_01_sampling_is_not_truncated
     2 temperature for policy and reference           test_rule_02_policy_and_reference_share_the_temperature
     3 ratio 1, KL 0 at the first minibatch           test_rule_03_step_0_invariant
     4 dropout off in all four models                 test_rule_04_dropout_is_off_in_all_four_models
     5 left padding, positions from the mask          test_rule_05_padding_does_not_change_a_score
     6 pad is not eos; score at the last real token   test_rule_06_pad_is_not_eos_and_the_last_token_rule
     7 truncate after the first stop token            test_rule_07_the_reward_model_scores_truncated_text
     8 a response without stop is penalised           test_rule_08_a_response_without_stop_is_penalised
     9 the score lands on the last real token         test_rule_09_the_score_lands_on_the_last_token
    10 log-probs from t−1, one constant beyond        test_rule_10_logprobs_come_from_the_position_before
    11 reward = −β(log π − log π_ref) + score         test_rule_11_reward_is_score_minus_beta_kl
    12 GAE over the response; returns unwhitened      test_rule_12_returns_are_advantages_plus_values
    13 whitening over the whole batch; token means    test_rule_13_advantages_are_whitened_over_the_batch,
                                                      test_rule_13_whitened_rewards_keep_their_mean,
                                                      test_rule_13_one_times_eight_equals_eight_times_one
    14 clips 0.2 and 0.2, value coefficient 0.1       test_rule_14_both_losses_are_clipped
    15 value model from reward model; head's std      test_rule_15_the_value_model_starts_as_the_reward_model,
                                                      test_rule_15_the_head_has_std_1_over_sqrt_d_plus_1
    16 reference responses score 0 on average         test_rule_16_the_offset_is_in_reward_and_value
    17 Adam ε 1e-5, anneal to 0, clipping             test_rule_17_optimizer
    18 adaptive KL coefficient                        test_rule_18_adaptive_kl_coefficient
    19 k1, k2, k3                                     test_rule_19_kl_estimators (gradients: test_maths.py)
    20 statistics are masked means                    test_rule_20_statistics_are_masked_means
    21 importance weight (pure function)              test_rule_21_importance_weight_is_capped
    22 reward model data                              test_rule_22_over_long_and_identical_pairs_are_counted
    23 who moves and who does not                     test_rule_23_policy_and_value_move_reference_and_reward_do_not
    24 no logits outlive a chunk                      test_rule_24_no_logits_outlive_a_chunk
"""  # noqa: E501

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close
from transformers import TrainerCallback

from rlhf_lab.models import load_reward_model, new_reward_model
from rlhf_lab.stages import maths, ppo, rollout, trl_stages
from rlhf_lab.stages.ppo import PPOTrainer
from rlhf_lab.stages.ppo_config import PPOConfig

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w10 w11", "w2", "w3 w3", "w12 w1", "w8 w9 w1 w4"]
T = 0.7
must_fail = pytest.raises(AssertionError)  # the check, once the rule is broken

# ------------------------------------------------------------------------------- what tests share


@pytest.fixture
def make(tiny, tmp_path):
    """`make(**settings)` → a PPOTrainer on four tiny random models and eight prompts.

    The value model is a copy of the reward model. `models` and `extra` replace arguments.
    """

    def make(kind="llama", models=None, extra=None, **settings):
        settings = {
            "output_dir": str(tmp_path), "per_device_train_batch_size": 8, "response_length": 8,
            "total_episodes": 24, "learning_rate": 1e-2, "num_ppo_epochs": 2, "temperature": T,
            "report_to": "none", **settings,
        }  # fmt: skip
        models = {
            "model": tiny.lm(0, kind), "ref_model": None, "reward_model": tiny.rm(1, kind),
            "value_model": tiny.rm(1, kind), **(models or {}),
        }  # fmt: skip
        rows = [{"prompt": p, "number": i} for i, p in enumerate(PROMPTS)]
        arguments = {"train_dataset": rows, "processing_class": tiny.tokenizer(), **(extra or {})}
        return PPOTrainer(PPOConfig(**settings), **models, **arguments)

    return make


def one_rollout(trainer, iteration=0, beta=0.05):
    """→ a complete rollout of all eight prompts, in their order, and its metrics."""
    return trainer.make_rollout(torch.arange(len(PROMPTS)), iteration, beta)


def scored(trainer, responses):
    """The rollout of hand-made responses to the first prompts, scored but not judged."""
    rows = trainer.train_dataset[: len(responses)]
    prompts = [trainer.tokenizer(r["prompt"])["input_ids"] for r in rows]
    ids, mask = rollout.pad_prompts(prompts, trainer.tokenizer.pad_token_id)
    with torch.no_grad():
        return trainer.score(ids, mask, torch.tensor(responses), torch.arange(len(rows)), rows)


def prefixes(r, row):
    """(prompt, said): the real tokens of one row as lists, without any padding."""
    real = r.ids[row][r.attention[row]].tolist()
    n = int(r.mask[row].sum())
    return real[: len(real) - n], real[len(real) - n :]


@torch.no_grad()
def naive_logprobs(model, r, row, temperature=T):
    """log π of each real token of a row: one unpadded forward pass per token."""
    prompt, said = prefixes(r, row)
    out = []
    for t, token in enumerate(said):
        logits = model(torch.tensor([prompt + said[:t]])).logits[0, -1]
        out.append(torch.log_softmax(logits / temperature, 0)[token])
    return torch.stack(out)


@torch.no_grad()
def naive_score(model, tokens):
    """The head at the last token of one unpadded sequence."""
    return model.score(model.base_model(torch.tensor([tokens])).last_hidden_state[0, -1])[0]


def close(a, b, atol=2e-5):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    assert_close(a, b, atol=atol, rtol=0)


def swap(monkeypatch, where, name, new):
    """Replace `where.name` by `new(the original)`."""
    monkeypatch.setattr(where, name, new(getattr(where, name)))


# -------------------------------------------------------------------------------- rules 1, 2 and 3


def check_sampling(make, tiny):
    """400 first tokens of one prompt follow softmax(logits / T): Pearson's test, and KL(q‖π) ≈ 0.

    q is the distribution that was really sampled, by its frequencies. Had it been truncated,
    KL(q‖π) would not be 0 before any update.
    """
    n, temperature = 400, 1.5
    extra = {"train_dataset": [{"prompt": "w1 w2 w3"}] * n}
    trainer = make(
        extra=extra, per_device_train_batch_size=n, response_length=1, temperature=temperature
    )
    r, _ = trainer.make_rollout(torch.arange(n), 0, 0.05)
    with torch.no_grad():
        p = (trainer.policy(torch.tensor([[1, 2, 3]])).logits[0, -1] / temperature).softmax(0)
    counts = torch.bincount(r.responses[:, 0], minlength=tiny.words)
    k = tiny.words - 1
    assert ((counts - n * p) ** 2 / (n * p)).sum() < k + 6 * (2 * k) ** 0.5
    q = counts / n
    kl = torch.special.xlogy(q, q / p).sum()
    assert kl < 3 * k / (2 * n)  # honest sampling of n tokens expects k / 2n


def top_k(sample):
    def truncated(logits, u, temperature=1.0):
        kept = logits.topk(4, -1).values[:, -1:]
        return sample(logits.masked_fill(logits < kept, -torch.inf), u, temperature)

    return truncated


def top_p(sample):
    def truncated(logits, u, temperature=1.0):
        ordered, index = (logits / temperature).softmax(-1).sort(-1, descending=True)
        out = ordered.cumsum(-1) - ordered > 0.8
        return sample(logits.masked_fill(out.scatter(1, index, out), -torch.inf), u, temperature)

    return truncated


def forgets_temperature(sample):
    return lambda logits, u, temperature=1.0: sample(logits, u, 1.0)


@pytest.mark.parametrize("broken", [top_k, top_p, forgets_temperature])
def test_rule_01_sampling_is_not_truncated(make, tiny, monkeypatch, broken):
    check_sampling(make, tiny)
    swap(monkeypatch, rollout, "sample_tokens", broken)
    with must_fail:
        check_sampling(make, tiny)


def check_temperature(make):
    """Log-probs of policy and (another) reference are those of softmax(logits / T); KL starts 0."""
    trainer = make()
    r, metrics = one_rollout(trainer)
    for row in range(4):
        n = int(r.mask[row].sum())
        close(r.logprobs[row, :n], naive_logprobs(trainer.policy, r, row))
        close(r.ref_logprobs[row, :n], naive_logprobs(trainer.reference, r, row))
    assert abs(metrics["kl"]) < 1e-5 and metrics["kl_k2"] < 1e-9


def test_rule_02_policy_and_reference_share_the_temperature(make, monkeypatch):
    check_temperature(make)

    def reference_at_1(logprobs):
        calls = []

        def score(model, ids, attention, responses, temperature, rows):
            calls.append(model)  # policy first, then reference
            temperature = 1.0 if len(calls) % 2 == 0 else temperature
            return logprobs(model, ids, attention, responses, temperature, rows)

        return score

    swap(monkeypatch, ppo, "response_logprobs", reference_at_1)
    with must_fail:
        check_temperature(make)


def check_step_0(trainer):
    """At every iteration the first minibatch has ratio 1 and KL 0; the reference's KL starts 0."""
    history = trainer.train().log_history
    assert len(history) == 3
    for h in history:
        assert h["first_ratio_error"] < 1e-5
        assert abs(h["first_approx_kl"]) < 1e-9
    assert abs(history[0]["kl"]) < 1e-5
    assert history[-1]["kl"] > 1e-3, "the policy must have moved, or the check says nothing"


def half_precision(logprobs):
    return lambda *args: logprobs(*args).bfloat16().float()


def unshifted_temperature(logprobs):
    return lambda m, i, a, r, temperature, rows: logprobs(m, i, a, r, 1.0, rows)


@pytest.mark.parametrize("split", [(8, 1, 1), (2, 4, 1), (2, 4, 4)])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rule_03_step_0_invariant(make, kind, split):
    """Whatever the batch is cut into, and whatever the chunk of the scoring passes."""
    size, accumulate, minibatches = split
    check_step_0(make(
        kind, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate,
        num_mini_batches=minibatches, local_rollout_forward_batch_size=3,
    ))  # fmt: skip


@pytest.mark.parametrize("broken", [half_precision, unshifted_temperature])
def test_rule_03_breaks_when_the_two_paths_differ(make, monkeypatch, broken):
    swap(monkeypatch, ppo, "response_logprobs", broken)
    with must_fail:
        check_step_0(make())


# ------------------------------------------------------------------------------------------ rule 4


def check_no_dropout(make, tiny, switch_on=None):
    """No dropout layer is ever called in training mode, and each of the four models is called."""
    noise = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    models = {
        "model": tiny.lm(0, "gpt2", **noise), "ref_model": tiny.lm(0, "gpt2", **noise),
        "reward_model": tiny.rm(1, "gpt2", **noise), "value_model": tiny.rm(1, "gpt2", **noise),
    }  # fmt: skip
    called = dict.fromkeys(models, 0)
    for name, model in models.items():
        model.train()  # as a careless caller leaves it

        def watch(module, args, name=name):
            called[name] += 1
            assert not module.training, f"dropout is on in {name}"

        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.register_forward_pre_hook(watch)
    trainer = make("gpt2", models=models, total_episodes=8)
    if switch_on:
        models[switch_on].train()
    trainer.train()
    assert all(called.values())
    assert trainer.state.log_history[0]["first_ratio_error"] < 1e-5


def test_rule_04_dropout_is_off_in_all_four_models(make, tiny):
    check_no_dropout(make, tiny)
    for role in ("model", "ref_model", "reward_model", "value_model"):
        with must_fail:
            check_no_dropout(make, tiny, switch_on=role)


# ------------------------------------------------------------------------------------ rules 5 to 8


def check_padding(make):
    """In a padded batch every log-prob, value and score is what the row gets alone."""
    trainer = make("gpt2")  # absolute positions: rotary ones forgive a constant shift
    r, _ = one_rollout(trainer)
    for row in range(4):
        prompt, said = prefixes(r, row)
        close(r.logprobs[row, : len(said)], naive_logprobs(trainer.policy, r, row))
        close(r.scores[row], naive_score(trainer.reward_model, prompt + said))
        alone = [naive_score(trainer.value_model, prompt + said[:t]) for t in range(len(said))]
        close(r.values[row, : len(said)], torch.stack(alone))


def positions_from_the_left(_):
    return lambda mask: torch.arange(mask.shape[1]).expand_as(mask)


def padding_is_attended_to(forward):
    def attend(model, ids, mask, **kwargs):
        everything = torch.ones_like(mask)  # no mask at all would be taken for packed sequences
        return model(
            input_ids=ids.masked_fill(~mask, 0), attention_mask=everything,
            position_ids=rollout.positions_of(mask), use_cache=False, **kwargs,
        )  # fmt: skip

    return attend


@pytest.mark.parametrize(
    "name, broken",
    [("positions_of", positions_from_the_left), ("forward_model", padding_is_attended_to)],
)
def test_rule_05_padding_does_not_change_a_score(make, monkeypatch, name, broken):
    check_padding(make)
    swap(monkeypatch, rollout, name, broken)
    with must_fail:
        check_padding(make)


def check_last_token(make, tiny):
    """Responses that end or fill the width, prompts with eos in them: always the last real one."""
    prompts = ["w1 <eos> w2", "w4 <eos>", "w5"]
    trainer = make(extra={"train_dataset": [{"prompt": p} for p in prompts]})
    e = tiny.eos
    r, _ = scored(trainer, [[5, e, 3], [6, 7, 8], [9, e, 10]])
    for row in range(3):
        prompt, said = prefixes(r, row)
        close(r.scores[row], naive_score(trainer.reward_model, prompt + said))


def score_at(position):
    """A reward that reads its score at another position of each row."""

    def broken(_):
        def scores(model, ids, mask):
            hidden = rollout.forward_model(rollout.trunk_of(model), ids, mask).last_hidden_state
            return model.score(hidden[torch.arange(len(ids)), position(ids)]).squeeze(-1)

        return scores

    return broken


@pytest.mark.parametrize(
    "position",
    [
        lambda ids: (ids == 14).int().argmax(1),  # the first eos: pad = eos would do this
        lambda ids: (ids == 15).int().argmax(1) - 1,  # before the first pad: wrong on the left
        lambda ids: torch.full((len(ids),), -1),  # the last column
    ],
    ids=["first eos", "before the first pad", "last column"],
)
def test_rule_06_pad_is_not_eos_and_the_last_token_rule(make, tiny, monkeypatch, position):
    check_last_token(make, tiny)
    swap(monkeypatch, ppo, "sequence_scores", score_at(position))
    with must_fail:
        check_last_token(make, tiny)


@pytest.mark.parametrize("pad", ["<eos>", None])
def test_rule_06_a_tokenizer_with_pad_eos_is_refused(make, tiny, pad):
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = pad
    with pytest.raises(ValueError, match="rule 6"):
        make(extra={"processing_class": tokenizer})


def check_truncation(make, tiny):
    """What stands after the first stop token does not reach reward, values or log-probs."""
    trainer = make()
    e = tiny.eos
    r, _ = scored(trainer, [[5, e, 3, 4], [6, 7, e, e], [e, 1, e, 2]])
    said = [[5, e], [6, 7, e], [e]]
    for row in range(3):
        prompt, _ = prefixes(r, row)
        expected = naive_score(
            trainer.reward_model, trainer.tokenizer(PROMPTS[row])["input_ids"] + said[row]
        )
        close(r.scores[row], expected)
        assert r.mask[row].sum() == len(said[row])
        assert not r.logprobs[row, len(said[row]) :].any()


def test_rule_07_the_reward_model_scores_truncated_text(make, tiny, monkeypatch):
    check_truncation(make, tiny)
    swap(monkeypatch, maths, "response_mask", lambda _: lambda t, stop: torch.ones_like(t).bool())
    with must_fail:
        check_truncation(make, tiny)


RESPONSES = [[5, 14, 15], [6, 7, 14], [8, 9, 10]]  # early, exactly at the limit, never


def check_penalty(make, **settings):
    """Only the response that never stops is touched: 2.5 less, or exactly −4."""
    trainer = make(**settings)
    r, raw = scored(trainer, RESPONSES)
    expected = raw.clone()
    if "missing_eos_penalty" in settings:
        expected[2] -= 2.5
    if "missing_eos_score" in settings:
        expected[2] = -4.0
    close(r.scores, expected)
    return r


@pytest.mark.parametrize("settings", [{"missing_eos_penalty": 2.5}, {"missing_eos_score": -4.0}])
@pytest.mark.parametrize("token", [14, 1], ids=["never penalised", "always penalised"])
def test_rule_08_a_response_without_stop_is_penalised(make, monkeypatch, settings, token):
    """Broken by taking every response, or none, for one that has stopped (14 is eos)."""
    check_penalty(make)
    check_penalty(make, **settings)

    def blind(right):
        return lambda self, s, m, r: right(self, s, m | True, torch.full_like(r, token))

    swap(monkeypatch, PPOTrainer, "_without_stop", blind)
    with must_fail:
        check_penalty(make, **settings)


def test_rule_08_breaks_when_an_ending_at_the_limit_counts_as_none(make, monkeypatch):
    def length_decides(_):
        return lambda scores, stopped, penalty: scores - penalty * torch.tensor([0.0, 1.0, 1.0])

    swap(monkeypatch, maths, "missing_stop_score", length_decides)
    with must_fail:
        check_penalty(make, missing_eos_penalty=2.5)


# ----------------------------------------------------------------------------------- rules 9 to 12


def check_score_position(make, tiny):
    """β = 0 leaves the score alone: early end, end at the limit, no end, empty response."""
    trainer = make()
    r, _ = scored(trainer, RESPONSES + [[14, 15, 15]])  # the last is empty: a bare stop token
    trainer.judge(r, beta=0.0)
    expected = torch.zeros(4, 3)
    for row, column in enumerate((1, 2, 2, 0)):
        expected[row, column] = r.scores[row]
    close(trainer._last_rewards, expected)


@pytest.mark.parametrize("place", ["one later, as TRL", "first token", "last column"])
def test_rule_09_the_score_lands_on_the_last_token(make, tiny, monkeypatch, place):
    check_score_position(make, tiny)

    def elsewhere(right):
        def rewards(kl, scores, mask, beta, late=False):
            if place.startswith("one later"):
                return right(kl, scores, mask, beta, late=True)
            wrong = -beta * kl * mask
            wrong[:, 0 if place == "first token" else -1] += scores
            return wrong

        return rewards

    swap(monkeypatch, maths, "token_rewards", elsewhere)
    with must_fail:
        check_score_position(make, tiny)


def check_logprob_index(trainer):
    """Token t is predicted at t−1; beyond the end both models' log-probs are the same constant."""
    r, _ = one_rollout(trainer)
    assert not r.mask.all(), "the check needs padding"
    for row in range(4):
        n = int(r.mask[row].sum())
        close(r.logprobs[row, :n], naive_logprobs(trainer.policy, r, row))
    beyond = ~r.mask
    close(r.logprobs[beyond], r.ref_logprobs[beyond], atol=0)
    assert len(set(r.logprobs[beyond].tolist())) == 1


def off_by_one(_):
    def logits(model, ids, mask, length):
        return rollout.forward_model(model, ids, mask, logits_to_keep=length).logits

    return logits


def other_constant(score):
    def scored(self, *args):
        r, raw = score(self, *args)
        r.ref_logprobs = r.ref_logprobs.masked_fill(~r.mask, 1.0)
        return r, raw

    return scored


@pytest.mark.parametrize(
    "where, name, broken",
    [(rollout, "response_logits", off_by_one), (PPOTrainer, "score", other_constant)],
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
    r, metrics = one_rollout(trainer, beta=args.kl_coef)
    for row in range(len(PROMPTS)):
        n = int(r.mask[row].sum())
        pi, ref = r.logprobs[row, :n].tolist(), r.ref_logprobs[row, :n].tolist()
        expected = [-0.05 * (a - b) for a, b in zip(pi, ref, strict=True)]
        expected[-1] += float(r.scores[row])
        close(trainer._last_rewards[row], expected + [0.0] * (r.mask.shape[1] - n))
    assert metrics["kl"] > 0.1  # nats per response, summed over its tokens
    close(metrics["kl"], float((r.logprobs - r.ref_logprobs).sum() / len(PROMPTS)))
    close(metrics["objective"], metrics["score"] - 0.05 * metrics["kl"])


@pytest.mark.parametrize(
    "broken",
    [
        lambda right: lambda kl, s, m, beta, late=False: right(-kl, s, m, beta, late),
        lambda right: lambda kl, s, m, beta, late=False: right(kl, 0 * s, m, beta, late),
        lambda right: lambda kl, s, m, beta, late=False: right(kl, beta * s, m, 1.0, late),
    ],
    ids=["sign of the KL", "no score", "beta on the score"],
)
def test_rule_11_reward_is_score_minus_beta_kl(make, tiny, monkeypatch, broken):
    check_rewards(make, tiny)
    swap(monkeypatch, maths, "token_rewards", broken)
    with must_fail:
        check_rewards(make, tiny)


def check_returns(make, tiny):
    """Plain Python GAE over each response's own tokens; returns from unwhitened advantages."""
    trainer = make(models={"ref_model": tiny.lm(7)})
    r, _ = one_rollout(trainer)
    for row in range(len(PROMPTS)):
        n = int(r.mask[row].sum())
        reward, value = trainer._last_rewards[row].tolist(), r.values[row].tolist()
        advantage, expected = 0.0, [0.0] * r.mask.shape[1]
        for t in reversed(range(n)):
            following = value[t + 1] if t + 1 < n else 0.0
            advantage = reward[t] + following - value[t] + 0.95 * advantage
            expected[t] = advantage + value[t]
        close(r.returns[row], expected)


def whitened_returns(gae):
    def broken(rewards, values, mask, *args):
        advantages, _ = gae(rewards, values, mask, *args)
        return advantages, (maths.whiten(advantages, mask) + values) * mask

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
    swap(monkeypatch, maths, "gae", broken)
    with must_fail:
        check_returns(make, tiny)


# ----------------------------------------------------------------------------------------- rule 13


def check_whitening(make):
    """Over the real tokens of the whole rollout: mean 0, unbiased variance 1; 0 elsewhere."""
    trainer = make(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    r, _ = one_rollout(trainer)
    raw = (r.returns - r.values)[r.mask]
    expected = (raw - raw.mean()) / raw.std(unbiased=True)
    close(r.advantages[r.mask], expected, atol=1e-4)
    assert not r.advantages[~r.mask].any()


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
    swap(monkeypatch, maths, "whiten", broken)
    with must_fail:
        check_whitening(make)


def check_whitened_rewards(make):
    """Off by default; when on, deviation 1 and the mean stays."""
    plain = make()
    one_rollout(plain)
    assert not plain.args.whiten_rewards
    trainer = make(whiten_rewards=True)
    r, _ = one_rollout(trainer)
    before, after = plain._last_rewards[r.mask], trainer._last_rewards[r.mask]
    close(after.std(), 1.0, atol=1e-4)
    close(after.mean(), before.mean(), atol=1e-5)


def test_rule_13_whitened_rewards_keep_their_mean(make, monkeypatch):
    check_whitened_rewards(make)
    swap(monkeypatch, maths, "whiten",
         lambda right: lambda v, m, **k: right(v, m, **{**k, "shift_mean": True}))  # fmt: skip
    with must_fail:
        check_whitened_rewards(make)


def trained_weights(make, tiny, monkeypatch, size, accumulate):
    """Weights after two iterations in real double precision (`.float()` inside is lifted)."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    models = {
        "model": tiny.lm(0, "gpt2").double(), "reward_model": tiny.rm(1, "gpt2").double(),
        "value_model": tiny.rm(1, "gpt2").double(),
    }  # fmt: skip
    trainer = make(
        models=models, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate,
        total_episodes=16, learning_rate=1e-3,
    )  # fmt: skip
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def check_accumulation(make, tiny, monkeypatch):
    whole = trained_weights(make, tiny, monkeypatch, 8, 1)
    for size, accumulate in ((1, 8), (2, 4)):
        other = trained_weights(make, tiny, monkeypatch, size, accumulate)
        close(other, whole, atol=1e-7)


def mean_of_means(losses):
    """Each pass divides by its own tokens: short responses weigh more than long ones."""

    def broken(self, mb, tokens, value_tokens):
        share = len(mb.ids) / self.args.rollout_batch_size
        return losses(self, mb, mb.mask.sum() / share, mb.value_mask.sum() / share)

    return broken


def test_rule_13_one_times_eight_equals_eight_times_one(make, tiny, monkeypatch):
    check_accumulation(make, tiny, monkeypatch)
    swap(monkeypatch, PPOTrainer, "losses", mean_of_means)
    with must_fail:
        check_accumulation(make, tiny, monkeypatch)


# ----------------------------------------------------------------------------------- rules 14 to 17


def check_losses(make):
    """The loss of a minibatch against the formulas, written out with 0.2, 0.2 and 0.1."""
    trainer = make()
    args = trainer.args
    assert (args.cliprange, args.cliprange_value, args.vf_coef) == (0.2, 0.2, 0.1)
    r, _ = one_rollout(trainer)
    g = torch.Generator().manual_seed(0)  # pretend that policy and critic have moved far
    r.logprobs = (r.logprobs + torch.randn(r.mask.shape, generator=g)) * r.mask
    r.values = (r.values + torch.randn(r.mask.shape, generator=g)) * r.mask
    n = r.mask.sum()
    loss, stats, _ = trainer.losses(r, n, n)
    with torch.no_grad():
        logp, _, v = trainer.model(r.ids, r.attention, r.responses, T)
    policy = value = clipped = 0.0
    for row, t in r.mask.nonzero().tolist():
        ratio = math.exp(logp[row, t] - r.logprobs[row, t])
        a = float(r.advantages[row, t])
        near = min(max(ratio, 0.8), 1.2)
        policy += max(-a * ratio, -a * near)
        clipped += -a * near > -a * ratio
        old, target = float(r.values[row, t]), float(r.returns[row, t])
        new = float(v[row, t])
        near = min(max(new, old - 0.2), old + 0.2)
        value += 0.5 * max((new - target) ** 2, (near - target) ** 2)
    close(loss.detach(), (policy + 0.1 * value) / float(n), atol=1e-4)
    close(stats[:3], [policy / float(n), value / float(n), clipped / float(n)], atol=1e-4)


@pytest.mark.parametrize(
    "name, broken",
    [
        ("ppo_loss", lambda right: lambda p, o, a, m, clip, **k: right(p, o, a, m, 1e9, **k)),
        ("ppo_loss", lambda right: lambda p, o, a, m, clip, **k: right(p, o, -a, m, clip, **k)),
        ("value_loss", lambda right: lambda v, o, r, m, clip: right(v, o, r, m, 1e9)),
        ("value_loss", lambda right: lambda v, o, r, m, c: tuple(2 * x for x in right(v, o, r, m))),
    ],
    ids=["no policy clip", "sign", "no value clip", "no half"],
)
def test_rule_14_both_losses_are_clipped(make, monkeypatch, name, broken):
    check_losses(make)
    swap(monkeypatch, maths, name, broken)
    with must_fail:
        check_losses(make)


def check_value_start(trainer):
    """Before training, V at a position is the reward model's score of the text so far."""
    r, _ = one_rollout(trainer)
    for row in range(3):
        prompt, said = prefixes(r, row)
        for t in range(len(said)):
            close(r.values[row, t], naive_score(trainer.reward_model, prompt + said[:t]))


def test_rule_15_the_value_model_starts_as_the_reward_model(make, tiny):
    check_value_start(make())
    with must_fail:
        check_value_start(make(models={"value_model": tiny.rm(2)}))


def test_rule_15_one_model_in_two_roles_is_refused(make, tiny):
    """A shared object would train the reward model along with the critic."""
    model, reward = tiny.lm(0), tiny.rm(1)
    for models in (
        {"reward_model": reward, "value_model": reward},
        {"model": model, "ref_model": model},
        {"model": model, "value_model": model},
    ):
        with pytest.raises(ValueError, match="separate copies"):
            make(models=models)


def check_head(model):
    """400 weights of a new head: std 1/√(d+1) within 15 %, mean near 0, no bias."""
    head, d = model.score.weight.detach(), model.config.hidden_size
    assert head.shape == (1, d) and model.score.bias is None
    assert abs(head.std() * (d + 1) ** 0.5 - 1) < 0.15
    assert abs(head.mean()) * d**0.5 < 4 * head.std()


def test_rule_15_the_head_has_std_1_over_sqrt_d_plus_1(tiny, tmp_path):
    """transformers' own initialisation has another one: the check tells them apart."""
    big = {"hidden_size": 400, "num_hidden_layers": 1, "intermediate_size": 8}
    tiny.lm(0, **big, num_attention_heads=4).save_pretrained(tmp_path)
    model = new_reward_model(tmp_path, tiny.tokenizer())
    check_head(model)
    assert model.config.pad_token_id == tiny.pad
    again = new_reward_model(tmp_path, tiny.tokenizer())
    assert torch.equal(model.score.weight, again.score.weight), "the same seed, the same head"
    with must_fail:
        check_head(load_reward_model(tmp_path))


def check_offset(make, tiny, reward=None, value=None):
    """With the offset the reference responses score 0 on average, and the values agree."""
    plain = make()
    r, raw = one_rollout(plain)
    models = {"reward_model": reward or tiny.rm(1), "value_model": value or tiny.rm(1)}
    for model in models.values():
        if not hasattr(model.config, "score_offset"):
            model.config.score_offset = -raw["reward"]
    trainer = make(models=models)
    shifted, metrics = one_rollout(trainer)
    close(metrics["reward"], 0.0)
    close(shifted.values[r.mask], r.values[r.mask] - raw["reward"])


@pytest.mark.parametrize("forgets", ["reward", "value"])
def test_rule_16_the_offset_is_in_reward_and_value(make, tiny, forgets):
    check_offset(make, tiny)
    without = tiny.rm(1)
    without.config.score_offset = 0.0
    with must_fail:
        check_offset(make, tiny, **{forgets: without})


def test_rule_16_the_offset_travels_with_the_saved_model(tiny, tmp_path):
    """It lives in the config: saved, loaded, copied with the model that it belongs to."""
    model = tiny.rm(1)
    model.config.score_offset = 1.25
    model.save_pretrained(tmp_path)
    assert load_reward_model(tmp_path).config.score_offset == 1.25
    assert copy.deepcopy(model).config.score_offset == 1.25


def check_optimizer(make, **settings):
    """Adam ε 1e-5; the rate falls in a straight line to 0; gradients enter the step clipped."""
    trainer = make(**{"total_episodes": 32, "learning_rate": 0.01, **settings})
    optimizer = trainer.optimizer.optimizer
    assert {g["eps"] for g in optimizer.param_groups} == {1e-5}
    norms, rates = [], []

    def watch(optimizer, args, kwargs):
        grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        norms.append(float(torch.linalg.vector_norm(torch.cat([x.flatten() for x in grads]))))
        rates.append(optimizer.param_groups[0]["lr"])

    optimizer.register_step_pre_hook(watch)
    history = trainer.train().log_history
    assert max(norms) <= 0.05 + 1e-6
    assert max(h["grad_norm"] for h in history) > 0.05, "clipping must have had work to do"
    assert rates == pytest.approx([0.01] * 2 + [0.0075] * 2 + [0.005] * 2 + [0.0025] * 2)
    assert [h["learning_rate"] for h in history] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert trainer.scheduler.get_last_lr() == [0.0]


def test_rule_17_optimizer(make):
    """Broken by Adam's own ε, by a constant rate, by no clipping."""
    assert PPOConfig(output_dir="x").max_grad_norm == 1.0
    good = {"max_grad_norm": 0.05}
    check_optimizer(make, **good)
    for bad in (
        {"adam_epsilon": 1e-8}, {"lr_scheduler_type": "constant"}, {"max_grad_norm": 0.0},
    ):  # fmt: skip
        with must_fail:
            check_optimizer(make, **{**good, **bad})


# ----------------------------------------------------------------------------------- rules 18 to 22


def check_controller(make):
    """β of each iteration from the KL of the one before: β(1 + clip(KL/target − 1, ±0.2)·n/h)."""
    trainer = make(kl_target=0.5, kl_horizon=20, learning_rate=0.05, total_episodes=32)
    history = trainer.train().log_history
    beta = 0.05
    for h in history:
        assert h["kl_coef"] == pytest.approx(beta)
        beta *= 1 + min(max(h["kl"] / 0.5 - 1, -0.2), 0.2) * 8 / 20
    assert any(h["kl"] > 0.6 for h in history), "the check needs an error beyond the clip"


def test_rule_18_adaptive_kl_coefficient(make, monkeypatch):
    assert {h["kl_coef"] for h in make().train().log_history} == {0.05}, "fixed by default"
    check_controller(make)

    def unclipped(beta, kl, target, horizon, episodes):
        return beta * (1 + (kl / target - 1) * episodes / horizon)

    monkeypatch.setattr(maths, "adapt_kl_coef", unclipped)
    with must_fail:
        check_controller(make)


def check_kl_estimators(pi, ref):
    """Exact expectations under π: k1 and k3 give KL(π‖ref); k2 = k1²/2; k3 ≥ 0."""
    exact = (pi.exp() * (pi - ref)).sum()
    for kind in ("k1", "k3"):
        close((pi.exp() * maths.kl_estimate(pi, ref, kind)).sum(), exact, atol=1e-9)
    close(maths.kl_estimate(pi, ref, "k2"), (pi - ref) ** 2 / 2, atol=1e-12)
    assert (maths.kl_estimate(pi, ref, "k3") >= 0).all()


@pytest.mark.parametrize("broken", ["other direction", "k3 of the wrong sign"])
def test_rule_19_kl_estimators(monkeypatch, broken):
    """The gradients of k1, k2 and k3 are in test_maths.py."""
    g = torch.Generator().manual_seed(0)
    pi, ref = torch.randn(2, 6, generator=g, dtype=torch.float64).log_softmax(-1)
    check_kl_estimators(pi, ref)

    def wrong(right):
        if broken == "other direction":
            return lambda a, b, kind="k1": right(b, a, kind)
        return lambda a, b, kind="k1": right(b, a, kind) if kind == "k3" else right(a, b, kind)

    swap(monkeypatch, maths, "kl_estimate", wrong)
    with must_fail:
        check_kl_estimators(pi, ref)


def check_statistics(make):
    """With 4 passes of 2 rows and one step, ratio is exactly 1 (TRL logs 0.25), and the entropy is
    the mean over real tokens of the distribution's, computed without padding."""
    trainer = make(per_device_train_batch_size=2, gradient_accumulation_steps=4, num_ppo_epochs=1)
    r, metrics = one_rollout(trainer)
    assert not r.mask.all()
    entropies = []
    for row in range(len(PROMPTS)):
        prompt, said = prefixes(r, row)
        with torch.no_grad():
            logits = trainer.policy(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1]
        entropies.append(torch.distributions.Categorical(logits=logits / T).entropy())
    lengths = [len(prefixes(r, row)[1]) for row in range(len(PROMPTS))]
    close(metrics["response_length"], sum(lengths) / 8)
    close(metrics["sampled_entropy"], float(-r.logprobs[r.mask].sum() / 8))
    close(metrics["stopped"], sum(14 in prefixes(r, row)[1] for row in range(8)) / 8)
    stats = trainer.update(r, 0)
    close(stats["ratio"], 1.0)
    close(stats["entropy"], torch.cat(entropies).mean())
    assert stats["policy_clip_fraction"] == 0.0


@pytest.mark.parametrize(
    "tokens",
    [
        lambda mb, tokens: torch.tensor(mb.mask.numel() * 4),  # all positions, real or not
        lambda mb, tokens: tokens * 4,  # the mean of a buffer that is mostly empty, as TRL
        lambda mb, tokens: mb.mask.sum(),  # each pass a mean: they add up to 4
    ],
    ids=["unmasked", "empty slots counted", "sum of means"],
)
def test_rule_20_statistics_are_masked_means(make, monkeypatch, tokens):
    check_statistics(make)
    swap(monkeypatch, PPOTrainer, "losses",
         lambda right: lambda self, mb, n, v: right(self, mb, tokens(mb, n), v))  # fmt: skip
    with must_fail:
        check_statistics(make)


def check_importance():
    """E under the rollout engine of min(w, C)·f: with C = ∞ exactly E under the trained policy."""
    g = torch.Generator().manual_seed(0)
    train, engine = torch.randn(2, 6, generator=g, dtype=torch.float64).log_softmax(-1)
    f = torch.arange(6.0, dtype=torch.float64)
    weight = maths.importance_weight(train, engine, cap=math.inf)
    close((engine.exp() * weight * f).sum(), (train.exp() * f).sum(), atol=1e-9)
    capped = maths.importance_weight(train, engine, cap=1.1)
    close(capped, [min(float(w), 1.1) for w in (train - engine).exp()], atol=1e-9)
    assert float((train - engine).exp().max()) > 1.1


@pytest.mark.parametrize(
    "broken",
    [
        lambda right: lambda a, b, cap=2.0: right(b, a, cap),
        lambda right: lambda a, b, cap=2.0: right(a, b, math.inf),
    ],
    ids=["upside down", "no cap"],
)
def test_rule_21_importance_weight_is_capped(monkeypatch, broken):
    """A pure function until a rollout engine differs."""
    check_importance()
    swap(monkeypatch, maths, "importance_weight", broken)
    with must_fail:
        check_importance()


PAIRS = [
    {"prompt": "w1 w2", "chosen": "w3", "rejected": "w4 w5"},  # 2 + 3 tokens with eos: just fits
    {"prompt": "w1 w2", "chosen": "w3 w4 w5", "rejected": "w6"},  # 2 + 4: one too many
    {"prompt": "w1 w2", "chosen": "w3", "rejected": "w4 w5 w6 w7"},
    {"prompt": "w1", "chosen": "w3", "rejected": "w3"},
    {"prompt": "w1 w2 w3", "chosen": "w4", "rejected": "w5"},
]


def check_pairs(tokenizer):
    """Over-long pairs are dropped whole, never cut; every drop is counted; each row ends in eos."""
    made, dropped = trl_stages.pair_rows(tokenizer, PAIRS, max_length=5)
    assert dropped == {"too long": 2, "identical": 1}
    assert len(made) == len(PAIRS) - sum(dropped.values())
    assert made[0] == {"prompt_ids": [1, 2], "chosen_ids": [3, 14], "rejected_ids": [4, 5, 14]}
    for row in made:
        for answer in ("chosen_ids", "rejected_ids"):
            assert len(row["prompt_ids"]) + len(row[answer]) <= 5
            assert row[answer][-1] == tokenizer.eos_token_id != tokenizer.pad_token_id
            assert tokenizer.pad_token_id not in row["prompt_ids"] + row[answer]


def silently_cut(right):
    """What a truncating trainer does: cuts to the length, keeps pairs that have become equal."""

    def broken(tokenizer, rows, max_length):
        made, dropped = right(tokenizer, rows, 10**6)
        for row in made:
            room = max_length - len(row["prompt_ids"])
            row |= {k: row[k][:room] for k in ("chosen_ids", "rejected_ids")}
        return made, dropped

    return broken


def silently_filtered(right):
    return lambda *a, **k: (right(*a, **k)[0], {"too long": 0, "identical": 0})


def pad_is_eos(right):
    def broken(tokenizer, *args, **kwargs):
        tokenizer.pad_token = tokenizer.eos_token
        return right(tokenizer, *args, **kwargs)

    return broken


@pytest.mark.parametrize("broken", [silently_cut, silently_filtered, pad_is_eos])
def test_rule_22_over_long_and_identical_pairs_are_counted(tiny, monkeypatch, broken):
    check_pairs(tiny.tokenizer())
    swap(monkeypatch, trl_stages, "pair_rows", broken)
    with must_fail:
        check_pairs(tiny.tokenizer())


def test_rule_22_sft_rows_learn_the_response_only_and_count_what_is_too_long(tiny):
    rows = [{"prompt": "w1 w2", "completion": "w3"}, {"prompt": "w1", "completion": "w3 w4 w5 w6"}]
    made, dropped = trl_stages.sft_rows(tiny.tokenizer(), rows, max_length=4)
    assert made == [{"input_ids": [1, 2, 3, tiny.eos], "completion_mask": [0, 0, 1, 1]}]
    assert dropped == 1


# ------------------------------------------------------------------------------------ rules 23, 24


class Meddle(TrainerCallback):
    """Breaks rule 23: nudges a model that should stand still, or undoes one that should move."""

    def __init__(self, model, still: bool):
        self.model, self.still = model, still
        self.start = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        for p, start in zip(self.model.parameters(), self.start, strict=True):
            p.copy_(start if self.still else p + 1e-3)


def check_who_moves(make, tiny, meddle_with=None):
    models = {
        "model": tiny.lm(0), "ref_model": tiny.lm(0), "reward_model": tiny.rm(1),
        "value_model": tiny.rm(1),
    }  # fmt: skip
    start = {k: copy.deepcopy(m.state_dict()) for k, m in models.items()}
    callbacks = []
    if meddle_with:
        should_move = meddle_with in ("model", "value_model")
        callbacks = [Meddle(models[meddle_with], still=should_move)]
    make(models=models, extra={"callbacks": callbacks}, total_episodes=8).train()
    for role, model in models.items():
        moved = [k for k, w in model.state_dict().items() if not torch.equal(w, start[role][k])]
        expected = len(start[role]) if role in ("model", "value_model") else 0
        assert len(moved) == expected, f"{role}: {len(moved)} of {len(start[role])} tensors moved"


def test_rule_23_policy_and_value_move_reference_and_reward_do_not(make, tiny):
    check_who_moves(make, tiny)
    for role in ("model", "value_model", "ref_model", "reward_model"):
        with must_fail:
            check_who_moves(make, tiny, meddle_with=role)


def check_largest_logits(make, tiny):
    """With chunks of one row, the logits alive while scoring never exceed what one row makes."""
    alive, peak = {}, [0]

    def watch(module, args, output):
        storage = output.untyped_storage()
        alive[storage.data_ptr()] = (torch.multiprocessing.reductions.StorageWeakRef(storage),
                                     storage.nbytes())  # fmt: skip
        peak[0] = max(peak[0], sum(n for ref, n in alive.values() if not ref.expired()))

    trainer = make(local_rollout_forward_batch_size=1)
    responses = torch.arange(24).reshape(8, 3) % 12  # nobody stops
    handles = [m.lm_head.register_forward_hook(watch) for m in (trainer.policy, trainer.reference)]
    scored(trainer, responses.tolist())
    for handle in handles:
        handle.remove()
    one_row = 4 * (3 + 1) * tiny.words  # fp32, one position more than the response
    assert 0 < peak[0] <= one_row, f"{peak[0] // one_row} rows of logits at once"
    assert not any(not ref.expired() for ref, _ in alive.values())


def keeps_everything(_):
    """What TRL's rollout did: every response's logits stay until the end."""
    kept = []

    def broken(model, ids, attention, responses, temperature, rows):
        pieces = zip(ids.split(rows), attention.split(rows), strict=True)
        kept.extend(rollout.response_logits(model, i, a, responses.shape[1]) for i, a in pieces)
        return maths.token_logprobs(torch.cat(kept[-len(ids) :]), responses, temperature)

    return broken


def all_at_once(right):
    return lambda *args: right(*args[:-1], 10**6)


@pytest.mark.parametrize("broken", [keeps_everything, all_at_once])
def test_rule_24_no_logits_outlive_a_chunk(make, tiny, monkeypatch, broken):
    check_largest_logits(make, tiny)
    swap(monkeypatch, ppo, "response_logprobs", broken)
    with must_fail:
        check_largest_logits(make, tiny)


# ------------------------------------------------------------- what follows from the rules together


def test_the_same_seed_gives_the_same_metrics(make):
    first, again, other = (make(seed=s).train().log_history for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_rollouts_do_not_depend_on_batch_order(make):
    """A permuted batch gives the permuted rollout: tokens the same, numbers up to rounding."""
    trainer = make("gpt2")
    order = torch.tensor([3, 0, 7, 5, 1, 6, 2, 4])
    whole, _ = one_rollout(trainer)
    mixed, _ = trainer.make_rollout(order, 0, 0.05)
    assert torch.equal(mixed.responses, whole.responses[order])
    for name in ("logprobs", "values", "scores", "advantages", "returns"):
        close(getattr(mixed, name), getattr(whole, name)[order], atol=1e-4)


def test_every_prompt_is_used_once_per_pass(make):
    """24 episodes over 8 prompts in batches of 8, then in batches of 6 across the borders."""
    trainer = make()
    for iteration in range(3):
        assert sorted(trainer.next_prompts(iteration).tolist()) == list(range(8))
    trainer = make(per_device_train_batch_size=6)
    drawn = torch.cat([trainer.next_prompts(i) for i in range(4)]).tolist()
    assert [sorted(drawn[i : i + 8]) for i in (0, 8, 16)] == [list(range(8))] * 3


def test_every_minibatch_makes_one_step_on_every_row_once(make, monkeypatch):
    """4 minibatches × 2 epochs = 8 steps an iteration; each epoch sees each response once."""
    seen = []

    def noting(step):
        return lambda self, mb: (seen.append(mb.index.tolist()), step(self, mb))[1]

    swap(monkeypatch, PPOTrainer, "step", noting)
    trainer = make(num_mini_batches=4, total_episodes=8)
    steps = []
    trainer.optimizer.optimizer.register_step_post_hook(lambda *args: steps.append(1))
    trainer.train()
    assert len(seen) == len(steps) == 8
    assert all(len(rows) == 2 for rows in seen)
    for epoch in (seen[:4], seen[4:]):
        assert sorted(sum(epoch, [])) == list(range(8))
    assert seen[:4] != seen[4:], "each epoch is shuffled anew"


def test_reward_functions_are_called_as_grpotrainer_calls_them(make, tiny):
    """Keyword arguments prompts, completions and every other column; a list of floats back."""
    calls = []

    def count_words(prompts, completions, number, **kwargs):
        calls.append(SimpleNamespace(prompts=prompts, completions=completions, number=number))
        return [float(len(c.split())) for c in completions]

    def ten(completions, **kwargs):
        return [10.0] * len(completions)

    trainer = make(extra={"reward_funcs": [count_words, ten]}, models={"reward_model": None})
    r, metrics = one_rollout(trainer)
    (call,) = calls
    assert call.prompts == PROMPTS and call.number == list(range(8))
    assert all("<" not in c for c in call.completions), "no special tokens in the text"
    said = [[t for t in prefixes(r, row)[1] if t not in (13, 14, 15)] for row in range(8)]
    assert r.scores.tolist() == [10.0 + len(s) for s in said]
    assert metrics["reward"] == pytest.approx(10 + sum(map(len, said)) / 8)


def test_reward_functions_are_added_to_the_reward_model(make):
    r, _ = one_rollout(make())
    both, _ = one_rollout(make(extra={"reward_funcs": lambda completions, **k: [3.0] * 8}))
    close(both.scores, r.scores + 3)


def test_a_reward_function_that_miscounts_is_named(make):
    def short(completions, **kwargs):
        return [1.0]

    with pytest.raises(ValueError, match="short gave 1 rewards for 8"):
        one_rollout(make(extra={"reward_funcs": short}))


def test_ready_made_input_ids_equal_their_text(make, tiny):
    """The column TRL's PPOTrainer asked for."""
    tokenizer = tiny.tokenizer()
    rows = [{"input_ids": tokenizer(p)["input_ids"]} for p in PROMPTS]
    ready, _ = one_rollout(make(extra={"train_dataset": rows}))
    text, _ = one_rollout(make())
    assert torch.equal(ready.ids, text.ids)


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"num_mini_batches": 3}, "does not split"),
        ({"temperature": 0.0}, "above 0"),
        ({"response_length": 0}, "response_length"),
        ({"kl_estimator": "k9"}, "k1, k2 or k3"),
        ({"stop_token": "never"}, "stop_token"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(make, settings, line):
    with pytest.raises(ValueError, match=line):
        make(**settings)


def test_a_trainer_without_rewards_or_prompts_is_refused(make):
    with pytest.raises(ValueError, match="reward_model or reward_funcs"):
        make(models={"reward_model": None})
    with pytest.raises(ValueError, match="no prompts"):
        make(extra={"train_dataset": []})


def test_with_lora_the_adapters_move_and_the_base_is_the_reference(make, tiny):
    """peft_config: the rules hold (ratio 1, KL 0 at first), and only adapters and critic train."""
    from peft import LoraConfig

    base = tiny.lm(0)
    before = {k: w.clone() for k, w in base.state_dict().items()}
    trainer = make(
        models={"model": base}, extra={"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}
    )
    check_step_0(trainer)
    after = trainer.policy.state_dict()
    for name, weight in before.items():
        same = [k for k in after if k.replace(".base_layer", "").endswith(name)]
        assert len(same) == 1 and torch.equal(after[same[0]], weight)
    assert any(w.any() for k, w in after.items() if "lora_B" in k), "B starts at 0 and must move"
    for name, weight in trainer.reference.state_dict().items():
        assert torch.equal(weight, before[name])


def test_samples_are_handed_over_with_their_rewards(make):
    """`on_sample(step, rows)`: prompt, response, reward and every watched metric."""
    got = []
    extra = {
        "on_sample": lambda step, rows: got.append((step, rows)),
        "metric_funcs": {"words": lambda completions, **k: [len(c.split()) for c in completions]},
    }
    trainer = make(extra=extra)
    r, metrics = one_rollout(trainer)
    ((step, rows),) = got
    assert step == 1 and [row["prompt"] for row in rows] == PROMPTS[:4]
    assert [row["reward"] for row in rows] == r.scores[:4].tolist()
    assert [row["words"] for row in rows] == [len(row["response"].split()) for row in rows]
    assert "words" in metrics


def test_without_a_stop_token_every_response_has_full_length(make):
    h = make(stop_token=None, total_episodes=8).train().log_history[0]
    assert h["response_length"] == 8 and h["stopped"] == 0


def test_samples_of_a_batch_smaller_than_four(make):
    got = []
    extra = {
        "on_sample": lambda step, rows: got.extend(rows),
        "metric_funcs": {"one": lambda completions, **k: [1.0] * len(completions)},
    }
    make(extra=extra, per_device_train_batch_size=2, total_episodes=2).train()
    assert len(got) == 2


def test_a_reward_function_may_say_none(make):
    """GRPOTrainer: None is "does not apply"; the other rewards of that response count alone."""

    def sometimes(completions, **kwargs):
        return [None] + [1.0] * (len(completions) - 1)

    plain, _ = one_rollout(make())
    r, _ = one_rollout(make(extra={"reward_funcs": sometimes}))
    close(r.scores - plain.scores, [0.0] + [1.0] * 7)


def test_reward_functions_get_completion_ids(make, tiny):
    """GRPOTrainer also hands over the tokens of each completion."""
    got = []

    def keep(prompts, completions, completion_ids, **kwargs):
        got.extend(completion_ids)
        return [0.0] * len(completions)

    r, _ = one_rollout(make(extra={"reward_funcs": keep}))
    assert [list(ids) for ids in got] == [prefixes(r, row)[1] for row in range(8)]


def test_reward_functions_and_reward_model_see_the_same_text(make):
    """With another stop token an eos is a token like any other, for the text as well."""
    got = []

    def keep(completions, **kwargs):
        got.extend(completions)
        return [0.0] * len(completions)

    trainer = make(stop_token_id=5, extra={"reward_funcs": keep})
    r, _ = scored(trainer, [[14, 1, 5]])
    assert r.mask.all(), "the reward model reads all three tokens"
    assert "w1" in got[0]
