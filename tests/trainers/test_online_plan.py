"""The plan of RLOO and GRPO against what TRL's trainers really take, phase by phase.

pytest tests/trainers/test_online_plan.py
"""

from __future__ import annotations

import pytest
from online_kit import Online

import rlhf_lab as lab
from rlhf_lab.cost.architecture import architecture
from rlhf_lab.cost.estimate import estimate
from rlhf_lab.cost.hardware import hardware
from rlhf_lab.cost.read_settings import make_setup

SIZES = {
    "llama": {"hidden_size": 64, "intermediate_size": 160},
    "gpt2": {"n_embd": 64, "bos_token_id": 0},
}
STEPS = 8
CASES = [
    ("rloo", "llama", {}, {}),
    ("rloo", "gpt2", {"gradient_accumulation_steps": 2}, {}),
    ("rloo", "llama", {"num_iterations": 1, "gradient_accumulation_steps": 2, "beta": 0.0}, {}),
    ("grpo", "llama", {"num_generations": 4}, {}),
    ("grpo", "llama", {"num_iterations": 1, "steps_per_generation": 1}, {}),
    ("grpo", "llama", {}, {"lora_r": 2}),
]


@pytest.mark.parametrize(("stage", "kind", "settings", "lora"), CASES)
def test_memory_and_flops_of_every_phase(stage, kind, settings, lora, tiny, tmp_path):
    """FLOPs to the last one; bytes within 5 % at the peak, within 8 % in every other phase."""
    prompts = ["w1 w2 w3 w4 w5 w6 w7 w8", "w1 w2 w3 w4 w5 w6 w7 w9"]  # no padding: no mask
    online = Online(
        stage,
        tiny,
        tmp_path,
        kind,
        lora=bool(lora),
        prompts=prompts * 8,
        sizes=SIZES[kind],
        per_device_train_batch_size=8,
        response_length=24,
        max_steps=STEPS,
        **settings,
        generation_kwargs={"suppress_tokens": [tiny.eos]},  # all responses are of one length
    )
    online.reward_function.metric_funcs.clear()
    config, reward_config = online.reference.config.to_dict(), online.reward.config.to_dict()
    online.trainer.train()
    settings = {
        "per_device_train_batch_size": 8,
        "prompt_length": 8,
        "response_length": 24,
        "padded": False,
        "dtype": "float32",
        "bf16": False,
        "max_steps": STEPS,
        "beta": 0.1,
        "num_generations": 2,
        "steps_per_generation": 2,
        "num_iterations": 2,
        **settings,
        **lora,
    }
    e = estimate(stage, config, hardware("laptop"), settings, reward=reward_config)
    measured = online.meter.ledger()
    phases = {r.phase for r in e.ledger if r.quantity == "flops"}
    assert phases == {r.phase for r in measured if r.quantity == "flops"}
    for phase in phases:
        for quantity in ("flops", "tokens"):
            want = {"phase": phase, "quantity": quantity}
            assert e.ledger.total(**want) == measured.total(**want), phase
        want = {"phase": phase, "quantity": "bytes"}
        assert e.ledger.total(**want) == pytest.approx(measured.total(**want), rel=0.08), phase
    assert e.peak == pytest.approx(measured.peak(), rel=0.05)


def test_steps_are_those_that_trl_would_make(tiny, tmp_path):
    """Two epochs of 11 prompts, in generations of 4 prompts: what is left over is left out."""
    for settings in ({}, {"num_iterations": 1}, {"gradient_accumulation_steps": 2}):
        online = Online(
            "rloo",
            tiny,
            tmp_path,
            prompts=[f"w{i}" for i in range(11)],
            max_steps=-1,
            num_train_epochs=2,
            **settings,
        )
        online.trainer.train()
        settings = {
            "per_device_train_batch_size": 4,
            "steps_per_generation": 2,
            "num_iterations": 2,
            "num_generations": 2,
            "rows": 11,
            "num_train_epochs": 2,
            "prompt_length": 1,
            "response_length": 6,
            **settings,
        }
        e = estimate("rloo", online.reference.config.to_dict(), hardware("laptop"), settings)
        assert e.steps == online.trainer.state.global_step == online.trainer.state.max_steps


def test_without_a_critic():
    """The critic is a model, its gradients and its states; and a share of every phase."""
    same = {
        "hardware": "h100",
        "prompt_length": 256,
        "response_length": 256,
        "rows": 1000,
        "per_device_train_batch_size": 8,
    }
    ppo, grpo = (lab.plan(s, "Qwen/Qwen2.5-0.5B", **same).estimate for s in ("ppo", "grpo"))
    value = ppo.ledger.filter(quantity="bytes", role="value", phase="optimizer").total()
    assert ppo.phases[-1].total - grpo.phases[-1].total == pytest.approx(value, rel=0.01)
    assert {f.role for f in grpo.phases} == {"policy", "reference", "reward"}
    free = lab.plan("grpo", "Qwen/Qwen2.5-0.5B", **same, beta=0.0, rule_reward=True).estimate
    assert {f.role for f in free.phases} == {"policy"}


@pytest.mark.parametrize(
    ("settings", "updates", "old"),
    [
        ({}, 1, False),
        ({"num_iterations": 2}, 2, True),
        ({"steps_per_generation": 4}, 4, True),
        ({"gradient_accumulation_steps": 4}, 1, False),
        (
            {"gradient_accumulation_steps": 4, "steps_per_generation": 2, "num_iterations": 2},
            1,
            False,
        ),
        ({"gradient_accumulation_steps": 3, "steps_per_generation": 2}, 2 / 3, True),
    ],
)
def test_when_old_log_probabilities_are_needed(settings, updates, old):
    """Never for GRPO where every generation is one optimizer step; always for RLOO."""
    config = lab.load("tiny").config_dict()
    for stage in ("grpo", "rloo"):
        s = make_setup(
            stage,
            architecture(config),
            hardware("laptop"),
            {"per_device_train_batch_size": 8, "num_generations": 4, **settings},
        )
        assert s.updates == pytest.approx(updates)
        assert s.old_logprobs == (old or stage == "rloo")


def test_groups_that_do_not_fit_are_one_line():
    with pytest.raises(
        ValueError, match="does not split into groups of num_generations=5: ch"
    ) as e:
        lab.plan("grpo", "tiny", num_generations=5).estimate  # noqa: B018
    assert "\n" not in str(e.value)


def test_smaller_passes_learn_from_the_same_generation():
    plan = lab.plan("grpo", "Qwen/Qwen2.5-0.5B", hardware="h100", rows=1000)
    e = plan.estimate
    (smaller,) = (r for r in plan.cheaper() if r.does.startswith("smaller passes"))
    new = smaller.estimate.setup
    assert new.batch < e.setup.batch and smaller.saves_bytes > 0
    assert (new.rollout_batch, new.updates) == (e.setup.rollout_batch, e.setup.updates)
    assert smaller.estimate.steps == e.steps
    settings = {"steps_per_generation": None, "generation_batch_size": 128}
    assert lab.plan("grpo", "tiny", **settings).estimate.setup.rollout_batch == 128
