"""Rewards by name, by function and by a reward model with a vocabulary of its own: whole runs.

pytest tests/data/test_reward_sources.py
"""

import pytest
import torch

import rlhf_lab as lab
from rlhf_lab.cli.main import main
from rlhf_lab.world.gold_reward import gold_reward

SHORT = {"max_steps": 2, "seed": 0}


@pytest.fixture(autouse=True, scope="module")
def data(few_stories):
    return few_stories


@pytest.fixture(scope="module")
def bare():
    """The bundled model without its reward model."""
    tiny = lab.load("tiny")
    return type(tiny)("bare", {k: v for k, v in tiny.paths.items() if k != "reward"})


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory):
    """A reward model that reads bytes: another architecture, another vocabulary, random weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([*letters, "<eos>", "<pad>"])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>")
    folder = tmp_path_factory.mktemp("bytewise")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        GPT2ForSequenceClassification(
            GPT2Config(
                vocab_size=258,
                n_embd=16,
                n_layer=1,
                n_head=2,
                n_positions=1024,
                num_labels=1,
                pad_token_id=257,
                eos_token_id=256,
                bos_token_id=None,
                initializer_range=0.3,
            )
        ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def short(prompts, completions, completion_ids, **_):
    """A reward for short answers, in tokens."""
    return [-float(len(ids)) for ids in completion_ids]


def train(stage, data, folder, model="tiny", reward_funcs=None, **settings):
    return lab.train(
        lab.plan(stage, model, **SHORT, **settings),
        data,
        out=folder,
        quiet=True,
        reward_funcs=reward_funcs,
    )


# -------------------------------------------------------------------------------------- functions


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_functions_alone_from_python(stage, data, bare, tmp_path):
    """No reward model anywhere: the reward that is logged is the function's, and nobody's else."""
    run = train(stage, data, tmp_path / "r", bare, short)
    rewards, lengths = run.series("reward")[1], run.series("response_length")[1]
    assert rewards == pytest.approx([-n for n in lengths], rel=1e-5)
    assert run.series("rewards/short")[1] == rewards
    assert "reward" not in {r.role for r in run.ledger}, "neither planned nor measured"
    assert run.config["settings"]["rule_reward"] is True
    assert "gold_reward" in run.summary and not {"reward", "win_rate"} & run.summary.keys()


def test_the_gold_reward_from_the_command_line(tmp_path, capsys):
    out = tmp_path / "r"
    assert main(["train", "ppo", "--reward", "gold", "--steps", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "starts on the SFT model with a zero head: there is no reward model" in printed
    run = lab.Run.load(out)
    assert run.series("reward") == run.series("gold_reward") == run.series("rewards/gold")
    assert "reward" not in {r.role for r in run.ledger}
    assert run.series("explained_variance")[1][0] == pytest.approx(0.0, abs=1e-4), "V is 0"


@pytest.mark.parametrize("stage", ["ppo", "rloo"])
def test_a_mixture_by_name(stage, data, tmp_path):
    """The reward model, the gold reward and a function: the sum that the weights say."""
    run = train(
        stage,
        data,
        tmp_path / "r",
        reward_funcs=[short],
        rewards=["model", "gold"],
        reward_weights=[1.0, 0.5, 0.1],
    )
    model, gold, own, total = (
        run.series(n)[1] for n in ("rewards/model", "rewards/gold", "rewards/short", "reward")
    )
    assert gold == run.series("gold_reward")[1]
    parts = zip(model, gold, own, strict=True)
    assert total == pytest.approx([m + 0.5 * g + 0.1 * s for m, g, s in parts], rel=1e-4)
    assert "win_rate" in run.summary


def test_ppo_learns_a_part_of_the_gold_reward_that_it_is_paid_for(data, tmp_path):
    run = train("ppo", data, tmp_path / "r", rewards=["gold/mood"])
    assert run.series("reward") == run.series("gold/mood")


def test_a_plan_without_a_reward_model_has_none():
    """It costs what a plan with four models costs, less the reward model's parameters and pass."""
    four, three = (lab.plan("ppo", "tiny", **more).estimate for more in ({}, {"rewards": "gold"}))
    roles = {r.role for r in three.ledger}
    assert roles & {"reward"} == set() and {"policy", "reference", "value"} <= roles
    assert [f.name for f in four.average if f not in three.average].count("score") == 1
    assert lab.plan("ppo", "tiny", rewards=["gold", "model"]).settings["rule_reward"] is False


@pytest.mark.parametrize("rewards", [["gold"], ["model"]])
def test_plan_xray_and_run_agree_with_and_without_a_reward_model(rewards, data, tmp_path):
    plan = lab.plan("ppo", "tiny", **SHORT, rewards=rewards)
    run = lab.train(plan, data, out=tmp_path / "r", quiet=True)
    rows = {
        s: x.ledger.filter(source=s, quantity="flops")
        for s, x in (("simulated", lab.xray(plan)), ("measured", run))
    }
    for ledger in rows.values():
        assert ("score" in {r.phase for r in ledger}) == (rewards == ["model"])
    planned = plan.estimate.ledger.filter(quantity="flops")
    assert rows["simulated"].total() == pytest.approx(planned.total(), rel=0.02)


# ------------------------------------------------------------------------- another vocabulary


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_a_foreign_reward_model_end_to_end_from_the_command_line(stage, bytewise, tmp_path, capsys):
    """Vocabularies are compared. The held-out score is the mean of naive passes over the bytes."""
    out = tmp_path / "r"
    args = ["train", stage, "--reward-model", str(bytewise), "--steps", "2", "--out", str(out)]
    assert main([*args, "--seed", "0"]) == 0
    assert ("vocabulary of its own" in capsys.readouterr().out) == (stage == "ppo")
    run = lab.Run.load(out)
    assert run.series("reward") == run.series("rewards/model")
    model = lab.load("tiny").with_stage("reward", bytewise)
    reward_model, theirs = model.reward, model.reward_tokenizer
    assert model.foreign_reward and reward_model.config.vocab_size == len(theirs) == 258
    rows = [s for s in run.samples if s.get("when") == "sft"]
    assert len(rows) == 32
    with torch.no_grad():
        texts = [theirs(r["prompt"] + r["response"])["input_ids"] for r in rows]
        alone = [
            float(reward_model(torch.tensor([[*t, theirs.eos_token_id]])).logits) for t in texts
        ]
    assert run.summary["before/reward"] == pytest.approx(sum(alone) / 32, abs=1e-4)


def test_a_foreign_reward_model_is_planned_as_it_is(bytewise):
    model = lab.load("tiny").with_stage("reward", bytewise)
    setup = lab.plan("ppo", model).estimate.setup
    assert setup.reward.family == "gpt2" and setup.value.family == setup.model.family == "llama"
    own = lab.plan("ppo", "tiny").estimate.setup
    assert own.reward == own.value
    held = lab.xray(lab.plan("ppo", model)).ledger.filter(role="reward", component="parameters")
    assert {r.value for r in held} == {4 * sum(p.numel() for p in model.reward.parameters())}


def test_best_of_n_with_a_foreign_reward_model(bytewise, data):
    model = lab.load("tiny").with_stage("reward", bytewise)
    one, four = lab.best_of_n(model, data, (1, 4), prompts=8, quiet=True).points
    assert four.reward > one.reward


def test_an_equal_vocabulary_is_no_foreign_one():
    tiny = lab.load("tiny")
    assert tiny.reward_tokenizer is tiny.tokenizer and not tiny.foreign_reward


def test_a_new_value_model_says_nothing(bare):
    value = bare.new_value()
    assert not value.score.weight.any() and not hasattr(value.config, "score_offset")
    for name, weight in bare.sft.model.state_dict().items():
        assert torch.equal(value.model.state_dict()[name], weight)


# ---------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["ppo", "--reward", "golt"], "reward='golt': did you mean 'gold'?"),
        (["sft", "--reward", "gold"], "--reward is for ppo, rloo, grpo"),
        (["ppo", "--reward", "gold", "--reward", "gold"], "each of them once"),
        (
            ["ppo", "--reward", "gold", "--reward", "model", "--set", "reward_weights=[1,2]"],
            "the reward model first",
        ),
        (
            ["ppo", "--reward", "gold", "--set", "reward_weights=[1,2]"],
            "2 numbers for 1 source of reward",
        ),
        (["ppo", "--set", "reward_weights=2"], "a list of numbers"),
        (["ppo", "--set", "rule_reward=True"], "needs a rule"),
        (["grpo", "--reward", "gold", "--data", "mine.json"], "has no gold reward to learn from"),
    ],
)
def test_a_users_mistake_is_one_line(args, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [f'{{"prompt": "a {i}", "completion": "b"}}' for i in range(20)]
    (tmp_path / "mine.json").write_text(f"[{','.join(rows)}]")
    code = main(["train", *args, "--out", str(tmp_path / "r")])
    printed = capsys.readouterr().err
    assert code == 2 and says in printed and printed.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_functions_are_for_stages_that_sample(data, tmp_path):
    with pytest.raises(ValueError, match="dpo learns from no rewards"):
        lab.train("dpo", data, out=tmp_path / "r", reward_funcs=short)


def test_a_classifier_is_no_reward_model(bytewise, data, tmp_path):
    """Three labels: refused before the run's folder is made."""
    from transformers import AutoModelForSequenceClassification as Auto

    folder = tmp_path / "labels"
    Auto.from_pretrained(bytewise, num_labels=3, ignore_mismatched_sizes=True).save_pretrained(
        folder
    )
    model = lab.load("tiny").with_stage("reward", folder)
    with pytest.raises(ValueError, match="3 labels") as error:
        train("ppo", data, tmp_path / "r", model)
    assert "\n" not in str(error.value) and not (tmp_path / "r").exists()


def test_gold_is_gold(data):
    from rlhf_lab.data.reward_sources import reward_functions

    (named,) = reward_functions(lab.plan("ppo", "tiny", rewards=["gold"]), data)
    rows = data.sft.test[:3]
    prompts, answers = ([r[k] for r in rows] for k in ("prompt", "completion"))
    expected = [gold_reward(p, a) for p, a in zip(prompts, answers, strict=True)]
    assert named(prompts=prompts, completions=answers, completion_ids=[]) == expected
