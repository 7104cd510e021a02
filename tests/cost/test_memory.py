"""The pencil-and-paper autograd against formulas that were worked out by hand, and small cases.

pytest tests/cost/test_memory.py
"""

from __future__ import annotations

import pytest

from rlhf_lab.cost.architecture import architecture
from rlhf_lab.cost.layers import PassConfig
from rlhf_lab.cost.memory import backward_peak, forward_peak, trunk, written
from rlhf_lab.cost.tape import Tape
from rlhf_lab.cost.values import GRADIENT, Store

B, S = 3, 40
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
}
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 300,
    "n_positions": 128,
}
NEOX = {
    "model_type": "gpt_neox",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "max_position_embeddings": 128,
}


def kept(config: dict, **more) -> int:
    """Bytes that one layer leaves for its backward pass, 16-bit weights, no mask."""
    p = PassConfig(B, S, **{"bytes_per_weight": 2, "padded": False, **more})
    return trunk(architecture(config), p, checkpoint=False)[-1].kept


def test_a_llama_layer_keeps_as_much_as_the_formula():
    """sb(20h + 4(k/a)h + 8I) + 4abs, in bytes, 16 bits, fused attention; one number a row and norm
    on top."""
    h, i, a, k = 64, 160, 4, 2
    assert kept(LLAMA) == S * B * (20 * h + 4 * h * k // a + 8 * i + 8) + 4 * a * B * S


def test_attention_written_out_keeps_its_scores():
    """sb(24h + 8I) + 6abs²: keys and values are repeated for every head, and the weights are kept
    in 32 and in 16 bits."""
    h, i, a = 64, 160, 4
    assert kept(LLAMA, attention="eager") == S * B * (24 * h + 8 * i + 8) + 6 * a * B * S * S


def test_gpt2_and_neox():
    """56·sbh and 36·sbh, and a little for the norms' statistics and the rows of attention."""
    small = 2 * 2 * 4 * B * S + 4 * 4 * B * S  # two norms of two numbers a row, one a head
    assert kept(GPT2) == 56 * S * B * 64 + small
    assert kept(NEOX) == 36 * S * B * 64 + small


def test_fp32_keeps_twice_the_intermediate_values_but_not_the_casts():
    """In fp32 nothing is cast for the norms: they save their input and the normed value."""
    h, i, a, k = 64, 160, 4, 2
    norms = 2 * 12 * h  # the stream itself, normed, and scaled, 4 bytes each
    attention = 4 * (h + 2 * h * k // a + h)
    rest = 4 * (4 * i) + 2 * 4  # gate, silu, up, product; one number a row and norm
    assert kept(LLAMA, bytes_per_weight=4) == S * B * (norms + attention + rest) + 4 * a * B * S


def test_lora_on_all_linear_layers_keeps_more_than_full_training():
    """Adapters in fp32 over a 16-bit base save fp32 copies of their inputs."""
    wide = {
        **LLAMA,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    }
    names = architecture(wide).lora_targets("all-linear")
    sbh = S * B * 1024
    assert kept(wide) / sbh == pytest.approx(46.0, abs=0.1)
    adapted = kept(wide, trained=False, lora_r=16, targets=names)
    assert adapted / sbh == pytest.approx(67.8, abs=0.5)


def test_checkpointing_keeps_the_input_alone():
    p = PassConfig(B, S, bytes_per_weight=2, padded=False)
    row = trunk(architecture(LLAMA), p, checkpoint=True)
    assert row[-1].kept == 2 * S * B * 64


def test_every_third_layer_is_recomputed_the_first_ones_first():
    """Of seven layers 0, 3 and 6; transformers sets a flag on each."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = LLAMA | {"num_hidden_layers": 7}
    p = PassConfig(B, S, bytes_per_weight=2, padded=False)
    plain, recomputed = (trunk(architecture(config), p, checkpoint=n)[-1].kept for n in (0, 1))
    planned = trunk(architecture(config), p, checkpoint=3)[1:]
    kept = [segment.kept for segment in planned for _ in range(segment.times)]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    model.activation_checkpointing_enable(every_n_layers=3)
    flags = [layer.gradient_checkpointing for layer in model.model.layers]
    assert kept == [recomputed if flag else plain for flag in flags]
    assert sum(flags) == 3


def test_a_segment_gives_back_all_but_its_gradients():
    """After backward only the gradients of the weights are left: 3·h·h numbers here."""
    h, rows = 8, 5

    def write(tape, x):
        y = tape.pointwise(tape.linear(x, h, h, 4, trained=True))
        return tape.add(
            x, tape.linear(tape.linear(y, h, h, 4, trained=True), h, h, 4, trained=True)
        )

    one = written(PassConfig(1, rows), write, rows * h)
    assert one.gradients == 3 * h * h * 4
    # Kept: the input, the first product (pointwise saves it), the second's and third's inputs.
    assert one.kept == 4 * rows * h * 4
    assert one.forward.flops == 3 * 2 * rows * h * h
    assert one.backward.flops == 2 * one.forward.flops


def test_peaks_of_a_row_of_segments_by_hand():
    """Two layers that keep 10 and peak at 25 forward; backward 30 each with 4 of gradients."""
    from rlhf_lab.cost.memory import Segment

    layers = Segment(2, 10, (25, 0, 0), (28, 2, 0), 4)
    peak, where, live = forward_peak([layers], 100)
    assert (peak, live) == ((135, 0, 0), 120)
    # The last layer: 110 before it + 28 + 2; the first: 100 + 28 + 2, and 4 of the last.
    assert where == 0
    assert backward_peak([layers], 120) == ((138, 2, 0), 0)


def test_stores_live_as_long_as_they_are_held():
    tape = Tape(block=512)
    one = Store(tape, 1)
    two = Store(tape, 513, GRADIENT)
    assert (tape.live, tape.by_kind) == (1536, [512, 1024, 0])
    del one
    assert (tape.live, tape.peak) == (1024, 1536)
    del two
    assert tape.live == 0


@pytest.mark.parametrize("shared", [True, False])
def test_a_gradient_that_arrives_twice_is_summed_in_place_unless_shared(shared):
    """x + f(x): the residual's gradient is also the sum's own, so a new tensor is made."""
    tape = Tape()
    x = tape.new(100, 4, needs=True)
    y = tape.add(x, tape.pointwise(x)) if shared else tape.add(tape.mul(x), tape.mul(x))
    g = Store(tape, 400)
    del y
    tape.reset_peak()
    back = tape.undo(g)
    assert back.size == 400


@pytest.mark.parametrize("gpu", [False, True])
def test_dropout_in_front_of_adapters_keeps_what_it_drops(gpu):
    """A byte a number on a GPU, an fp32 factor on a CPU, for each of a layer's seven maps. What is
    left is kept too, apart for each map, where without dropout those that read the same keep it
    once, and the output map nothing: attention has kept its own result."""
    import torch

    h, i = 64, 160
    model = architecture(LLAMA)
    more = {"trained": False, "lora_r": 4, "targets": model.lora_targets("all-linear")}
    plain, dropping = (
        trunk(model, PassConfig(B, 512, gpu=gpu, padded=False, dropout=on, **more))[-1]
        for on in (False, True)
    )
    read = 3 * h + h + 2 * h + i  # by q, k and v; o; gate and up; down
    once = h + h + i  # by those that have something to keep
    kept = read * (1 if gpu else 4) + (read - once) * 4
    assert dropping.kept - plain.kept == B * 512 * kept
    saved = []
    x = torch.ones(8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        torch.nn.functional.dropout(x, 0.5)
    assert [t.nbytes for t in saved] == [8 * 4]
