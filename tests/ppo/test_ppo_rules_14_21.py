"""Rules 14 to 21 of PPO: losses, heads, optimizer, statistics. Table: test_ppo_rules_01_08.py."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from ppo_kit import (
    PROMPTS,
    T,
    close,
    must_fail,
    naive_score,
    one_rollout,
    prefixes,
    swap,
)
from transformers import AutoModelForSequenceClassification

from rlhf_lab.models.weights import load_reward_model, new_reward_model
from rlhf_lab.ppo import losses
from rlhf_lab.ppo.config import PPOConfig
from rlhf_lab.ppo.trainer import PPOTrainer

# ----------------------------------------------------------------------------------- rules 14 to 17


def check_losses(make):
    """The loss of a minibatch against the formulas, written out with 0.2, 0.2 and 0.1."""
    trainer = make()
    args = trainer.args
    assert (args.cliprange, args.cliprange_value, args.vf_coef) == (0.2, 0.2, 0.1)
    r, adv, _ = one_rollout(trainer)
    g = torch.Generator().manual_seed(0)  # pretend that policy and critic have moved far
    r = replace(
        r,
        logprobs=(r.logprobs + torch.randn(r.mask.shape, generator=g)) * r.mask,
        values=(r.values + torch.randn(r.mask.shape, generator=g)) * r.mask,
    )
    n = r.mask.sum()
    loss, stats, _ = trainer.compute_losses(r, adv, n)
    trainer.meter.close()  # no backward pass will end what began here
    with torch.no_grad():
        logp, _, v = trainer.model(r.ids, r.attention, r.responses, r.mask, T)
    policy = value = clipped = 0.0
    for row, t in r.mask.nonzero().tolist():
        ratio = math.exp(logp[row, t] - r.logprobs[row, t])
        a = float(adv.advantages[row, t])
        near = min(max(ratio, 0.8), 1.2)
        policy += max(-a * ratio, -a * near)
        clipped += -a * near > -a * ratio
        old, target = float(r.values[row, t]), float(adv.returns[row, t])
        new = float(v[row, t])
        near = min(max(new, old - 0.2), old + 0.2)
        value += 0.5 * max((new - target) ** 2, (near - target) ** 2)
    close(loss.detach(), (policy + 0.1 * value) / float(n), atol=1e-4)
    close(stats[:3], [policy / float(n), value / float(n), clipped / float(n)], atol=1e-4)


@pytest.mark.parametrize(
    "name, broken",
    [
        ("pg_loss", lambda right: lambda p, o, a, m, clip, **k: right(p, o, a, m, 1e9, **k)),
        ("pg_loss", lambda right: lambda p, o, a, m, clip, **k: right(p, o, -a, m, clip, **k)),
        ("vf_loss", lambda right: lambda v, o, r, m, clip: right(v, o, r, m, 1e9)),
        ("vf_loss", lambda right: lambda v, o, r, m, c: tuple(2 * x for x in right(v, o, r, m))),
    ],
    ids=["no policy clip", "sign", "no value clip", "no half"],
)
def test_rule_14_both_losses_are_clipped(make, monkeypatch, name, broken):
    check_losses(make)
    swap(monkeypatch, losses, name, broken)
    with must_fail:
        check_losses(make)


def check_value_start(trainer):
    """Before training, V at a position is the reward model's score of the text so far."""
    r, *_ = one_rollout(trainer)
    for row in range(3):
        prompt, response = prefixes(r, row)
        for t in range(len(response)):
            expected = naive_score(trainer.reward_model, prompt + response[:t])
            close(r.values[row, t], expected)


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
        check_head(AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1))
    with pytest.raises(ValueError, match="no score head"):
        load_reward_model(tmp_path)


def check_offset(make, tiny, reward=None, value=None):
    """With the offset the reference responses score 0 on average, and the values agree."""
    plain = make()
    r, _, raw = one_rollout(plain)
    models = {"reward_model": reward or tiny.rm(1), "value_model": value or tiny.rm(1)}
    for model in models.values():
        if not hasattr(model.config, "score_offset"):
            model.config.score_offset = -raw["reward"]
    trainer = make(models=models)
    shifted, _, metrics = one_rollout(trainer)
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
        {"adam_epsilon": 1e-8},
        {"lr_scheduler_type": "constant"},
        {"max_grad_norm": 0.0},
    ):
        with must_fail:
            check_optimizer(make, **{**good, **bad})


def test_rule_17_a_schedule_has_its_own_settings(make):
    """A cosine that ends at a tenth of the rate, not at 0: by hand."""
    schedule = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.001}}
    history = make(total_episodes=16, learning_rate=0.01, **schedule).train().log_history
    assert [h["learning_rate"] for h in history] == pytest.approx([0.01, (0.01 + 0.001) / 2])


# ----------------------------------------------------------------------------------- rules 18 to 21


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

    monkeypatch.setattr(losses, "adapt_kl_coef", unclipped)
    with must_fail:
        check_controller(make)


def check_kl_estimators(pi, ref):
    """Exact expectations under π: k1 and k3 give KL(π‖ref); k2 = k1²/2; k3 ≥ 0."""
    exact = (pi.exp() * (pi - ref)).sum()
    for kind in ("k1", "k3"):
        close((pi.exp() * losses.kl_estimate(pi, ref, kind)).sum(), exact, atol=1e-9)
    close(losses.kl_estimate(pi, ref, "k2"), (pi - ref) ** 2 / 2, atol=1e-12)
    assert (losses.kl_estimate(pi, ref, "k3") >= 0).all()


@pytest.mark.parametrize("broken", ["other direction", "k3 of the wrong sign"])
def test_rule_19_kl_estimators(monkeypatch, broken):
    """The gradients of k1, k2 and k3 are in test_losses.py."""
    g = torch.Generator().manual_seed(0)
    pi, ref = torch.randn(2, 6, generator=g, dtype=torch.float64).log_softmax(-1)
    check_kl_estimators(pi, ref)

    def wrong(right):
        if broken == "other direction":
            return lambda a, b, kind="k1": right(b, a, kind)
        return lambda a, b, kind="k1": right(b, a, kind) if kind == "k3" else right(a, b, kind)

    swap(monkeypatch, losses, "kl_estimate", wrong)
    with must_fail:
        check_kl_estimators(pi, ref)


def check_statistics(make):
    """With 4 passes of 2 rows and one step, ratio is exactly 1 (TRL logs 0.25), and the entropy is
    the mean over real tokens of the distribution's, computed without padding."""
    trainer = make(per_device_train_batch_size=2, gradient_accumulation_steps=4, num_ppo_epochs=1)
    r, adv, metrics = one_rollout(trainer)
    assert not r.mask.all()
    entropies = []
    for row in range(len(PROMPTS)):
        prompt, response = prefixes(r, row)
        with torch.no_grad():
            logits = trainer.policy(torch.tensor([prompt + response])).logits[
                0, len(prompt) - 1 : -1
            ]
        entropies.append(torch.distributions.Categorical(logits=logits / T).entropy())
    lengths = [len(prefixes(r, row)[1]) for row in range(len(PROMPTS))]
    close(metrics["response_length"], sum(lengths) / 8)
    close(metrics["sampled_entropy"], float(-r.logprobs[r.mask].sum() / 8))
    close(metrics["stopped"], sum(14 in prefixes(r, row)[1] for row in range(8)) / 8)
    stats = trainer.update(r, adv, 0)
    close(stats["ratio"], 1.0)
    close(stats["entropy"], torch.cat(entropies).mean())
    assert stats["clipfrac"] == 0.0


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
    swap(
        monkeypatch,
        PPOTrainer,
        "compute_losses",
        lambda right: lambda self, mb, adv, n: right(self, mb, adv, tokens(mb, n)),
    )
    with must_fail:
        check_statistics(make)


def check_importance():
    """E under the rollout engine of min(w, C)·f: with C = ∞ exactly E under the trained policy."""
    g = torch.Generator().manual_seed(0)
    train, engine = torch.randn(2, 6, generator=g, dtype=torch.float64).log_softmax(-1)
    f = torch.arange(6.0, dtype=torch.float64)
    weight = losses.importance_weight(train, engine, cap=math.inf)
    close((engine.exp() * weight * f).sum(), (train.exp() * f).sum(), atol=1e-9)
    capped = losses.importance_weight(train, engine, cap=1.1)
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
    """Where it is used: test_rollout_engines.py."""
    check_importance()
    swap(monkeypatch, losses, "importance_weight", broken)
    with must_fail:
        check_importance()
