"""A run's figures are those of what was sampled: scored again here, one row at a time.

pytest tests/trainers/test_evaluation.py
"""

import pytest
import torch
from families import data, make_folder, make_tokenizer, rows

import rlhf_lab as lab
from rlhf_lab.models.weights import load_causal_lm, load_reward_model
from rlhf_lab.ppo.texts import sample_ids

PPO = {"per_device_train_batch_size": 8, "max_steps": 1, "num_mini_batches": 1, "num_ppo_epochs": 1}
GROUPS = {"num_generations": 2, "per_device_train_batch_size": 8, "max_steps": 1}
SETTINGS = {"ppo": PPO, "rloo": GROUPS, "grpo": GROUPS, "dpo": {"max_steps": 1, "warmup_steps": 0}}
LENGTH = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model whose responses of 16 tokens end in about one of three, and its judge."""
    folder = tmp_path_factory.mktemp("model")
    made = lab.load(make_folder(folder / "model", "llama"))
    judge = made.new_reward(3)
    judge.config.score_offset = 0.25
    judge.save_pretrained(folder / "judge")
    made.tokenizer.save_pretrained(folder / "judge")
    return made.with_stage("reward", folder / "judge")


@torch.no_grad()
def scored_again(row, judge, policy, reference):
    """Reward and KL of a recorded response: whole forward passes of the two models, no padding."""
    prompt, answer = row["prompt_ids"], row["ids"]
    whole = torch.tensor([prompt + answer])
    reward = float(judge(whole).logits[0, 0]) + judge.config.score_offset
    new, old = (m(whole).logits[0].log_softmax(-1) for m in (policy, reference))
    places = [(len(prompt) + t - 1, token) for t, token in enumerate(answer)]
    return reward, float(sum(new[at] - old[at] for at in places))


@pytest.mark.parametrize("stage", SETTINGS)
def test_the_summary_is_what_the_recorded_ids_score(stage, model, tmp_path):
    """models.md 6: up to version 0.1 an end token was put after what had not ended."""
    more = {} if stage == "dpo" else {"response_length": LENGTH}
    plan = lab.plan(stage, model, seed=0, learning_rate=1e-2, **SETTINGS[stage], **more)
    run = lab.train(plan, data(), out=tmp_path / "run", quiet=True)
    judge, reference = load_reward_model(model.paths["reward"]), load_causal_lm(model.paths["base"])
    policy = load_causal_lm(run.model_path)
    after = [row for row in run.evaluation if row["when"] == stage]
    assert len(after) == len({tuple(row["prompt_ids"]) for row in after}) > 20
    eos = model.tokenizer.eos_token_id
    assert [row["ended"] for row in after] == [row["ids"][-1] == eos for row in after]
    if stage != "dpo":  # stopped and unstopped ones
        assert 2 < sum(row["ended"] for row in after) < len(after) - 2
        assert max(len(row["ids"]) for row in after) == LENGTH
    again = [scored_again(row, judge, policy, reference) for row in after]
    rewards, kls = (sum(column) / len(after) for column in zip(*again, strict=True))
    assert run.summary["kl"] == pytest.approx(kls, abs=1e-4)
    assert kls > 0.05  # the policy moved
    if stage != "dpo":
        assert run.summary["reward"] == pytest.approx(rewards, abs=1e-4)
        before = [row for row in run.evaluation if row["when"] == "sft"]
        rewards = [scored_again(row, judge, policy, policy)[0] for row in before]
        assert run.summary["before/reward"] == pytest.approx(sum(rewards) / len(after), abs=1e-4)
        assert [row["reward"] for row in before] == pytest.approx(rewards, abs=1e-4)


@pytest.mark.parametrize("layout", ["four", "shared", "adapters"])
def test_the_model_from_before_is_evaluated_once_something_is_seen(layout, few_stories, tmp_path):
    """PPO's first iteration comes first: the reference still is the policy that it began with."""
    lora = {"lora_r": 4} if layout == "adapters" else {}
    settings = {**PPO, "max_steps": 2, "learning_rate": 1e-2, "layout": layout, **lora}
    plan = lab.plan("ppo", "mini", seed=0, response_length=LENGTH, **settings)
    run = lab.train(plan, out=tmp_path / "run", quiet=True)
    order = [row.get("when", row["step"]) for row in run.samples]
    assert list(dict.fromkeys(order)) == [1, "sft", 2, "ppo"]
    prompts = [row["prompt_ids"] for row in run.evaluation if row["when"] == "sft"]
    sampled = sample_ids(
        plan.model.sft,
        plan.model.tokenizer,
        [{"input_ids": ids} for ids in prompts],
        max_new_tokens=LENGTH,
        seed=1234,
    )
    assert [row["ids"] for row in run.evaluation if row["when"] == "sft"] == [r for (r,) in sampled]
    assert run.summary["kl"] != 0 and "before/gold_reward" in run.summary


def test_gold_reward_and_judge_read_what_was_sampled(few_stories, tmp_path, capsys):
    """models.md 6: 16 tokens are never a whole story of the bundled model's. Beside it row 22: what
    k3 in the reward is worth is printed when a run begins."""
    plan = lab.plan("ppo", "tiny", seed=0, response_length=LENGTH, kl_estimator="k3", **PPO)
    run = lab.train(plan, out=tmp_path / "run")
    printed = capsys.readouterr().out
    assert "kl_estimator=k3: " in printed and "k2 and k3 point elsewhere" in printed
    tokenizer, judge = plan.model.tokenizer, plan.model.reward
    after = [row for row in run.evaluation if row["when"] == "ppo"]
    shown = [row for row in run.samples if row.get("when") == "ppo"]
    assert [row["ids"] for row in shown] == [row["ids"] for row in after]
    assert not any(row["ended"] for row in after)
    texts = [tokenizer.decode(row["ids"], skip_special_tokens=True) for row in after]
    assert texts == [row["response"] for row in shown]
    gold = [few_stories.gold_reward(r["prompt"], r["response"]) for r in shown]
    assert run.summary["gold_reward"] == pytest.approx(sum(gold) / len(gold), abs=1e-6)
    with torch.no_grad():
        scores = [
            float(judge(torch.tensor([row["prompt_ids"] + row["ids"]])).logits[0, 0])
            for row in after
        ]
    mean = sum(scores) / len(scores) + judge.config.score_offset
    assert run.summary["reward"] == pytest.approx(mean, abs=1e-4)


def test_runs_without_recorded_ids_can_be_read(tmp_path):
    """A run of version 0.1: no evaluation.jsonl, samples of texts alone."""
    run = lab.Run.create(tmp_path / "run", stage="ppo", model="tiny", settings={})
    run.sample(0, [{"prompt": "p", "response": "r", "when": "ppo"}])
    assert run.evaluation == [] and run.samples[0]["response"] == "r"
    run.rewind(0)
    assert lab.Run.load(run.folder).samples == []


def test_bytes_that_are_no_text_are_not_made_longer(tmp_path):
    """models.md 18: an untrained byte-level model samples halves of characters; as text, and in
    tokens again, each of them is three, which is more than its context of 24 holds."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = make_tokenizer("qwen2", True)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=24, n_embd=8, n_layer=1, n_head=1,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model = lab.load(tmp_path / "model")
    plan = lab.plan("ppo", model, seed=0, response_length=LENGTH, **PPO)
    texts = [{"prompt": f"abc {i}"} for i in range(16)]
    run = lab.train(
        plan,
        data(texts),
        reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
        out=tmp_path / "run",
        quiet=True,
    )
    assert run.status == "finished" and run.summary["kl"] == pytest.approx(0, abs=1)
    longest = max(len(tokenizer(row["response"]).input_ids) for row in run.samples)
    assert longest > LENGTH + 8  # so it would have been


def test_a_reward_model_is_judged_on_pairs_that_it_can_read(tmp_path):
    """A held-out pair beyond the context of a model with absolute positions is left out."""
    model = lab.load(make_folder(tmp_path / "model", "gpt2"))
    long = {"chosen": "w2 " * 20, "rejected": "w3"}
    pairs = [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in rows(40)]
    read = data([*pairs, *({"prompt": "w1 " * 90 + f"w{i}", **long} for i in range(40))])
    plan = lab.plan("reward", model, max_steps=1, seed=0)
    run = lab.train(plan, read, out=tmp_path / "run", quiet=True)
    assert 0 < run.summary["held_out_pairs"] < len(read.preferences.test)
