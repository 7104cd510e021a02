"""Layers that are written once without sizes, against the same ones written at their sizes.

pytest tests/cost/test_recording.py
"""

from __future__ import annotations

import random

import pytest

from rlhf_lab.cost.architecture import architecture
from rlhf_lab.cost.layers import PassConfig
from rlhf_lab.cost.memory import EMBEDDING, _part
from rlhf_lab.cost.recording import recordable, without_sizes
from rlhf_lab.models.load import presets

ONE_OF_EACH = {config["model_type"]: name for name, config in presets().items()}


def passes(model, count, rng):
    """Passes of every kind: lengths that the allocator rounds, decoding, adapters, half precision,
    masks, recomputation, Liger's kernels."""
    for _ in range(count):
        decodes, lora = rng.random() < 0.25, rng.random() < 0.3
        length = rng.choice([1, 5, 17, 100, 513, 2048])
        yield PassConfig(
            rng.choice([1, 2, 3, 7, 64]),
            1 if decodes else length,
            *rng.choice([(4, False), (4, True), (2, False)]),
            not lora,
            8 if lora else 0,
            model.lora_targets("all-linear") if lora else (),
            attention=rng.choice(["sdpa", "eager"]),
            padded=rng.random() < 0.5,
            gpu=rng.random() < 0.6,
            context=length if decodes else 0,
            fused=rng.random() < 0.2,
            compiled=rng.random() < 0.3,
            away=rng.choice(["", "", "inputs"]),
            selective=rng.random() < 0.3,
            dropout=rng.random() < 0.3,
        )


@pytest.mark.parametrize("name", ONE_OF_EACH.values())
def test_a_recorded_layer_is_the_written_one(name):
    """To the last byte and operation, at any batch and length."""
    model, rng = architecture(presets()[name]), random.Random(name)
    for p in passes(model, 6, rng):
        if not recordable(model, p):
            continue
        for number in range(EMBEDDING, len(model.layers)):
            grad = not p.context and rng.random() < 0.7
            again = grad and number != EMBEDDING and rng.random() < 0.4
            how = (rng.random() < 0.8, again, grad, rng.random() < 0.7)
            one, other = (
                _part(model, number, p, sizeless, how) for sizeless in (None, without_sizes(p))
            )
            assert one.forward == other.forward and one.backward == other.backward
            assert [*map(tuple, one.peak), *map(tuple, one.back)] == [*other.peak, *other.back]
            for field in ("kept", "gradients", "cached", "away"):
                assert getattr(one, field) == getattr(other, field), field


def test_what_is_no_sum_of_three_terms_is_written_at_its_size():
    """Eight experts, of which two tokens with two each reach four at most."""
    mixture = architecture(
        {
            "model_type": "mixtral",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": 50,
            "max_position_embeddings": 128,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        }
    )
    assert not recordable(mixture, PassConfig(1, 2))
    assert recordable(mixture, PassConfig(1, 4))
    assert not recordable(mixture, PassConfig(1, 4, quantized="nf4"))
