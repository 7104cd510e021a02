"""Seconds: the roofline by hand, and rates that come back out of passes timed with them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lab.cost.hardware import Hardware, hardware
from rlhf_lab.cost.seconds import seconds
from rlhf_lab.cost.work import CAUSAL, MASKED, PLAIN, Work
from rlhf_lab.metering.calibrate import SHAPES, fit_rates, predicted_work

CPU = Hardware(
    "made up",
    "cpu",
    2**33,
    {"fp32": 1e11},
    2e10,
    "made up for a test",
    op_seconds=3e-5,
    launch_seconds=1e-5,
    function_rate=1e9,
    operand_bandwidth=5e9,
)


def test_a_cpu_does_one_thing_after_another():
    """1 ms of arithmetic, 2 ms of operands, 3 ms of streams, .5 ms of exponentials, 10 calls of
    30 µs and 20 launches of 10 µs: 7 ms."""
    work = Work([(5e7, 5e6, 2.0, PLAIN)], moved=6e7, transcendentals=5e5, called=10, launched=20)
    assert seconds(work, CPU, "fp32") == pytest.approx(7e-3)


def test_a_gpu_hides_what_it_can():
    """A product of 1 ms of arithmetic and 2 ms of memory takes 2 ms; a small one its launch; then
    the longest of streams, exponentials and launches of the other operations."""
    gpu = Hardware("made up", "gpu", 2**33, {"bf16": 1e12}, 1e12, "made up", op_seconds=2e-5)
    products = [(1e9, 2e9, 1.0, PLAIN), (1e3, 1e3, 1.0, PLAIN)]
    work = Work(products, moved=1e9, called=7, launched=5)
    assert seconds(work, gpu, "bf16") == pytest.approx(2e-3 + 2e-5 + 1e-3)
    many = replace(work, called=1002)
    assert seconds(many, gpu, "bf16") == pytest.approx(2e-3 + 2e-5 + 1005 * 2e-5)


def test_a_gpus_rates_go_by_kind_and_size():
    """Products of 1 GFLOP at 1 TFLOP/s, of 1 MFLOP at a quarter of it, and attention: all pairs at
    half the peak, or half of them at a quarter of it, which is as long as the large product."""
    gpu = Hardware(
        "made up",
        "gpu",
        2**33,
        {"bf16": 1e12},
        1e15,
        "made up",
        op_seconds=0.0,
        causal_attention=0.25,
        masked_attention=0.5,
        matmul_curve=(("bf16", 1e6, 2.5e11), ("bf16", 1e9, 1e12)),
    )

    def took(*products):
        return seconds(Work(list(products)), gpu, "bf16")

    assert took((1e9, 0.0, 1.0, PLAIN)) == pytest.approx(1e-3)
    assert took((1e6, 0.0, 1000.0, PLAIN)) == pytest.approx(4e-3)
    assert took((4e12, 0.0, 1.0, PLAIN)) == pytest.approx(4.0)  # beyond the curve
    assert took((1e9, 0.0, 1.0, MASKED)) == pytest.approx(2e-3)
    assert took((1e9, 0.0, 1.0, CAUSAL)) == pytest.approx(2e-3)
    assert took((1e9, 0.0, 1.0, PLAIN), (1e6, 0.0, 2.0, PLAIN)) == pytest.approx(1e-3 + 8e-6)


def _passes() -> list[Work]:
    """The predicted work of the passes that calibrate."""
    works = []
    for width, layers, rows, tokens in SHAPES:
        config = {
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 32,
            "num_key_value_heads": width // 32,
            "vocab_size": 512,
            "max_position_embeddings": 256,
        }
        works += predicted_work(config, rows, tokens)
    return works


@settings(max_examples=30, deadline=None)
@given(
    operand=st.floats(2e9, 2e10),
    op=st.floats(1e-5, 1e-4),
    launch=st.floats(4e-6, 4e-5),
    noise=st.lists(st.floats(-0.03, 0.03), min_size=27, max_size=27),
)
def test_the_fit_finds_the_rates_that_timed_the_passes(operand, op, launch, noise):
    """Times made with known rates, 3 % of noise on each: the fit predicts all of them again."""
    truth = replace(CPU, operand_bandwidth=operand, op_seconds=op, launch_seconds=launch)
    works = _passes()
    rows = [(w, seconds(w, truth, "fp32") * (1 + n)) for w, n in zip(works, noise, strict=True)]
    found = fit_rates(replace(CPU, operand_bandwidth=None), rows)
    for work, _ in rows:
        assert seconds(work, found, "fp32") == pytest.approx(seconds(work, truth, "fp32"), rel=0.08)
    assert found.op_seconds == pytest.approx(op, rel=0.25)
    assert found.launch_seconds == pytest.approx(launch, rel=0.25)


def test_a_gpu_is_fitted_to_launches_alone():
    gpu = hardware("h100")
    rows = list(zip(_passes()[:3], (1e-3, 2e-3, 3e-3), strict=True))
    found = fit_rates(gpu, rows)
    assert found.op_seconds == pytest.approx(2e-3 / rows[1][0].called)
    assert found.launch_seconds == pytest.approx(3e-3 / rows[2][0].launched)
    assert found.flops == gpu.flops


def test_ppo_and_sft_run_by_the_clock():
    """Every phase that the plan names takes time, and a second of two steps is no longer."""
    from real_steps import real_step

    from rlhf_lab.cost.architecture import architecture
    from rlhf_lab.cost.estimate import estimate
    from rlhf_lab.cost.setup import Setup
    from rlhf_lab.models.load import load

    config = load("tiny").config_dict()
    for stage in ("sft", "ppo"):
        setup = Setup(stage=stage, model=architecture(config), batch=2, prompt=4, response=4)
        seen = real_step(setup, config, by="clock")
        clock = {r.phase: r.value for r in seen.ledger.filter(quantity="seconds")}
        lengths = {"per_device_train_batch_size": 2, "prompt_length": 4, "response_length": 4}
        plan = estimate(stage, config, "laptop", lengths)
        assert set(clock) == {phase for phase, _ in plan.seconds_of}
        assert all(0 < value < 5 for value in clock.values())
