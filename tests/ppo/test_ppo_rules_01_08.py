"""Rules 1 to 8 of PPO (sampling, padding, stopping); the table of all rules is here.

The 24 rules of PPO for language models: each has a check, and a way of breaking the rule.

    pytest tests/ppo -k rule
    pytest tests/ppo -k rule_07

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
    19 k1, k2, k3                                     test_rule_19_kl_estimators (gradients: test_losses.py)
    20 statistics are masked means                    test_rule_20_statistics_are_masked_means
    21 importance weight of another engine            test_rule_21_importance_weight_is_capped,
                                                      test_rule_21_the_update_weights_samples_of_another_engine
    22 reward model data                              test_rule_22_over_long_and_identical_pairs_are_counted
    23 who moves and who does not                     test_rule_23_policy_and_value_move_reference_and_reward_do_not
    24 no logits outlive a chunk                      test_rule_24_no_logits_outlive_a_chunk
"""  # noqa: E501

import pytest
import torch
from ppo_kit import (
    PROMPTS,
    RESPONSES,
    check_step_0,
    close,
    must_fail,
    naive_logprobs,
    naive_score,
    one_rollout,
    prefixes,
    scored,
    swap,
)

from rlhf_lab.ppo import losses, rewards, rollout, sampling, trainer

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
    r, *_ = trainer.make_rollout(torch.arange(n), 0, 0.05)
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
        least = logits.topk(4, -1).values[:, -1:]
        return sample(logits.masked_fill(logits < least, -torch.inf), u, temperature)

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
    swap(monkeypatch, sampling, "sample_tokens", broken)
    with must_fail:
        check_sampling(make, tiny)


def check_temperature(make):
    """Log-probs of policy and (another) reference are those of softmax(logits / T); KL starts 0."""
    trainer = make()
    r, _, metrics = one_rollout(trainer)
    for row in range(4):
        n = int(r.mask[row].sum())
        close(r.logprobs[row, :n], naive_logprobs(trainer.policy, r, row))
        close(r.ref_logprobs[row, :n], naive_logprobs(trainer.reference, r, row))
    assert abs(metrics["kl"]) < 1e-5 and metrics["kl_k2"] < 1e-9


def test_rule_02_policy_and_reference_share_the_temperature(make, monkeypatch):
    check_temperature(make)

    def reference_at_1(logprobs):
        calls = []

        def score(model, ids, attention, responses, temperature, *how):
            calls.append(model)  # policy first, then reference
            temperature = 1.0 if len(calls) % 2 == 0 else temperature
            return logprobs(model, ids, attention, responses, temperature, *how)

        return score

    swap(monkeypatch, trainer, "response_logprobs", reference_at_1)
    with must_fail:
        check_temperature(make)


def half_precision(logprobs):
    return lambda *args: logprobs(*args).bfloat16().float()


def unshifted_temperature(logprobs):
    return lambda m, i, a, r, temperature, *how: logprobs(m, i, a, r, 1.0, *how)


@pytest.mark.parametrize("split", [(8, 1, 1), (2, 4, 1), (2, 4, 4)])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rule_03_step_0_invariant(make, kind, split):
    """Whatever the batch is cut into, and whatever the chunk of the scoring passes."""
    size, accumulate, minibatches = split
    check_step_0(
        make(
            kind,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            num_mini_batches=minibatches,
            local_rollout_forward_batch_size=3,
        )
    )


@pytest.mark.parametrize("broken", [half_precision, unshifted_temperature])
def test_rule_03_breaks_when_the_two_paths_differ(make, monkeypatch, broken):
    swap(monkeypatch, trainer, "response_logprobs", broken)
    with must_fail:
        check_step_0(make())


# ------------------------------------------------------------------------------------------ rule 4


def check_no_dropout(make, tiny, switch_on=None):
    """No dropout layer is ever called in training mode, and each of the four models is called."""
    noise = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    models = {
        "model": tiny.lm(0, "gpt2", **noise),
        "ref_model": tiny.lm(0, "gpt2", **noise),
        "reward_model": tiny.rm(1, "gpt2", **noise),
        "value_model": tiny.rm(1, "gpt2", **noise),
    }
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
    r, *_ = one_rollout(trainer)
    for row in range(4):
        prompt, response = prefixes(r, row)
        close(r.logprobs[row, : len(response)], naive_logprobs(trainer.policy, r, row))
        close(r.scores_raw[row], naive_score(trainer.reward_model, prompt + response))
        alone = [
            naive_score(trainer.value_model, prompt + response[:t]) for t in range(len(response))
        ]
        close(r.values[row, : len(response)], torch.stack(alone))


def in_place(positions, attended):
    """A pass of rows that stay where they are: which positions, and whether padding is seen."""

    def forward(model, ids, mask):
        out = model(
            input_ids=ids.masked_fill(~mask, 0),
            attention_mask=attended(mask),
            position_ids=positions(mask),
            use_cache=False,
        )
        first = mask.long().argmax(1, keepdim=True)
        at = (first + torch.arange(ids.shape[1])).clamp(max=ids.shape[1] - 1).unsqueeze(2)
        hidden = out.last_hidden_state
        out.last_hidden_state = hidden.gather(1, at.expand_as(hidden))
        return out

    return lambda _: forward


def from_the_left(mask):
    return torch.arange(mask.shape[1]).expand_as(mask)


def test_rule_05_padding_does_not_change_a_score(make, monkeypatch):
    check_padding(make)
    counted, seen = sampling.positions_of, lambda mask: mask
    swap(monkeypatch, rollout, "forward_model", in_place(counted, seen))
    check_padding(make)
    for broken in (in_place(from_the_left, seen), in_place(counted, torch.ones_like)):
        swap(monkeypatch, rollout, "forward_model", broken)
        with must_fail:
            check_padding(make)


def check_last_token(make, tiny):
    """Responses that end or fill the width, prompts with eos in them: always the last real one."""
    prompts = ["w1 <eos> w2", "w4 <eos>", "w5"]
    trainer = make(extra={"train_dataset": [{"prompt": p} for p in prompts]})
    e = tiny.eos
    r = scored(trainer, [[5, e, 3], [6, 7, 8], [9, e, 10]])
    for row in range(3):
        prompt, response = prefixes(r, row)
        close(r.scores_raw[row], naive_score(trainer.reward_model, prompt + response))


def score_at(position):
    """A reward that reads its score at another position of each row."""

    def broken(_):
        def scores(model, ids, mask):
            trunk = rollout.trunk_of(model)
            hidden = in_place(sampling.positions_of, lambda mask: mask)(None)(trunk, ids, mask)
            at = position(ids) - mask.long().argmax(1)
            return model.score(hidden.last_hidden_state[torch.arange(len(ids)), at]).squeeze(-1)

        return scores

    return broken


@pytest.mark.parametrize(
    "position",
    [
        lambda ids: (ids == 14).int().argmax(1),  # the first eos: pad = eos would do this
        lambda ids: (ids == 15).int().argmax(1) - 1,  # before the first pad: wrong on the left
        lambda ids: torch.full((len(ids),), ids.shape[1] - 1),  # the last column
    ],
    ids=["first eos", "before the first pad", "last column"],
)
def test_rule_06_pad_is_not_eos_and_the_last_token_rule(make, tiny, monkeypatch, position):
    check_last_token(make, tiny)
    swap(monkeypatch, rewards, "sequence_scores", score_at(position))
    with must_fail:
        check_last_token(make, tiny)


@pytest.mark.parametrize("pad", ["<eos>", None])
def test_rule_06_a_tokenizer_with_pad_eos_is_refused(make, tiny, pad):
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = pad
    with pytest.raises(ValueError, match="pad token that is not eos"):
        make(extra={"processing_class": tokenizer})


def check_truncation(make, tiny):
    """What stands after the first stop token does not reach reward, values or log-probs."""
    trainer = make()
    e = tiny.eos
    r = scored(trainer, [[5, e, 3, 4], [6, 7, e, e], [e, 1, e, 2]])
    cut = [[5, e], [6, 7, e], [e]]
    for row in range(3):
        prompt, _ = prefixes(r, row)
        expected = naive_score(
            trainer.reward_model, trainer.tokenizer(PROMPTS[row])["input_ids"] + cut[row]
        )
        close(r.scores_raw[row], expected)
        assert r.mask[row].sum() == len(cut[row])
        assert not r.logprobs[row, len(cut[row]) :].any()


def test_rule_07_the_reward_model_scores_truncated_text(make, tiny, monkeypatch):
    check_truncation(make, tiny)
    swap(monkeypatch, losses, "response_mask", lambda _: lambda t, stop: torch.ones_like(t).bool())
    with must_fail:
        check_truncation(make, tiny)


def check_penalty(make, **settings):
    """Only the response that never stops is touched: 2.5 less, or exactly −4."""
    trainer = make(**settings)
    r = scored(trainer, RESPONSES)
    expected = r.scores_raw.clone()
    if "missing_eos_penalty" in settings:
        expected[2] -= 2.5
    if "missing_eos_score" in settings:
        expected[2] = -4.0
    close(trainer.compute_advantages(r, beta=0.05).scores, expected)


@pytest.mark.parametrize("settings", [{"missing_eos_penalty": 2.5}, {"missing_eos_score": -4.0}])
@pytest.mark.parametrize("stopped", [True, False], ids=["never penalised", "always penalised"])
def test_rule_08_a_response_without_stop_is_penalised(make, monkeypatch, settings, stopped):
    """Broken by taking every response, or none, for one that has stopped."""
    check_penalty(make)
    check_penalty(make, **settings)

    def blind(right):
        return lambda self, stop: torch.full_like(right(self, stop), stopped)

    swap(monkeypatch, rollout.Rollout, "stopped", blind)
    with must_fail:
        check_penalty(make, **settings)


def test_rule_08_breaks_when_an_ending_at_the_limit_counts_as_none(make, monkeypatch):
    def length_decides(_):
        return lambda scores, stopped, penalty, _: scores - penalty * torch.tensor([0.0, 1.0, 1.0])

    swap(monkeypatch, losses, "missing_stop_score", length_decides)
    with must_fail:
        check_penalty(make, missing_eos_penalty=2.5)
