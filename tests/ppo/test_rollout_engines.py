"""Rollouts by another engine than our loop: what it samples, and what is learned from it.

pytest tests/ppo/test_rollout_engines.py
"""

import math
from dataclasses import replace

import pytest
import torch
from ppo_kit import (
    PROMPT_IDS,
    PROMPTS,
    T,
    close,
    keys_of,
    must_fail,
    naive_logprobs,
    one_rollout,
    swap,
)

from rlhf_lab.ppo import losses
from rlhf_lab.ppo.config import PPOConfig
from rlhf_lab.ppo.engines import make_engine
from rlhf_lab.ppo.losses import response_mask
from rlhf_lab.ppo.rollout_engines import ContinuousBatching, Sampling
from rlhf_lab.ppo.sampling import pad_prompts
from rlhf_lab.ppo.vllm_engine import whole_weights

CB = {"use_transformers_continuous_batching": True}


def lora(**more):
    from peft import LoraConfig

    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 2, "target_modules": "all-linear", **more})


def batching(model, length=8, stops=(14,), temperature=T, **settings):
    return ContinuousBatching(model, Sampling(length, stops, 15, temperature), settings)


# ---------------------------------------------------------------------------------- what it samples


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_its_logprobs_are_those_of_a_pass_for_each_token(make, kind):
    trainer = make(kind, **CB)
    r, _, metrics = one_rollout(trainer)
    for row in range(len(PROMPTS)):
        n = int(r.mask[row].sum())
        close(r.engine_logprobs[row, :n], naive_logprobs(trainer.policy, r, row), atol=1e-4)
    assert not r.engine_logprobs[~r.mask].any()
    assert metrics["engine_log_ratio"] < 1e-5 and metrics["engine_far_tokens"] == 0


def test_at_temperature_0_it_takes_the_likeliest_token_of_every_prompt(tiny):
    """As good as 0. In this order of the prompts, and by one unpadded pass for each token."""
    model = tiny.lm(0)
    ids, mask = pad_prompts(PROMPT_IDS, tiny.pad)
    responses, _ = batching(model, temperature=1e-4).sample(model, ids, mask, keys_of(4))
    for prompt, response in zip(PROMPT_IDS, responses.tolist(), strict=True):
        expected = []
        while len(expected) < 8 and tiny.eos not in expected:
            logits = model(torch.tensor([prompt + expected])).logits[0, -1]
            expected.append(int(logits.argmax()))
        assert response[: len(expected)] == expected


def test_first_tokens_are_as_frequent_as_they_are_likely(tiny):
    """500 draws: every share within five standard errors of softmax(logits/T)."""
    model, n = tiny.lm(0), 500
    likely = torch.softmax(model(torch.tensor([PROMPT_IDS[0]])).logits[0, -1] / T, 0)
    ids, mask = pad_prompts(PROMPT_IDS[:1] * n, tiny.pad)
    responses, _ = batching(model, 1).sample(model, ids, mask, keys_of(n))
    share = responses[:, 0].bincount(minlength=len(likely)) / n
    assert ((share - likely).abs() <= 5 * (likely * (1 - likely) / n).sqrt() + 1e-9).all()
    assert (share > 0).sum() > 5, "nothing was cut off"


@pytest.mark.parametrize("stops", [(), (14,), (3, 14)])
def test_a_response_ends_at_our_stop_tokens_and_nowhere_else(tiny, stops):
    """Whatever the model's own configs say: they hold eos, 14."""
    ids, mask = pad_prompts(PROMPT_IDS * 4, tiny.pad)
    model = tiny.lm(0)
    responses, logprobs = batching(model, 12, stops).sample(model, ids, mask, keys_of(16))
    ended = response_mask(responses, stops or None)
    assert (logprobs[ended] < 0).all() and not logprobs[~ended].any()
    assert responses.shape == (16, 12) or ended.sum(1).max() == responses.shape[1]
    stopped = sum(bool({*row} & {*stops}) for row in responses.tolist())
    assert stopped == 0 if not stops else stopped > 0


def test_a_rollout_can_be_repeated_and_leaves_no_trace(make):
    """Same seed and iteration, same responses; torch's random numbers, and the model's attention,
    are afterwards as they were."""
    first, second = make(**CB), make(**CB)
    before = torch.get_rng_state()
    attention = first.policy.config._attn_implementation
    r = one_rollout(first)[0]
    assert torch.equal(before, torch.get_rng_state())
    assert first.policy.config._attn_implementation == attention
    assert torch.equal(r.responses, one_rollout(second)[0].responses)
    other = one_rollout(second, iteration=1)[0]
    assert r.responses.tolist() != other.responses.tolist()


@pytest.mark.parametrize("layout", ["shared", "adapters"])
def test_it_samples_from_the_weights_of_now_and_goes_on_after_a_stop(make, layout, tmp_path):
    """The policy moves by a rate of 1e-2, its samples with it; a restored run is the same run."""
    extra = {"peft_config": lora()} if layout == "adapters" else {}
    settings = {"layout": layout, "save_steps": 1, "save_total_limit": None, **CB}

    def trainer(folder):
        models = {"value_model": None}
        return make(models=models, extra=extra, output_dir=str(tmp_path / folder), **settings)

    whole = trainer("whole")
    history = whole.train().log_history
    assert len(history) == 3 and history[-1]["kl"] > 1e-3
    assert max(h["engine_log_ratio"] for h in history) < 1e-4
    assert max(h["engine_far_tokens"] for h in history) == 0
    again = trainer("again")
    found = again.train(tmp_path / "whole" / "checkpoint-2").log_history
    assert found[-1] == pytest.approx(history[-1])


# -------------------------------------------------------------------------- what is learned from it


def check_weighted(make):
    """The loss of the policy written out: each token's clipped loss times min(π/π_engine, C)."""
    cap = 1.5
    trainer = make(**CB, vllm_importance_sampling_clip_max=cap)
    r, adv, _ = one_rollout(trainer)
    g = torch.Generator().manual_seed(0)
    r = replace(r, engine_logprobs=r.logprobs + torch.randn(r.mask.shape, generator=g))
    _, found, _ = trainer.compute_losses(r, adv, r.mask.sum())
    trainer.meter.close()  # no backward pass will end what began here
    expected = 0.0
    for row, t in r.mask.nonzero().tolist():  # π is π_old: the ratio is 1, nothing is clipped
        weight = min(math.exp(r.logprobs[row, t] - r.engine_logprobs[row, t]), cap)
        expected -= weight * float(adv.advantages[row, t])
    close(found[0], expected / float(r.mask.sum()), atol=1e-5)


def test_rule_21_the_update_weights_samples_of_another_engine(make, monkeypatch):
    check_weighted(make)
    swap(monkeypatch, losses, "importance_weight", lambda right: lambda a, *_: torch.ones_like(a))
    with must_fail:
        check_weighted(make)


def test_what_is_logged_of_it_is_before_the_cap(make):
    trainer = make(**CB, vllm_importance_sampling_clip_max=2.0)
    r, adv, _ = one_rollout(trainer)
    shift = torch.zeros_like(r.logprobs)
    shift[:, 0], shift[:, 1] = 1.0, -0.2  # π/π_engine = e of first tokens, e^−.2 of second ones
    r = replace(r, engine_logprobs=(r.logprobs - shift) * r.mask)
    found = trainer._rollout_metrics(r, adv, 0.05)
    tokens, first, second = (float(m.sum()) for m in (r.mask, r.mask[:, 0], r.mask[:, 1]))
    assert found["engine_far_tokens"] == pytest.approx((first + second) / tokens)
    assert found["engine_capped_tokens"] == pytest.approx(first / tokens)
    assert "engine_log_ratio" not in one_rollout(make())[2], "our loop is no other engine"


# ------------------------------------------------------------------------ adapters as whole weights


@pytest.mark.parametrize("adapters", [{}, {"modules_to_save": ["lm_head"]}], ids=["sum", "copies"])
def test_whole_weights_are_those_of_a_model_without_adapters(tiny, adapters):
    from peft import get_peft_model

    base = tiny.lm(0).state_dict()
    policy = get_peft_model(tiny.lm(0), lora(**adapters)).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    plain = tiny.lm(1)
    weights = {name: weight.clone() for name, weight in whole_weights(policy)}
    assert weights.keys() == dict(plain.named_parameters()).keys()
    plain.load_state_dict(weights)
    ids = torch.tensor([PROMPT_IDS[2]])
    close(plain(ids).logits, policy(ids).logits, atol=1e-4)
    for name, weight in policy.get_base_model().state_dict().items():  # the base has not moved
        if ".base_layer." in name:
            assert torch.equal(weight, base[name.replace(".base_layer.", ".")])


def test_adapters_that_are_no_sum_are_refused(tiny):
    from peft import get_peft_model

    policy = get_peft_model(tiny.lm(0), lora(use_dora=True))
    with pytest.raises(ValueError, match="q_proj has DoRA"):
        dict(whole_weights(policy))


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "settings, line",
    [
        ({**CB, "use_vllm": True}, "use_vllm and use_transformers_continuous_batching: choose one"),
        (
            {"vllm_gpu_memory_utilization": 1.5},
            "vllm_gpu_memory_utilization must be above 0, at most 1, got 1.5",
        ),
        ({"vllm_importance_sampling_clip_max": 0}, "clip_max must be above 0"),
        ({**CB, "transformers_continuous_batching_config": "big"}, "'big' is no JSON"),
        ({**CB, "transformers_continuous_batching_config": {"pages": 3}}, "'pages'"),
        ({**CB, "transformers_continuous_batching_config": {"seed": 3}}, "seed is set by the tr"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(make, settings, line):
    with pytest.raises(ValueError, match=line) as error:
        make(**settings)
    assert "\n" not in str(error.value)


def test_a_missing_package_is_one_line(make, monkeypatch):
    monkeypatch.setattr("rlhf_lab.ppo.vllm_engine.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="^use_vllm needs vllm: pip install vllm"):
        make(use_vllm=True)


def test_several_processes_and_quantised_weights_are_no_work_for_vllm(tiny, monkeypatch):
    monkeypatch.setattr("rlhf_lab.ppo.vllm_engine.find_spec", lambda name: "here")
    args, model = PPOConfig(use_vllm=True, report_to="none"), tiny.lm(0)
    with pytest.raises(ValueError, match="one process, and there are 2"):
        make_engine(args, model, None, 14, 15, processes=2)
    model.is_quantized = True
    with pytest.raises(ValueError, match="the policy's are quantised"):
        make_engine(args, model, None, 14, 15)


def test_a_policy_in_parts_is_our_loop_s_work(tiny):
    model = tiny.lm(0)
    next(model.parameters()).ds_id = 0  # as under DeepSpeed's ZeRO-3
    args = PPOConfig(**CB, report_to="none")
    with pytest.raises(ValueError, match="samples with whole weights, and .*embed_tokens.* is sh"):
        make_engine(args, model, None, 14, 15)


def test_pages_are_for_the_rollout_and_sizes_may_be_given(tiny):
    engine = batching(tiny.lm(0), page_size=16, num_blocks=400)
    assert engine._sizes([[1] * 20], 0, 8).num_blocks == 400
    plain = batching(tiny.lm(0))._sizes([[1] * 20, [1] * 40], 0, 60)
    assert plain.num_blocks == (3 + 1) + (4 + 1)  # pages of 32 tokens, and one to spare for each
