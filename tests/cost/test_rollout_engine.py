"""An engine that samples for RLOO and GRPO: its memory, its time, its devices.

pytest tests/cost/test_rollout_engine.py
"""

import pytest

import rlhf_lab as lab

MODEL = "Qwen/Qwen2.5-7B"
ONE = {
    "hardware": "h100",
    "gpus": 8,
    "sharding": "zero3",
    "prompt_length": 256,
    "response_length": 1024,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "num_generations": 8,
    "dtype": "bfloat16",
    "rows": 10_000,
}


def planned(stage="grpo", **more):
    return lab.plan(stage, MODEL, **ONE, **more).estimate


def rollout(e):
    return e.seconds_of["rollout", "policy"]


def resident(e, phase="optimizer"):
    """Bytes of keys and values in a phase in which nobody samples."""
    return sum(f.bytes.get(("policy", "kv_cache"), 0) for f in e.phases if f.name == phase)


@pytest.mark.parametrize("stage", ["grpo", "rloo"])
def test_an_engine_samples_faster_and_takes_its_share(stage):
    plain, engine = planned(stage), planned(stage, use_vllm=True)
    assert rollout(engine) < 0.5 * rollout(plain)
    weights = engine.setup.model.parameters() * 2
    taken = 0.3 * engine.hardware.memory
    assert engine.peak - plain.peak == pytest.approx(taken, rel=1e-6)
    assert resident(engine) == pytest.approx(taken - weights, rel=0.01)


def test_it_is_not_faster_than_its_memory_is_read():
    """Of each token all weights are read, at the published bandwidth."""
    engine = planned(use_vllm=True)
    weights = engine.setup.model.parameters() * 2
    updates = engine.setup.updates
    assert rollout(engine) * updates > 1023 * weights / engine.hardware.bandwidth


def test_asleep_it_leaves_its_memory_to_training():
    awake, asleep = (planned(use_vllm=True, vllm_enable_sleep_mode=x) for x in (False, True))
    assert resident(asleep) == 0 < resident(awake)
    assert asleep.peak < awake.peak


def test_a_server_has_devices_of_its_own():
    plain = planned()
    server = planned(use_vllm=True, vllm_mode="server", vllm_tensor_parallel_size=4)
    assert server.peak == pytest.approx(plain.peak, rel=0.05)
    assert server.gpu_hours == pytest.approx(server.hours * 12)
    assert rollout(planned(use_vllm=True, vllm_mode="server")) > rollout(server)


def test_what_its_share_does_not_hold_is_refused():
    with pytest.raises(ValueError, match=r"vllm_gpu_memory_utilization=0\.1 of H100"):
        planned(use_vllm=True, vllm_gpu_memory_utilization=0.1)


def test_devices_are_shared_evenly():
    with pytest.raises(ValueError, match="vllm_tensor_parallel_size=3 must divide gpus=8"):
        planned(use_vllm=True, vllm_tensor_parallel_size=3)
    with pytest.raises(ValueError, match="vllm_mode='apart'"):
        planned(use_vllm=True, vllm_mode="apart")


def ppo(hardware="h100", **more):
    lengths = {"prompt_length": 256, "response_length": 512, "per_device_train_batch_size": 64}
    adapters = {"layout": "adapters", "lora_r": 16}
    return lab.plan("ppo", MODEL, hardware=hardware, **lengths, **adapters, **more)


def test_ppo_s_rollouts_too():
    """Its share of the memory, and faster than a loop over tokens; in 32 bits where PPO is."""
    plain, engine = ppo().estimate, ppo(use_vllm=True).estimate
    assert rollout(engine) < rollout(plain)
    held = resident(engine) + 2 * engine.setup.model.parameters()
    assert held == pytest.approx(0.3 * engine.hardware.memory, rel=0.01)
    whole = ppo(use_vllm=True, bf16=False, vllm_gpu_memory_utilization=0.6).estimate
    held = resident(whole) + 4 * whole.setup.model.parameters()
    assert held == pytest.approx(0.6 * whole.hardware.memory, rel=0.01)


def test_what_ppo_s_engine_cannot_do_or_is_not_planned_is_said():
    with pytest.raises(ValueError, match="in one process: choose gpus=1, not 8"):
        _ = ppo(use_vllm=True, gpus=8).estimate
    with pytest.raises(ValueError, match="planned, not simulated"):
        lab.xray(lab.plan("ppo", "tiny", hardware="h100", use_vllm=True))
    small = {"use_vllm": True, "hardware": "here"}
    plan, plain = (lab.plan("ppo", "tiny", **more) for more in (small, {"hardware": "here"}))
    assert any("not modelled: use_vllm on a CPU" in line for line in plan.warnings)
    assert plan.estimate.step_seconds == plain.estimate.step_seconds
