"""Tensor parallelism in inference: what a device holds, and what sums over devices take.

Run: pytest tests/cost/test_parallel.py
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lab.cost.architecture import architecture
from rlhf_lab.cost.estimate import estimate
from rlhf_lab.cost.hardware import hardware
from rlhf_lab.cost.parallel import all_reduce_seconds, shard
from rlhf_lab.models.load import presets

LLAMA = presets()["meta-llama/Llama-3.1-8B"]
LENGTHS = {"prompt_length": 512, "response_length": 128, "dtype": "bfloat16"}


def plan(k: int, **more):
    asked = {"gpus": k, "tensor_parallel": k, "sharding": "none", **LENGTHS, **more}
    return estimate("inference", LLAMA, "h100", asked)


def test_a_device_holds_its_heads_and_its_part_of_every_width():
    """Llama-3.1-8B on 8 devices, by hand: 4 of 32 heads, 1 of 8 for keys and values."""
    layer = 4096 * 512 + 2 * 4096 * 128 + 512 * 4096 + 3 * 4096 * 1792
    norms = 32 * 2 * 4096 + 4096
    tables = 2 * (128256 // 8) * 4096
    share = shard(architecture(LLAMA), 8)
    assert share.parameters() == 32 * layer + norms + tables
    assert (share.heads, share.kv_heads, share.vocabulary) == (4, 1, 16032)


def test_weights_are_what_vllm_loads():
    """vLLM reports 14.96 GiB on one device and 7.48 GiB on each of two (its pull request 10511)."""
    for k, gib in ((1, 14.96), (2, 7.48)):
        assert 2 * shard(architecture(LLAMA), k).parameters() / 2**30 == pytest.approx(
            gib, abs=0.01
        )


@pytest.mark.parametrize(
    "name", ["meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-7B", "openai-community/gpt2"]
)
@pytest.mark.parametrize("k", [2, 4])
def test_weights_of_a_device_are_within_two_percent_of_their_share(name, k):
    model = architecture(presets()[name])
    positions = model.embedding - model.vocabulary * model.head_width  # every device has them
    whole, share = model.parameters() - positions, shard(model, k).parameters() - positions
    assert share * k == pytest.approx(whole, rel=0.02)


def test_heads_of_keys_and_values_are_held_more_than_once():
    """8 heads on 16 devices: the maps of keys and values are halved no further."""
    model = architecture(LLAMA)
    eight, sixteen = shard(model, 8), shard(model, 16)
    assert sixteen.kv_heads == eight.kv_heads == 1
    doubled = 32 * 2 * 4096 * 128
    rest = model.parameters() - 32 * 2 * 4096 * 1024 - 32 * 2 * 4096 - 4096
    assert sixteen.parameters() - doubled - 32 * 2 * 4096 - 4096 == rest // 16


@pytest.mark.parametrize(("engine", "memory"), [("transformers", 0.2), ("vllm", 0.3)])
def test_eight_devices_share_memory_and_pay_for_sums(engine, memory):
    one, eight = (plan(k, engine=engine, per_device_train_batch_size=8) for k in (1, 8))
    assert eight.peak < memory * one.peak
    parts = [
        sum(v for (_, c), v in e.phases[1].bytes.items() if c == "kv_cache") for e in (one, eight)
    ]
    assert parts[1] == pytest.approx(parts[0] / 8)
    assert eight.flops == pytest.approx(one.flops, rel=0.05)
    for phase in ("prefill", "decode"):
        assert one.seconds_of[phase, "policy"] / 8 < eight.seconds_of[phase, "policy"]
    assert eight.step_seconds < one.step_seconds


def test_a_sum_by_hand():
    """NCCL's ring in LL: 3.6 µs and 0.47 µs a hop on NVLink; a large one moves 2 · 7/8 of it."""
    h100 = hardware("h100")
    assert all_reduce_seconds(0, 8, 1, h100) == pytest.approx(3.6e-6 + 14 * 0.47e-6)
    large = all_reduce_seconds(2**30, 8, 1, h100)
    assert large == pytest.approx(2 * 7 / 8 * 2**30 / 450e9, rel=0.02)
    assert all_reduce_seconds(2**20, 16, 2, h100) > all_reduce_seconds(2**20, 8, 1, h100)
    assert all_reduce_seconds(2**20, 1, 1, h100) == 0
    with pytest.raises(ValueError, match="say how many bytes/s go from process to process"):
        all_reduce_seconds(1, 2, 1, hardware("laptop"))


@settings(max_examples=60, deadline=None)
@given(size=st.integers(0, 2**28), k=st.integers(2, 8), more=st.integers(1, 2**20))
def test_larger_sums_over_more_devices_take_longer(size, k, more):
    h100 = hardware("h100")
    once = all_reduce_seconds(size, k, 1, h100)
    assert all_reduce_seconds(size + more, k, 1, h100) >= once
    assert all_reduce_seconds(size, k + 1, 1, h100) >= once


def test_what_cannot_be_shared_out_is_refused_in_one_line():
    with pytest.raises(ValueError, match="does not share out 4 heads of keys and values"):
        config = presets()["Qwen/Qwen2.5-7B"]
        estimate("inference", config, "h100", {"gpus": 7, "tensor_parallel": 7, **LENGTHS})
