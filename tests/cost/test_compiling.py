"""Plans with `torch_compile`: passes keep and take less, compiling is counted, "auto" weighs.

pytest tests/cost/test_compiling.py
"""

import pytest

import rlhf_lab as lab
from rlhf_lab.cost import compiling
from rlhf_lab.cost.architecture import architecture
from rlhf_lab.cost.layers import PassConfig
from rlhf_lab.cost.memory import trunk

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
PASSES = frozenset("old_logprobs reference teacher value score forward backward".split())
"""Phases whose passes are compiled."""
STEPS = {"hardware": "cpu", "prompt_length": 20, "response_length": 40}


def planned(stage="ppo", **settings):
    return lab.plan(stage, "tiny", **{**STEPS, "max_steps": 10, **settings}).estimate


@pytest.mark.parametrize("stage", ["ppo", "sft", "dpo", "grpo"])
def test_passes_take_less_and_nothing_else_changes(stage):
    plain, fast = planned(stage), planned(stage, torch_compile=True)
    for at, before in plain.seconds_of.items():
        compiled = at[0] in PASSES
        assert fast.seconds_of[at] < before if compiled else fast.seconds_of[at] == before
    assert fast.flops == plain.flops and fast.peak < plain.peak
    once = compiling.compile_seconds(fast.setup, fast.hardware)
    assert fast.hours * 3600 == pytest.approx(10 * fast.step_seconds + once)
    row = fast.ledger.filter(phase="compile", quantity="seconds")
    assert row.total() == once > 0 and not plain.ledger.filter(phase="compile")


def kept(family, **how):
    """Bytes that one compiled layer keeps for its backward pass, in units of its input's."""
    model = architecture({**SHAPE, "model_type": family})
    p = PassConfig(4, 32, compiled=True, padded=False, **how)
    layer = trunk(model, p)[-1]
    return layer.kept / (p.tokens * model.hidden * p.bytes_per_weight)


def test_a_compiled_layer_keeps_what_products_read_and_nothing_that_is_fused():
    """By hand, for Llama with 2 of 4 heads of keys, an MLP three times as wide, in fp32: the input,
    two norms, queries, keys and values, attention's output and a number a row and head, its
    projection, gate, up, their product, and a number a row of each norm; SiLU, squares, rotations
    and the residual sum are not kept."""
    numbers_a_row = 4 / 64 + 2 * 1 / 64
    assert kept("llama") == pytest.approx(1 + 2 + 2 + 1 + 1 + 3 * 3 + numbers_a_row)


def test_the_smaller_of_a_sum_and_its_parts_is_kept():
    """Adapters without a rank worth counting: base and adapter are added once, in 16 bits, and the
    sum is kept; inputs of adapters are kept in fp32, one copy for all that read it."""
    of_adapters = 2 * (1 + 1 + 1 + 3)  # fp32: two norms, attention's output, the MLP's product
    low = 7 * 2 * 1 / 64  # seven adapters of rank 1, in fp32
    numbers_a_row = 2 * (4 / 64 + 2 * 1 / 64)
    how = {"trained": False, "lora_r": 1, "bytes_per_weight": 2}
    targets = tuple("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split())
    found = kept("llama", targets=targets, **how)
    assert found == pytest.approx(1 + 2 + 1 + 1 + 2 * 3 + of_adapters + low + numbers_a_row)


def test_auto_weighs_what_it_takes_against_what_is_left_to_train():
    on, off = (planned(max_steps=n, torch_compile="auto") for n in (5000, 5))
    assert on.compiles[0] and not off.compiles[0]
    once = compiling.compile_seconds(off.setup, off.hardware)
    plain, fast = planned(), planned(torch_compile=True)
    saved = plain.step_seconds - fast.step_seconds
    for n in (2 * once / saved * 0.98, 2 * once / saved * 1.02):
        decided = planned(max_steps=round(n), torch_compile="auto").compiles[0]
        assert decided is (round(n) * saved > 2 * once)
    assert off.step_seconds == plain.step_seconds and on.step_seconds == fast.step_seconds
    for e, verdict in ((on, "on"), (off, "off")):
        line = next(x for x in e.caveats if x.startswith(f"torch_compile=auto is {verdict}: "))
        assert f"{once:.0f} s of compiling" in line


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "dpo"])
def test_runs_of_the_course_are_not_compiled(stage):
    assert not lab.plan(stage, "tiny", hardware="cpu", torch_compile="auto").estimate.compiles[0]


def test_a_gpu_is_planned_by_the_same_rule_and_says_what_is_not_known():
    asked = {"hardware": "h100", "torch_compile": True}
    plain, fast = planned(hardware="h100"), planned(**asked)
    assert fast.peak < plain.peak and fast.step_seconds < plain.step_seconds
    assert not fast.ledger.filter(phase="compile")
    # Nothing is measured there: the band reaches to where compiling saves nothing.
    assert fast.time_band[1] * fast.step_seconds == pytest.approx(
        plain.time_band[1] * plain.step_seconds
    )
    warnings = lab.plan("ppo", "tiny", **{**STEPS, **asked}).warnings
    assert "torch_compile on a gpu: not measured, and without the time to compile" in warnings
    auto = planned(hardware="h100", torch_compile="auto")
    assert not auto.compiles[0] and "how long compiling takes on a gpu" in auto.caveats[0]
    assert auto.peak == plain.peak


def test_apples_gpu_is_called_what_it_is():
    warnings = lab.plan("sft", "tiny", hardware="m3 max", torch_compile=True).warnings
    assert any(line.startswith("torch_compile on Apple's GPU: not measured") for line in warnings)


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"torch_compile": "always"}, "must be True, False or 'auto'"),
        (
            {"torch_compile": True, "load_in_4bit": True, "lora_r": 8},
            "does not go with load_in_4bit",
        ),
        ({"torch_compile_mode": "reduce-overhead"}, "torch_compile_mode has no effect here"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(settings, says):
    with pytest.raises(ValueError, match=says) as error:
        lab.plan("sft", "tiny", **settings)
    assert "\n" not in str(error.value)


def test_sharded_models_are_not_compiled():
    from rlhf_lab.launching import launched

    plan = lab.plan("ppo", "tiny", torch_compile=True)
    with pytest.raises(ValueError, match="shards models, whose layers are not compiled"):
        launched(plan, "fsdp2", 2, dry=True)


def test_what_is_no_choice_of_torch_compile_is_refused():
    for value in (1, "yes", None):
        with pytest.raises(ValueError, match="torch_compile must be True, False or 'auto', got "):
            lab.plan("ppo", "tiny", torch_compile=value)
    with pytest.raises(ValueError, match="has no setting 'torch_compile'"):
        lab.plan("inference", "tiny", torch_compile=True)


@pytest.mark.parametrize(
    ("model", "settings", "why"),
    [
        ("Qwen/Qwen2.5-7B", {"gpus": 8, "sharding": "zero3"}, "sharded"),
        ("Qwen/Qwen3-30B-A3B", {"lora_r": 8}, "experts"),
        ("tiny", {"per_device_train_batch_size": 1}, "one row"),
    ],
)
def test_what_training_does_not_compile_is_planned_without(model, settings, why):
    given = {"hardware": "h100", "prompt_length": 32, "response_length": 32, "rows": 64, **settings}
    plan, without = (lab.plan("sft", model, **given, torch_compile=on) for on in (True, False))
    assert plan.estimate.peak == without.estimate.peak
    assert plan.estimate.hours == without.estimate.hours
    assert any(line.startswith("without torch_compile") and why in line for line in plan.warnings)


def test_what_compiling_takes_is_said_beside_what_it_saves():
    (line,) = lab.plan("sft", "tiny", hardware="cpu", torch_compile=True).warnings
    assert line.startswith("torch_compile takes ") and "saves" in line
