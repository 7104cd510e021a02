"""Checkpoints of PPO: a training that goes on from one gives the numbers it would have given."""

import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ppo_kit import PROMPTS

from rlhf_lab.metering.meter import Meter
from rlhf_lab.ppo import checkpoint
from rlhf_lab.ppo.bookkeeping import Diverged

EVERY = {"save_steps": 1, "save_total_limit": None, "total_episodes": 40}
STEPS = 5


def steps_of(folder):
    return [int(p.name.split("-")[1]) for p in checkpoint.newest_first(folder)]


def lora():
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")


def by_chance(completions, **_):
    """A reward of a user who draws random numbers, from every library there is."""
    return [random.random() + np.random.rand() + float(torch.rand(())) for _ in completions]


LAYOUTS = {
    "four": {},
    "shared": {"value_model": None},
    "adapters": {"value_model": None},
}


@pytest.fixture
def build(make):
    """`build(layout, **settings)` → a trainer with all that a checkpoint must bring back."""

    def build(layout="four", rewards=by_chance, **settings):
        extra = {"reward_funcs": rewards} if rewards else {}
        if layout == "adapters":
            extra["peft_config"] = lora()
        settings = {
            "layout": layout,
            "normalize_scores": bool(rewards),
            "kl_target": 0.1,
            "kl_horizon": 100,
            "num_mini_batches": 2,
            **EVERY,
            **settings,
        }
        return make(models=dict(LAYOUTS[layout]), extra=extra, **settings)

    return build


def test_changed_settings_take_the_place_of_those_in_a_checkpoint(build):
    """An adapted β, the constants of the rewards and the moments stay, unless what they are of has
    changed; the rate and Adam's settings are always those of the trainer."""
    whole = build()
    whole.train()
    start = whole.args.output_dir + "/checkpoint-2"
    other = build(learning_rate=0.5, adam_beta1=0.1, weight_decay=0.3, kl_coef=7.0)
    assert other.restore(start) == 2
    beta, mean, moments = other.beta, other.rewards.mean, other.optimizer.state_dict()["state"]
    assert beta not in (0.05, 7.0) and mean is not None
    checkpoint.take_settings(other, {"learning_rate"})
    (group,) = other.optimizer.param_groups
    assert group["lr"] == pytest.approx(0.5 * 3 / STEPS) and group["initial_lr"] == 0.5
    assert group["betas"] == (0.1, 0.999) and group["weight_decay"] == 0.3
    assert other.scheduler.get_last_lr() == [group["lr"]]
    assert (other.beta, other.rewards.mean) == (beta, mean)
    assert other.optimizer.state_dict()["state"].keys() == moments.keys() != set()
    checkpoint.take_settings(other, {"kl_coef", "rewards"})
    assert other.beta == 7.0 and other.rewards.mean is other.rewards.std is None
    other.scheduler.step()
    assert other.optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 2 / STEPS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("done", [1, 4])
def test_goes_on_to_the_same_numbers(build, layout, done):
    whole = build(layout)
    expected = whole.train().log_history
    for path in checkpoint.newest_first(whole.args.output_dir):
        if int(path.name.split("-")[1]) > done:
            shutil.rmtree(path)
    again = build(layout)
    assert again.train(resume_from_checkpoint=True).log_history == expected
    assert len(expected) == STEPS and again.beta == whole.beta
    for a, b in zip(whole.roles.trained.parameters(), again.roles.trained.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("lost", ["optimizer", "scheduler", "beta", "rewards", "random", "weights"])
def test_all_of_it_is_needed(build, monkeypatch, lost):
    """Leave one part out, and the numbers are other ones: the test above would see it."""
    whole = build()
    expected = whole.train().log_history
    again, load = build(), checkpoint._load

    def forgetful(trainer, path, weights, rest, state):
        if lost == "weights":
            weights = {n: p.detach().clone() for n, p in checkpoint._trained(trainer).items()}
        elif lost == "beta":
            rest["beta"] = trainer.beta
        elif lost == "random":
            rest["random"] = checkpoint.random_state()
        else:
            part = getattr(trainer, lost)
            rest[lost] = part.state_dict()
        load(trainer, path, weights, rest, state)

    monkeypatch.setattr(checkpoint, "_load", forgetful)
    folder = Path(again.args.output_dir) / "checkpoint-3"
    assert again.train(resume_from_checkpoint=folder).log_history != expected


def test_a_kill_while_writing_leaves_the_one_before(build, monkeypatch):
    trainer, folder = build(rewards=None), None
    expected = trainer.train().log_history
    folder = trainer.args.output_dir
    for step in (4, 5):
        checkpoint.discard(folder, step)

    def killed(*_):
        raise KeyboardInterrupt

    for victim in ("save_file", "_sync"):
        with monkeypatch.context() as m:
            m.setattr(checkpoint, victim, killed)
            with pytest.raises(KeyboardInterrupt):
                build(rewards=None).train(resume_from_checkpoint=True)
        assert steps_of(folder) == [3, 2, 1]
    assert build(rewards=None).train(resume_from_checkpoint=True).log_history == expected
    assert not list(Path(folder).glob(".checkpoint*"))  # what the killed ones left is gone


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.REST, checkpoint.STATE])
def test_a_damaged_one_is_passed_over(build, capsys, name):
    trainer = build(rewards=None)
    expected = trainer.train().log_history
    folder = Path(trainer.args.output_dir)
    damaged = folder / "checkpoint-5" / name
    damaged.write_bytes(damaged.read_bytes()[:40])
    again = build(rewards=None)
    assert again.restore() == 4
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "checkpoint-5 cannot be read" in printed
    assert again.train().log_history == expected
    with pytest.raises(ValueError, match="nothing-here cannot be read"):
        again.restore(folder / "nothing-here")


def test_of_another_model_or_layout(build, make):
    build(rewards=None).train()
    other = build("shared", rewards=None)
    before = [p.clone() for p in other.roles.trained.parameters()]
    with pytest.raises(ValueError, match="another model or layout: .* does not fit"):
        other.restore()
    assert all(map(torch.equal, before, other.roles.trained.parameters()))
    assert other.state.global_step == 0


def test_which_are_kept(build):
    trainer = build(rewards=None, save_total_limit=2, save_steps=2)
    trainer.train()
    assert steps_of(trainer.args.output_dir) == [5, 4]  # the last one, and every second
    none = build(rewards=None, save_strategy="no", output_dir=trainer.args.output_dir + "/none")
    none.train()
    assert steps_of(none.args.output_dir) == [] and none.restore() == 0


def test_a_stop_leaves_a_checkpoint(build, make):
    expected = build(rewards=None, save_steps=100).train().log_history
    trainer = build(rewards=None, save_steps=100)
    shutil.rmtree(Path(trainer.args.output_dir) / "checkpoint-5")
    trainer.should_stop = lambda: trainer.state.global_step == 2
    trainer.train()
    assert steps_of(trainer.args.output_dir) == [2]
    assert build(rewards=None).train(resume_from_checkpoint=True).log_history == expected


def metered(build):
    """A trainer with a meter that watches its models, and what the meter has by row."""
    trainer = build(rewards=None)
    trainer.meter = Meter("ppo")
    trainer.setup_optimizer()
    return trainer, lambda: {
        (r.phase, r.role, r.quantity, r.component): r.value for r in trainer.meter.ledger()
    }


def test_what_the_meter_measured_goes_on(build):
    first, of_first = metered(build)
    first.should_stop = lambda: first.state.global_step == 2
    first.train()
    again, of_both = metered(build)
    again.restore()
    assert of_both() == of_first() and again.seconds == first.seconds > 0
    again.train()
    whole, of_whole = metered(build)
    whole.train()
    after = of_both()
    counted = {at: n for at, n in of_whole().items() if at[2] in ("flops", "tokens")}
    assert counted == {at: after[at] for at in counted}


# ------------------------------------------------------------------------------------- divergence


def test_a_loss_that_is_no_number_is_not_learned_from(build, monkeypatch):
    trainer = build(rewards=None)
    update, last = trainer.compute_losses, {}

    def broken(*args):
        loss, stats, ratio = update(*args)
        if trainer.state.global_step == 3:
            last.update((n, p.clone()) for n, p in checkpoint._trained(trainer).items())
            stats[1] = math.nan
            loss = loss * math.nan
        return loss, stats, ratio

    monkeypatch.setattr(trainer, "compute_losses", broken)
    with pytest.raises(Diverged) as caught:
        trainer.train()
    line = str(caught.value)
    assert "\n" not in line
    for word in ("iteration 4", "vf_loss=nan", "learning_rate=0.01", "kl_coef", "checkpoint-3"):
        assert word in line
    assert all(torch.equal(p, last[n]) for n, p in checkpoint._trained(trainer).items())
    assert steps_of(trainer.args.output_dir)[0] == 3 and build(rewards=None).restore() == 3


def test_too_high_a_learning_rate_by_itself(build):
    """Steps of 1000 a weight put all probability on a few tokens: KL is then minus the reference's
    log-probability of them, far above .1 nats whatever the CPU rounds. Waiting for a NaN is not."""
    with pytest.raises(Diverged, match="likely causes: learning_rate=1000 is too high"):
        build(
            rewards=None,
            learning_rate=1e3,
            max_grad_norm=0,
            lr_scheduler_type="constant",
            kl_coef=0,
            kl_target=None,
            max_kl_per_token=0.1,
        ).train()


def test_a_policy_that_left_takes_its_checkpoint_along(build, monkeypatch):
    trainer = build(rewards=None)
    rollout_metrics = trainer._rollout_metrics

    def far(*args):
        metrics = rollout_metrics(*args)
        return metrics | ({"kl_per_token": 7.5} if trainer.state.global_step == 3 else {})

    monkeypatch.setattr(trainer, "_rollout_metrics", far)
    with pytest.raises(Diverged, match="7.5 nats per token .*max_kl_per_token=5.0.*checkpoint-2"):
        trainer.train()
    assert steps_of(trainer.args.output_dir) == [2, 1]  # 3 held the weights that were too far out
    none = build(rewards=None, max_kl_per_token=None)
    near = none._rollout_metrics
    monkeypatch.setattr(none, "_rollout_metrics", lambda *a: near(*a) | {"kl_per_token": 9})
    assert len(none.train().log_history) == STEPS


def test_early_stop_ends_an_iterations_update(build):
    settings = {"rewards": None, "num_ppo_epochs": 4, "learning_rate": 0.05}
    free = build(**settings).train().log_history
    assert {row["optimizer_steps"] for row in free} == {8}
    held = build(early_stop_kl=1e-3, **settings).train().log_history
    assert all(row["optimizer_steps"] < 8 for row in held)
    assert held[0]["optimizer_steps"] > 1  # the first one has ratio 1, KL 0
    with pytest.raises(ValueError, match="early_stop_kl must be above 0"):
        build(early_stop_kl=0)


# ------------------------------------------------------------------------------- held-out prompts


def test_held_out_prompts_change_nothing_and_are_sampled_alike(make):
    rows = [{"prompt": p} for p in PROMPTS[:5]]
    logged, samples = [], []
    plain = make().train().log_history
    extra = {
        "eval_dataset": rows,
        "on_log": lambda step, m: logged.append((step, m)),
        "on_sample": lambda step, rows: samples.extend(rows),
        "metric_funcs": {"length": lambda completions, **_: [len(c) for c in completions]},
    }
    trainer = make(extra=extra, eval_strategy="steps", eval_steps=2)
    trainer.train()
    lines = [(s, m) for s, m in logged if "eval_reward" in m]
    assert [s for s, _ in lines] == [2, 3]
    assert [{k: v for k, v in m.items() if k != "length"} for _, m in logged if "kl" in m] == [
        {k: v for k, v in m.items() if k != "step"} for m in plain
    ]
    assert set(lines[0][1]) == {
        f"eval_{n}" for n in ("reward", "kl", "response_length", "stopped", "length")
    }
    assert trainer.evaluate() == lines[-1][1]  # the same noise every time
    held_out = [s for s in samples if s.get("when") == "held-out"]
    assert [s["prompt"] for s in held_out[:4]] == PROMPTS[:4]


def test_held_out_reward_is_the_mean_over_all_of_them(make):
    rows = [{"prompt": p} for p in PROMPTS[:5]]
    figures = [
        make(extra={"eval_dataset": rows}, per_device_train_batch_size=b).evaluate() for b in (8, 2)
    ]
    assert figures[0] == pytest.approx(figures[1], abs=1e-5)
    with pytest.raises(ValueError, match="needs an eval_dataset"):
        make(eval_strategy="steps", eval_steps=2)
