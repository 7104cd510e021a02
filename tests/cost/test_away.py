"""What leaves the device between forward and backward, and kernels that are one where there were
many: against a real layer, and by hand.

pytest tests/cost/test_away.py
"""

import pytest
import torch
from functorch.compile import aot_module, min_cut_rematerialization_partition, nop
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import rlhf_lab as lab
from rlhf_lab.cost.architecture import architecture
from rlhf_lab.cost.layers import LayerRun, PassConfig
from rlhf_lab.cost.memory import LEAST, STASH, send_away, trunk
from rlhf_lab.cost.tape import Tape

B, S = 2, 64
SIZES = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "vocab_size": 300}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2}
BIG = {
    "hardware": "h100",
    "prompt_length": 1024,
    "response_length": 1024,
    "per_device_train_batch_size": 2,
    "dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def config():
    return LlamaConfig(**SIZES, **HEADS, attn_implementation="sdpa")


def really_sent(config, compiled=False):
    """Bytes that TRL's rule sends away of a real layer's saved tensors, and that it keeps."""
    layer = LlamaDecoderLayer(config, 0)
    forward = layer
    if compiled:  # saves what inductor would save, and runs as torch's operations
        forward = aot_module(layer, nop, partition_fn=min_cut_rematerialization_partition)
    x = torch.randn(B, S, config.hidden_size, requires_grad=True)
    positions = torch.arange(S)[None]
    turns = LlamaRotaryEmbedding(config)(x, positions)
    own = {p.untyped_storage().data_ptr() for p in (*layer.parameters(), *turns)}
    tracked, alive, number, away, stay = {}, [], 0, 0, 0

    def pack(t):
        nonlocal number, away, stay
        storage = t.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key in own:
            return t
        number += 1
        alive.append(t)  # a freed address would be taken for the same tensor
        if key in tracked and (tracked[key] is None or number - tracked[key] < STASH):
            stay += size * (tracked[key] is not None)
            tracked[key] = None
        elif size >= LEAST:
            tracked[key] = number
            away += size
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward(x, position_embeddings=turns, attention_mask=None)
    return away, stay


def test_a_compiled_layer_sends_all_away_and_gets_it_back_at_once(config):
    """It is one node of autograd, which saves no tensor twice in a row (the output of attention
    goes twice, as the view that a product reads and as attention's own: 6 % here)."""
    away, stay = really_sent(config, compiled=True)
    model = architecture(config.to_dict())
    how = PassConfig(B, S, padded=False, compiled=True)
    here, sent = (trunk(model, how._replace(away=where))[1] for where in ("", "all"))
    statistics = 2 * B * S * 4  # of the norms, too small to go
    assert stay == 0 and sent.kept == statistics
    assert sent.away == here.kept - statistics == pytest.approx(away, rel=0.07)
    assert sum(sent.back) >= sum(here.back) > sent.away


def test_compiling_does_not_undo_what_offloading_saves():
    whole = {**BIG, "dtype": "float32", "activation_offloading": True}
    for stage in ("sft", "dpo", "reward"):
        plain, fast = (
            lab.plan(stage, "Qwen/Qwen2.5-7B", **whole, torch_compile=on) for on in (False, True)
        )
        assert fast.peak <= plain.peak * 1.002  # a layer's tensors are back all at once


def test_what_is_sent_away_of_a_real_layer(config):
    away, stay = really_sent(config)
    model = architecture(config.to_dict())
    p = PassConfig(B, S, padded=False)
    tape = Tape()
    y = LayerRun(tape, model, model.layers[0], p).layer(tape.new(p.tokens * 128, 4, True))
    kept = tape.live
    sent = send_away(tape)
    assert sent == pytest.approx(away, rel=0.03)
    assert tape.live - y.store.size == pytest.approx(stay, rel=0.1)
    assert kept > tape.live > y.store.size


def test_inputs_of_recomputed_layers_wait_in_main_memory(config):
    model = architecture(config.to_dict())
    rows = {
        away: trunk(model, PassConfig(B, S, away=away), checkpoint=1)[1] for away in ("", "inputs")
    }
    size = B * S * 128 * 4
    assert (rows[""].kept, rows[""].away) == (size, 0)
    assert (rows["inputs"].kept, rows["inputs"].away) == (0, size)
    assert sum(rows["inputs"].back) == sum(rows[""].back)


def test_of_n_layers_one_is_recomputed(config):
    model = architecture(config.to_dict())
    _, *layers = trunk(model, PassConfig(B, S), checkpoint=2)
    recomputed = [x.times for x in layers if x.kept == B * S * 128 * 4]
    assert recomputed == [1, 1] and [x.times for x in layers] == [1, 1, 1]  # 0 and 2 of three


def test_ligers_kernels_by_hand(config):
    """A layer of Llama keeps: two inputs of norms and what they give, queries and the output of
    attention, keys and values, gate, up and their product."""
    model = architecture(config.to_dict())
    p = PassConfig(B, S, 2, gpu=True, padded=False, fused=True)
    layer = trunk(model, p)[1]
    numbers = 4 * 128 + 2 * 128 + 2 * 32 + 3 * 352
    statistics = 4 * (2 + 8)  # a number a row of the norms, one a row and head of attention
    assert layer.kept == pytest.approx(B * S * (2 * numbers + statistics), rel=1e-3)
    plain = trunk(model, PassConfig(B, S, 2, gpu=True, padded=False))[1]
    assert layer.kept < 0.75 * plain.kept
    assert layer.forward.called < 0.5 * plain.forward.called


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward", "kto"])
def test_memory_for_time(stage):
    def plan(**more):
        return lab.plan(stage, "meta-llama/Llama-3.1-8B", **BIG, **more).estimate

    def worst(e, *names):
        return max(f.total for f in e.phases if f.name in (names or ("forward", "backward")))

    def seconds(e):
        return sum(e.seconds_of.values())

    plain, sent = plan(), plan(activation_offloading=True)
    assert worst(sent) < worst(plan(use_liger_kernel=True)) < worst(plain)
    assert seconds(sent) > seconds(plain) > seconds(plan(use_liger_kernel=True))
    if stage in ("dpo", "kto"):  # whose trainers in TRL do not hand `offload` on
        return
    again, both = plan(gradient_checkpointing=True), {"gradient_checkpointing": True}
    both["activation_checkpointing_kwargs"] = {"offload": True}
    assert worst(plan(**both), "forward") < worst(again, "forward")
    assert seconds(plan(**both)) > seconds(again)


@pytest.mark.parametrize("name", ["activation_offloading", "use_liger_kernel"])
def test_a_cpu_has_no_device_to_leave(name):
    with pytest.raises(ValueError, match=f"{name}=True needs a GPU"):
        lab.plan("sft", "tiny", hardware="cpu", **{name: True}).estimate  # noqa: B018
