"""Options of the trainers' configs that change a plan, against sums done by hand.

pytest tests/cost/test_options.py
"""

from __future__ import annotations

import math

import pytest

import rlhf_lab as lab

MODEL = "Qwen/Qwen2.5-0.5B"
ROWS = {"rows": 10_000, "prompt_length": 200, "response_length": 200, "mean_tokens": 250}


def plan(stage, **settings):
    return lab.plan(stage, MODEL, hardware="a100", **{**ROWS, **settings})


def flops(made, *phases):
    return sum(
        row.value
        for row in made.ledger.filter(quantity="flops")
        if not phases or row.phase in phases
    )


def resident(made, role):
    return sum(
        row.value
        for row in made.ledger.filter(quantity="bytes", phase="forward")
        if (row.role, row.component) == (role, "parameters")
    )


def test_packed_rows_are_full_and_fewer():
    """2.5 million tokens in rows of 2,048: 1,221 of them, 39 steps of 32."""
    packed = plan("sft", packing=True, max_length=2048)
    assert packed.estimate.steps == math.ceil(math.ceil(10_000 * 250 / 2048) / 32) == 39
    setup = packed.estimate.setup
    assert (setup.length, setup.padded) == (2048, False)
    # A token costs the same, but for attention, which reads further in longer rows.
    tokens = 39 * 32 * 2048
    unpacked = plan("sft", mean_tokens=400)  # no padding either: rows as long as the longest
    per_token = flops(unpacked, "forward") / (unpacked.estimate.steps * 32 * 400)
    further = 4 * (2048 - 400) * setup.model.depth * setup.model.heads * setup.model.head_dim
    assert flops(packed, "forward") / tokens - per_token == pytest.approx(further, rel=0.02)


def test_rows_without_padding_cost_their_own_tokens():
    free, padded = plan("sft", padding_free=True), plan("sft")
    assert flops(free) / flops(padded) == pytest.approx(250 / 400, rel=0.03)
    assert free.estimate.steps == padded.estimate.steps


def test_rows_are_as_long_as_a_multiple():
    assert plan("sft", pad_to_multiple_of=64).estimate.setup.length == 448
    assert plan("sft", pad_to_multiple_of=200).estimate.setup.length == 400
    with pytest.raises(ValueError, match="padded are more than the 32768 that the model takes"):
        _ = plan("sft", pad_to_multiple_of=50_000).estimate


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_a_reference_that_is_asked_once_need_not_stay(stage):
    """TRL makes none where its log-probabilities are computed ahead; FSDP alone needs one."""
    kept, once = (
        plan(stage, num_train_epochs=3, precompute_ref_log_probs=x) for x in (False, True)
    )
    assert resident(kept, "reference") > 0 and resident(once, "reference") == 0
    ratio = 1 / 3 if stage == "dpo" else (2 / 3 + 1) / 3  # KTO's policy has a pass of its own
    assert flops(once, "reference") / flops(kept, "reference") == pytest.approx(ratio, rel=1e-6)
    assert flops(once, "forward", "backward") == flops(kept, "forward", "backward")
    sharded = plan(stage, precompute_ref_log_probs=True, gpus=4, sharding="fsdp2")
    assert resident(sharded, "reference") > 0


def test_tf32_is_a_precision_of_products():
    """A100: 19.5 and 156 TFLOP/s by its data sheet; a device that has none keeps fp32."""
    fp32 = {"bf16": False, "dtype": "float32"}
    slow, fast = plan("sft", **fp32), plan("sft", tf32=True, **fp32)
    assert fast.peak == slow.peak
    assert 0.125 < fast.estimate.step_seconds / slow.estimate.step_seconds < 0.5
    v100 = [
        lab.plan("sft", MODEL, hardware="v100", fp16=False, bf16=False, tf32=x)
        for x in (0 > 1, True)
    ]
    assert v100[0].estimate.step_seconds == v100[1].estimate.step_seconds


# What torchtune and torchtitan do, and published figures were measured with.

CONFIG = {"dtype": "bfloat16", "prompt_length": 0, "response_length": 4096, "padded": False}
LLAMA3B = "meta-llama/Llama-3.2-3B"


def at(e, component, phase):
    return sum(
        size
        for (_, name), size in next(f for f in e.phases if f.name == phase).bytes.items()
        if name == component
    )


def of_llama(**settings):
    """A plan of two rows of 4,096 tokens on one device."""
    batch = {"per_device_train_batch_size": 2, "loss": "plain", "gradient_checkpointing": True}
    return lab.plan("sft", LLAMA3B, hardware="a100", **{**CONFIG, **batch, **settings}).estimate


def test_a_chunked_loss_has_all_logits_once():
    tokens = 2 * 4096 * 128_256
    assert at(of_llama(loss="chunked", lora_r=8), "logits", "backward") == 2 * tokens
    assert at(of_llama(lora_r=8), "logits", "backward") == 12 * tokens  # fp32, three times


def test_a_weight_that_changes_in_backward_leaves_no_gradient():
    usual, now = of_llama(loss="chunked"), of_llama(loss="chunked", optimizer_in_backward=True)
    assert at(usual, "gradients", "optimizer") == 2 * 3_212_749_824
    assert at(now, "gradients", "optimizer") == 0
    table = 2 * 128_256 * 3072  # the head's waits for the embedding's, which is the same matrix
    assert table <= at(now, "gradients", "backward") < 1.2 * table
    assert now.peak < usual.peak - 2e9
    for wrong in ({"gradient_accumulation_steps": 2}, {"gpus": 2, "sharding": "fsdp2"}):
        with pytest.raises(ValueError, match="optimizer_in_backward"):
            _ = of_llama(optimizer_in_backward=True, **wrong)


def test_every_second_product_stays():
    """Of seven maps of a layer q, v, gate and down stay, and what attention makes: the others, k,
    o and up, are made again."""
    full, selected = of_llama(), of_llama(selective_checkpointing=True)
    tokens, head = 2 * 4096, 4 * 24
    kept = 28 * tokens * (2 * (3072 + 1024 + 8192 + 3072 + 3072) + head)
    more = at(selected, "activations", "backward") - at(full, "activations", "backward")
    assert more == pytest.approx(kept, rel=0.03)
    again, all_again = (
        sum(f.work.flops for f in e.phases if f.name == "backward") for e in (selected, full)
    )
    left_out = 28 * 2 * tokens * 3072 * (3072 + 1024 + 8192)  # down is never made again
    attention = 28 * 4 * tokens * 4096 * 3072
    assert all_again - again == pytest.approx(left_out + attention, rel=1e-6)


def of_seven(**settings):
    return lab.plan("sft", "Qwen/Qwen2.5-7B", hardware="h100", sharding="fsdp2", **settings)


def test_the_first_fsdp_keeps_what_frozen_layers_start_from():
    """Measured with two processes: at the end of backward the input of every layer is there, and
    its gradient; FSDP2 has let go of them. 28 layers, 2 rows of 4,096 tokens, 3584 wide."""
    common = {"gpus": 4, "lora_r": 16, "gradient_checkpointing": True, "loss": "fused"}
    common |= {"dtype": "bfloat16", "prompt_length": 0, "response_length": 4096}
    one, two = (of_seven(**common, per_device_train_batch_size=2, fsdp_version=v) for v in (1, 2))
    copy = 27 * 2 * 4096 * 3584 * 2
    assert 0.9 * copy < one.peak - two.peak < 2.1 * copy
    full = [of_seven(**{**common, "lora_r": 0}, fsdp_version=v).peak for v in (1, 2)]
    assert full[0] == full[1]
    with pytest.raises(ValueError, match="fsdp_version=3"):
        _ = of_seven(**common, fsdp_version=3).estimate
