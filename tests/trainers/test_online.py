"""RLOO and GRPO: TRL's trainers, our tokens, our reward, our names.

pytest tests/trainers/test_online.py
"""

from __future__ import annotations

import pytest
import torch
from online_kit import Online

import rlhf_lab as lab
from rlhf_lab.data.tokenize import encode_prompt
from rlhf_lab.metering.flop_counter import FlopCounter
from rlhf_lab.metering.meter import NoMeter
from rlhf_lab.models.tokenizer import CHAT_TEMPLATE
from rlhf_lab.ppo.texts import score_texts
from rlhf_lab.trainers.online import GRPOConfig, RewardFunction
from rlhf_lab.trainers.trl import trl_settings

BOTH = pytest.mark.parametrize("stage", ["rloo", "grpo"])
ALIGNED = {"num_iterations": 1, "steps_per_generation": 1}
"""One step for every generation: GRPO needs no old log-probabilities."""


# ------------------------------------------------------------------------------------------ reward


def reward_function(tiny, **settings):
    args = GRPOConfig(**trl_settings({"response_length": 4, "num_generations": 2, **settings}, "x"))
    return RewardFunction(tiny.rm(1), tiny.tokenizer(), args, meter=NoMeter())


def test_the_reward_is_what_every_other_stage_hears(tiny, tmp_path):
    """A response that stopped scores as the same text does anywhere, offset included."""
    j = reward_function(tiny, per_device_train_batch_size=2)
    j.model.config.score_offset = 0.7
    prompts, texts = ["w1 w2", "w3", "w4 w5 w6"], ["w7", "w8 w9", "w10"]
    ids = [[*j.tokenizer(t)["input_ids"], tiny.eos] for t in texts]
    expected = score_texts(j.model, j.tokenizer, prompts, texts)
    assert torch.allclose(torch.tensor(j(prompts, texts, ids)), expected, atol=1e-5)


def test_a_response_that_was_cut_gets_no_eos_and_pays(tiny):
    """The score is at the last token that was sampled; the model is asked directly."""
    j = reward_function(tiny, missing_eos_penalty=2.0)
    cut, ended, early = [1, 2, 3, 4], [1, 2, 3, tiny.eos], [1, tiny.eos]
    assert j.stopped([cut, ended, early]).tolist() == [False, True, True]
    with torch.no_grad():
        alone = [float(j.model(torch.tensor([[5, *ids]])).logits) for ids in (cut, ended)]
    scores = j(["w5", "w5"], ["", ""], [cut, ended])
    assert scores == pytest.approx([alone[0] - 2.0, alone[1]], abs=1e-5)


@BOTH
def test_one_name_for_the_longest_response(stage):
    plan = lab.plan(stage, "tiny", max_completion_length=7)
    assert plan.settings["response_length"] == plan.config().max_completion_length == 7
    assert lab.plan(stage, "tiny", response_length=5).config().max_completion_length == 5
    with pytest.raises(ValueError, match="say one of them"):
        lab.plan(stage, "tiny", response_length=5, max_completion_length=7)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        lab.plan(stage, "tiny", temperature=0).config()


# ---------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("stage", "settings"), [("rloo", {}), ("grpo", {}), ("grpo", ALIGNED)])
def test_kl_is_that_of_the_responses_just_sampled(stage, settings, kind, tiny, tmp_path):
    """Nats per response, from passes of our own; with absolute positions too (rule 5)."""
    online = Online(stage, tiny, tmp_path, kind, **{**settings, "logging_steps": 1})
    online.trainer.train()
    each = online.args.steps_per_generation * online.args.num_iterations
    logged = [m["kl"] for m in online.logged if "kl" in m]
    assert len(logged) == 8 and len(online.asked) == 8 // each
    for number, asked in enumerate(online.asked):
        steps = logged[number * each : (number + 1) * each]
        assert sum(steps) / each == pytest.approx(asked["kl"], abs=1e-4)
    assert online.asked[0]["kl"] == pytest.approx(0, abs=1e-6) and online.asked[1]["kl"] > 0.01


@BOTH
def test_groups_are_sampled_purely_and_from_our_tokens(stage, tiny, tmp_path):
    """Rule 1: temperature only; every prompt `num_generations` times, side by side."""
    online = Online(stage, tiny, tmp_path, max_steps=1)
    made = online.trainer.generation_config
    assert (made.top_k, made.top_p, made.temperature, made.do_sample) == (0, 1.0, 1.0, True)
    assert made.min_p is None and made.repetition_penalty == 1.0
    ids, _, _ = online.trainer._tokenize_prompts(["w1 w2"])
    assert ids == [encode_prompt(online.tokenizer, "w1 w2")]
    online.trainer.train()
    (asked,) = online.asked
    assert len(asked["prompts"]) == 8 and asked["prompts"][::2] == asked["prompts"][1::2]
    assert all(1 <= len(ids) <= 6 and tiny.eos not in ids[:-1] for ids in asked["ids"])


@pytest.mark.parametrize("lora", [False, True])
@BOTH
def test_sampling_is_the_settings_of_the_stage_alone(stage, lora, tiny, tmp_path):
    """models.md 8: transformers fills up what TRL leaves open from the model's own settings."""
    own = {
        "min_p": 0.9,
        "typical_p": 0.2,
        "suppress_tokens": [3, 4, 5],
        "min_new_tokens": 6,
        "no_repeat_ngram_size": 1,
    }
    sampled = []
    for settings in ({}, own):
        o = Online(stage, tiny, tmp_path, lora=lora, max_steps=1)
        whole = o.policy.get_base_model() if lora else o.policy
        whole.generation_config.update(**settings)
        kept = whole.generation_config.to_dict()
        o.trainer.train()
        sampled.append([call["ids"] for call in o.asked])
        assert whole.generation_config.to_dict() == kept  # and they are still there to be saved
    assert sampled[0] == sampled[1]


@BOTH
def test_conversations_are_encoded_as_everywhere(stage, tiny, tmp_path):
    talks = [[{"role": "user", "content": f"w{i} w{i + 1}"}] for i in range(8)]
    online = Online(stage, tiny, tmp_path, prompts=talks, template=CHAT_TEMPLATE, max_steps=1)
    online.trainer.train()
    (asked,) = online.asked
    assert asked["prompts"][0] in talks and asked["kl"] == pytest.approx(0, abs=1e-6)
    ids, _, _ = online.trainer._tokenize_prompts(talks[:2])
    assert ids == [encode_prompt(online.tokenizer, t) for t in talks[:2]]
    assert len(ids[0]) > 2


@BOTH
def test_only_the_policy_learns(stage, tiny, tmp_path):
    """Rule 23."""
    online = Online(stage, tiny, tmp_path)
    before = {
        n: [p.clone() for p in m.parameters()]
        for n, m in (("reference", tiny.lm(0)), ("reward", tiny.rm(1)))
    }
    online.trainer.train()
    for name, model in (("reference", online.reference), ("reward", online.reward)):
        assert all(map(torch.equal, model.parameters(), before[name]))
    assert not any(map(torch.equal, online.policy.parameters(), before["reference"]))
    assert online.trainer.ref_model is online.reference


def testno_dropout_in_functions_either(tiny, tmp_path):
    """Rule 4: OPT drops out by a function call, which is no module to be found."""
    online = Online("grpo", tiny, tmp_path, disable_dropout=True)
    from transformers import OPTConfig, OPTForCausalLM

    from rlhf_lab.trainers.online import no_dropout

    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=16,
            hidden_size=16,
            ffn_dim=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=16,
            dropout=0.5,
            layerdrop=0.5,
        )
    ).train()
    ids = torch.arange(8)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    no_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert online.policy.model.layers[0].self_attn.attention_dropout == 0.0


@BOTH
def test_metrics_have_the_names_of_ppo(stage, tiny, tmp_path):
    online = Online(stage, tiny, tmp_path, missing_eos_penalty=1.0)
    online.trainer.train()
    one = online.logged[0]
    clipped = "clipfrac" if stage == "grpo" else "response_clipfrac"
    assert set(one) == {
        "loss",
        "grad_norm",
        "learning_rate",
        "entropy",
        "reward",
        "score",
        "stopped",
        "kl",
        "kl_k3",
        "response_length",
        "equal_groups",
        "episodes",
        "asked",
        clipped,
        "rewards/model",
    }
    ids = online.asked[0]["ids"]
    assert one["response_length"] == pytest.approx(sum(map(len, ids)) / len(ids))
    assert one["stopped"] == pytest.approx(sum(i[-1] == tiny.eos for i in ids) / len(ids))
    assert one["reward"] - one["score"] == pytest.approx(1 - one["stopped"], abs=1e-5)
    assert [m["episodes"] for m in online.logged] == [8, 16]


# ------------------------------------------------------------------------------------------ ledger


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("rloo", {}),
        ("rloo", {"gradient_accumulation_steps": 2, "beta": 0.0}),
        ("rloo", {"lora": True}),
        ("grpo", {}),
        ("grpo", ALIGNED),
        ("grpo", {"lora": True}),
    ],
)
def test_flops_of_a_whole_run_equal_counting_every_step(stage, settings, tiny, tmp_path):
    """Nothing missed, nothing counted twice: against a counter that is on all the time."""
    online = Online(stage, tiny, tmp_path, **settings)
    online.reward_function.metric_funcs.clear()
    with FlopCounter() as every:
        online.trainer.train()
    meter = online.meter
    assert sum(meter.flops.values()) == every.total > 0
    phases = [
        ("rollout", "policy"),
        ("score", "reward"),
        ("forward", "policy"),
        ("backward", "policy"),
    ]
    if settings != ALIGNED or stage == "rloo":
        phases.append(("old_logprobs", "policy"))
    if online.args.beta:
        phases.append(("reference", "reference"))
    assert set(meter.flops) == set(phases)
    assert set(meter.seconds) - {("evaluation", "")} == {*phases, ("optimizer", "policy")}
    assert "_generate_single_turn" not in vars(online.trainer)


def test_flops_and_tokens_by_hand(tiny, tmp_path):
    """One generation and one step. Every response has its six tokens: nothing ever stops."""
    online = Online(
        "rloo",
        tiny,
        tmp_path,
        **ALIGNED,
        max_steps=1,
        generation_kwargs={"suppress_tokens": [tiny.eos]},
    )
    online.trainer.train()
    prompts = [len(encode_prompt(online.tokenizer, p)) for p in online.asked[0]["prompts"]]
    b, p, t, h, inner, layers = 4, max(prompts), 6, 16, 32, 2
    matrices = layers * (4 * h * h + 3 * h * inner)

    def scores(new, seen):  # two products of each query with each key, in all layers
        return 4 * b * new * seen * h * layers

    s = p + t
    once = 2 * b * s * matrices + scores(s, s)
    head = 2 * b * (s - 1) * h * tiny.words  # TRL's fused head scores every position but the last
    flops = online.meter.flops
    assert flops["old_logprobs", "policy"] == flops["reference", "reference"] == once + head
    assert flops["forward", "policy"] == once + head
    assert flops["score", "reward"] == once + 2 * b * h
    sampled = b * (p + t - 1)  # the last token is sampled, and never run
    seen = scores(p, p) + sum(scores(1, p + i) for i in range(1, t))
    assert flops["rollout", "policy"] == 2 * sampled * matrices + seen + 2 * b * t * h * tiny.words
    tokens = online.meter.tokens
    assert tokens["rollout", "policy"] == b * t
    assert tokens["score", "reward"] == tokens["forward", "policy"] == sum(prompts) + b * t


@pytest.mark.parametrize("lora", [False, True])
def test_who_is_in_memory(lora, tiny, tmp_path):
    """Policy, reward model and a reference; of adapters the policy is the reference."""
    online = Online("grpo", tiny, tmp_path, lora=lora)
    online.trainer.train()
    size = 4 * sum(p.numel() for p in tiny.lm(0).parameters())
    for phase in ("rollout", "reference", "forward", "backward"):
        parts = online.meter.ledger().pivot("role", "component", quantity="bytes", phase=phase)
        held = parts.get("reference", {}).get("parameters", 0)
        assert held == pytest.approx(0 if lora else size, rel=0.01)
        assert parts["reward"]["parameters"] > 0 and parts["policy"]["parameters"] > 0
        assert "value" not in parts
    rollout = online.meter.ledger().pivot("role", "component", quantity="bytes", phase="rollout")
    assert rollout["policy"]["kv_cache"] > 0
