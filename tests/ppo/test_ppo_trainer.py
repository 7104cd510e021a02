"""What follows from the rules of PPO together, and what the trainer refuses."""

import importlib
import sys
from dataclasses import FrozenInstanceError, fields
from types import SimpleNamespace

import pytest
import torch
from ppo_kit import (
    PROMPTS,
    check_step_0,
    close,
    one_rollout,
    prefixes,
    scored,
    swap,
)

import rlhf_lab as lab
from rlhf_lab.data.chat import EncodedPrompt
from rlhf_lab.ppo.config import PPOConfig
from rlhf_lab.ppo.trainer import PPOTrainer

# ------------------------------------------------------------- what follows from the rules together


def test_the_same_seed_gives_the_same_metrics(make):
    first, again, other = (make(seed=s).train().log_history for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_rollouts_do_not_depend_on_batch_order(make):
    """A permuted batch gives the permuted rollout: tokens the same, numbers up to rounding."""
    trainer = make("gpt2")
    order = torch.tensor([3, 0, 7, 5, 1, 6, 2, 4])
    whole, whole_adv, _ = one_rollout(trainer)
    mixed, mixed_adv, _ = trainer.make_rollout(order, 0, 0.05)
    assert torch.equal(mixed.responses, whole.responses[order])
    for name in ("logprobs", "values", "scores_raw"):
        close(getattr(mixed, name), getattr(whole, name)[order], atol=1e-4)
    for name in ("scores", "advantages", "returns"):
        close(getattr(mixed_adv, name), getattr(whole_adv, name)[order], atol=1e-4)


def test_every_prompt_is_used_once_per_pass(make):
    """24 episodes over 8 prompts in batches of 8, then in batches of 6 across the borders."""
    trainer = make()
    passes = [trainer.next_prompts(iteration).tolist() for iteration in range(3)]
    assert [sorted(rows) for rows in passes] == [list(range(8))] * 3
    assert passes[0] != passes[1] != passes[2], "each pass has an order of its own"
    trainer = make(per_device_train_batch_size=6)
    drawn = torch.cat([trainer.next_prompts(i) for i in range(4)]).tolist()
    assert [sorted(drawn[i : i + 8]) for i in (0, 8, 16)] == [list(range(8))] * 3


def test_every_minibatch_makes_one_step_on_every_row_once(make, monkeypatch):
    """4 minibatches × 2 epochs = 8 steps an iteration; each epoch sees each response once."""
    seen = []

    def noting(step):
        return lambda self, mb, adv: (seen.append(mb.index.tolist()), step(self, mb, adv))[1]

    swap(monkeypatch, PPOTrainer, "train_minibatch", noting)
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
    r, _, metrics = one_rollout(trainer)
    (call,) = calls
    assert call.prompts == PROMPTS and call.number == list(range(8))
    assert all("<" not in c for c in call.completions), "no special tokens in the text"
    words = [[t for t in prefixes(r, row)[1] if t not in (13, 14, 15)] for row in range(8)]
    assert r.scores_raw.tolist() == [10.0 + len(w) for w in words]
    assert metrics["reward"] == pytest.approx(10 + sum(map(len, words)) / 8)


def test_reward_functions_are_added_to_the_reward_model(make):
    r, *_ = one_rollout(make())
    both, *_ = one_rollout(make(extra={"reward_funcs": lambda completions, **k: [3.0] * 8}))
    close(both.scores_raw, r.scores_raw + 3)


def test_a_reward_function_that_miscounts_is_named(make):
    def short(completions, **kwargs):
        return [1.0]

    with pytest.raises(ValueError, match="short gave 1 rewards for 8"):
        one_rollout(make(extra={"reward_funcs": short}))


def test_ready_made_input_ids_equal_their_text(make, tiny):
    """The column TRL's PPOTrainer asked for."""
    tokenizer = tiny.tokenizer()
    rows = [{"input_ids": tokenizer(p)["input_ids"]} for p in PROMPTS]
    ready, *_ = one_rollout(make(extra={"train_dataset": rows}))
    text, *_ = one_rollout(make())
    assert torch.equal(ready.ids, text.ids)


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"num_mini_batches": 3}, "does not split"),
        ({"temperature": 0.0}, "above 0"),
        ({"response_length": 0}, "response_length"),
        ({"kl_estimator": "k9"}, "choose from k1, k2, k3"),
        ({"stop_token": "never"}, "stop_token"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha has no effect in PPO"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end has no effect"),
        ({"optim": "schedule_free_adamw"}, "choose another"),
        ({"optim": "galore_adamw"}, "choose another"),
        ({"lr_scheduler_type": "greedy", "eval_strategy": "steps"}, "choose from linear"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(make, settings, line):
    with pytest.raises(ValueError, match=line):
        make(**settings)


def test_one_response_of_one_token(make):
    """models.md 11: an iteration of a single token is learned from, and breaks nothing."""
    trainer = make(per_device_train_batch_size=1, response_length=1, num_mini_batches=1)
    before = {n: p.clone() for n, p in trainer.policy.named_parameters()}
    metrics = trainer.iterate(0)
    assert metrics["response_length"] == 1 and metrics["optimizer_steps"] >= 1
    assert any(not torch.equal(p, before[n]) for n, p in trainer.policy.named_parameters())


def test_what_an_estimator_of_the_kl_is_worth_is_said_where_it_is_chosen():
    """models.md 22: --set, HfArgumentParser and the reference of settings show a field's help."""
    (chosen,) = (f for f in fields(PPOConfig) if f.name == "kl_estimator")
    assert "k1" in chosen.metadata["help"] and ".2 and .0" in chosen.metadata["help"]


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
    r, _, metrics = one_rollout(trainer)
    ((step, rows),) = got
    assert step == 1 and [row["prompt"] for row in rows] == PROMPTS[:4]
    assert [row["reward"] for row in rows] == r.scores_raw[:4].tolist()
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

    plain, *_ = one_rollout(make())
    r, *_ = one_rollout(make(extra={"reward_funcs": sometimes}))
    close(r.scores_raw - plain.scores_raw, [0.0] + [1.0] * 7)


def test_reward_functions_get_completion_ids(make, tiny):
    """GRPOTrainer also hands over the tokens of each completion."""
    got = []

    def keep(prompts, completions, completion_ids, **kwargs):
        got.extend(completion_ids)
        return [0.0] * len(completions)

    r, *_ = one_rollout(make(extra={"reward_funcs": keep}))
    assert [list(ids) for ids in got] == [prefixes(r, row)[1] for row in range(8)]


def test_reward_functions_and_reward_model_see_the_same_text(make):
    """With another stop token an eos is a token like any other, for the text as well."""
    got = []

    def keep(completions, **kwargs):
        got.extend(completions)
        return [0.0] * len(completions)

    trainer = make(stop_token_id=5, extra={"reward_funcs": keep})
    r = scored(trainer, [[14, 1, 5]])
    assert r.mask.all(), "the reward model reads all three tokens"
    assert "w1" in got[0]


def test_a_rollout_never_changes(make):
    """Neither the trainer nor anybody else writes to it: what is learned from is beside it."""
    trainer = make(normalize_scores=True, missing_eos_penalty=1.0)
    r, adv, metrics = one_rollout(trainer)
    with pytest.raises(FrozenInstanceError):
        r.scores_raw = adv.scores
    before = {name: x.clone() for name, x in vars(r).items() if isinstance(x, torch.Tensor)}
    trainer.compute_advantages(r, 0.05)
    trainer.update(r, adv, 0)
    assert all(torch.equal(getattr(r, name), x) for name, x in before.items())
    close(r.scores_raw.mean(), metrics["reward"])
    close(adv.scores.mean(), metrics["score"])


def test_a_prompt_is_tokenised_once_an_iteration(make, monkeypatch):
    """Whoever needs its tokens gets them: a reward model, a reward function, the record."""
    calls = []

    def counted(encode):
        return lambda prompt, text: (calls.append(text), encode(prompt, text))[1]

    swap(monkeypatch, EncodedPrompt, "_encode", counted)
    extra = {
        "reward_funcs": lambda completions, **_: [1.0] * len(completions),
        "on_sample": lambda step, rows: None,
    }
    make(extra=extra, total_episodes=16).train()
    assert sorted(calls) == sorted(PROMPTS * 2)
    calls.clear()
    rows = [{"prompt": p, "prompt_ids": [1 + i]} for i, p in enumerate(PROMPTS)]
    r, *_ = one_rollout(make(extra={**extra, "train_dataset": rows}))
    assert not calls and r.ids[:, 0].tolist() == list(range(1, 9)), "a row's own tokens are taken"


# ------------------------------------------------------------------------------------ where it is


def test_public_names():
    assert (lab.PPOTrainer, lab.PPOConfig) == (PPOTrainer, PPOConfig)


@pytest.mark.parametrize("module, name", [("ppo", "PPOTrainer"), ("ppo_config", "PPOConfig")])
def test_the_old_paths_work_for_one_release_and_warn(module, name):
    path = f"rlhf_lab.stages.{module}"
    sys.modules.pop(path, None)
    with pytest.warns(DeprecationWarning, match=f"from rlhf_lab import {name}"):
        moved = importlib.import_module(path)
    assert getattr(moved, name) is getattr(lab, name)
