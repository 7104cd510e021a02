"""Sharded plans: against measured runs, and by hand (plain sense: `test_sharding_sense.py`).

pytest tests/cost/test_sharding.py

What was measured is in benchmarks/results/sharded.json (`benchmarks/sharded.py` runs it again).
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf_lab.cost.estimate import Estimate, estimate
from rlhf_lab.cost.hardware import hardware
from rlhf_lab.cost.seconds import (
    CPU_ADAM,
    HOOKS,
    OVERLAP,
    REACHED,
    RINGS,
    Sent,
    communication,
    with_sent,
)
from rlhf_lab.models.load import BUNDLED, load, presets

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "sharded.py"
GIB = 2**30
QWEN, LLAMA8 = "Qwen/Qwen2.5-7B", "meta-llama/Llama-3.1-8B"
LLAMA70 = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
SMALL = {
    "model_type": "llama",
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "vocab_size": 8192,
    "max_position_embeddings": 512,
}
NUMBERS = 20_453_760
SCHEMES = ("zero1", "zero2", "zero3", "fsdp2")
BASE = {
    "per_device_train_batch_size": 1,
    "prompt_length": 512,
    "response_length": 512,
    "gradient_checkpointing": True,
    "rows": 20_000,
}


def plan(stage: str = "sft", model: str | dict = LLAMA8, device: str = "h100", **more) -> Estimate:
    config = model if isinstance(model, dict) else presets()[model]
    return estimate(stage, config, device, {**BASE, **more})


def part(e: Estimate, component: str, phase: str) -> float:
    return sum(
        size
        for f in e.phases
        if f.name == phase
        for (_, name), size in f.bytes.items()
        if name == component
    )


# ----------------------------------------------------------------------------------------- measured


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("sharded", BENCHMARK)
    module = sys.modules["sharded"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["sharded"]


def test_plans_are_as_near_to_what_was_measured_as_is_promised(benchmark):
    """Every case that the benchmark has run, planned anew."""
    measured = {row["case"]: row for row in json.loads(benchmark.RESULTS.read_text())["rows"]}
    missed, figures = [], 0
    for case in benchmark.cases():
        if not (row := measured.get(benchmark.name(case))):
            continue
        for name, x in benchmark.compared(benchmark.planned(case), row["measured"]).items():
            target = benchmark.TARGETS[name if name in ("peak", "sent") else "components"]
            figures += 1
            if abs(x["error"]) > target:
                missed.append((row["case"], name, x))
    assert figures > 100 and not missed


MB = 1e6


@pytest.mark.parametrize(
    ("sharding", "bf16", "gpus", "parameters", "states", "gradients", "bucket"),
    [
        ("zero1", False, 2, 81.8, 122.7, 41.5, 2000),
        ("zero2", False, 2, 81.8, 122.7, 41.5, 2000),
        ("zero3", False, 2, 40.9, 122.7, 40.9, 2000),
        ("zero2", False, 4, 81.8, 61.4, 20.84, 2000),
        ("zero1", True, 2, 40.9, 122.7, 20.8, 1000),
        ("zero2", True, 2, 40.9, 122.7, 20.8, 1000),
        ("zero3", True, 2, 20.5, 122.7, 20.5, 1000),
        ("zero3", True, 4, 10.2, 61.4, 10.2, 1000),
        ("fsdp2", False, 2, 40.9, 81.8, 40.9, 0),
    ],
)
def test_a_llama_of_twenty_million(sharding, bf16, gpus, parameters, states, gradients, bucket):
    """Megabytes that an independent measurement found on each rank (DeepSpeed 0.19.8, torch's
    `fully_shard`); its optimizer had one group, so its parts of the model are cut elsewhere."""
    settings = {"sharding": sharding, "gpus": gpus, "bf16": bf16, "loss": "plain"}
    e = plan(model=SMALL, device="laptop", prompt_length=0, response_length=64, **settings)
    assert part(e, "parameters", "backward") == pytest.approx(parameters * MB, rel=0.005)
    assert part(e, "optimizer", "backward") == pytest.approx(states * MB, rel=0.005)
    assert part(e, "gradients", "optimizer") == pytest.approx(gradients * MB, rel=0.02)
    there = part(e, "communication", "optimizer")
    assert there == (bucket * MB if sharding == "zero3" else 0)
    if sharding in ("zero1", "zero2"):  # ZeRO-1 has all gradients; what is summed is copied
        found = part(e, "communication", "backward") + part(e, "gradients", "backward")
        assert found == pytest.approx(bucket * MB + NUMBERS * (2 if bf16 else 4), rel=0.005)


def test_fsdp2_keeps_the_tables_whole_as_measured():
    """25.2 MB between forward and backward where embedding and head are one unit with the root."""
    lengths = {"prompt_length": 0, "response_length": 400, "loss": "plain"}
    one, apart = (
        plan(model=SMALL, device="laptop", sharding="fsdp2", gpus=2, fsdp_units=units, **lengths)
        for units in ("root", "accelerate")
    )
    tables = 2 * 8192 * 384 * 4
    layer = 4 * 384 * 384 + 3 * 384 * 1024 + 2 * 384
    assert tables == pytest.approx(25.2 * MB, rel=0.002)
    # In forward at the head: both tables, and the buffer that the last layer came in.
    assert part(one, "communication", "forward") == tables + 384 * 4 + 4 * layer
    # Apart: the head, and its own buffer.
    assert part(apart, "communication", "forward") == tables + 2 * 384 * 4


# ------------------------------------------------------------------------------------------ by hand


def test_70b_on_64_gpus_fits():
    """2 layers of 0.86 billion in 16 bits are whole, not 70 billion; states are 16 bytes / 64."""
    lengths = {"prompt_length": 2048, "response_length": 2048, "gpus": 64, "nodes": 8}
    e = plan(model=LLAMA70, sharding="fsdp2", **lengths)
    assert e.fits and e.peak < 30 * GIB
    assert part(e, "parameters", "backward") == pytest.approx(4 * 70_553_706_496 / 64)
    assert part(e, "communication", "backward") < 2 * (2 * 128256 * 8192 + 2 * 855_638_016) * 1.01
    # transformers' Trainer scatters no gradients before the last micro-batch of a step.
    whole = plan(model=LLAMA70, sharding="fsdp2", gradient_accumulation_steps=4, **lengths)
    assert part(whole, "gradients", "forward") == pytest.approx(2 * 70_553_706_496)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ppo_shards_gradients_with_and_without_accumulation(accumulation):
    """Two models of 7 billion, 2 bytes, 8 devices: 3.4 GiB."""
    batch = {"per_device_train_batch_size": 4 // accumulation, "gpus": 8, "sharding": "zero3"}
    e = plan("ppo", QWEN, **batch, gradient_accumulation_steps=accumulation)
    both = 2 * (7_615_616_512 + 7_070_622_720) / 8
    assert part(e, "gradients", "optimizer") == pytest.approx(both, rel=0.01)
    assert part(e, "gradients", "forward") == pytest.approx(both, rel=0.01)
    assert part(e, "gradients", "backward") < 1.4 * both, "and one matrix on its way"


@pytest.mark.parametrize(
    ("gpus", "nodes", "speed"),
    [(8, 1, 450 * REACHED), (16, 2, 50 * 8 * RINGS), (2, 2, 50 * REACHED)],
)
def test_a_ring_is_as_fast_as_its_slowest_piece(gpus, nodes, speed):
    """In a node the link; between nodes a ring for each device's card, or the one that is there."""
    s = plan("sft", QWEN, gpus=gpus, nodes=nodes, sharding="fsdp2").setup
    seconds = communication(s, hardware("h100"), Sent(all_gather=1e12))
    assert seconds == pytest.approx(1000 / speed * (gpus - 1) / gpus)


def test_sampling_pays_for_weights_that_are_shared_out():
    """ZeRO-3 gathers all of them once and has them whole; or a part at a time, for every token."""
    common = {"gpus": 16, "sharding": "zero3", "per_device_train_batch_size": 4}
    weights = 2 * 7_615_616_512
    once, per_token = (
        plan("ppo", QWEN, **common, nodes=2, ds3_gather_for_generation=g) for g in (True, False)
    )
    assert part(once, "communication", "rollout") == pytest.approx(weights + 1e9, rel=1e-3)
    assert once.phases[0].sent.all_gather == pytest.approx(weights, rel=1e-4)
    assert per_token.phases[0].sent.all_gather == pytest.approx(512 * weights, rel=1e-4)
    assert part(per_token, "communication", "rollout") < 5e9
    network = 512 * weights * 15 / 16 / (hardware("h100").network * 8 * RINGS)
    hooks = 512 * (28 * (7 + 2) + 2) * HOOKS
    spent = per_token.seconds_of["rollout", "policy"]
    assert network + hooks < spent < 1.1 * (network + hooks), "and computing slows it a little"
    near, far = (
        plan("ppo", QWEN, **common, nodes=n).seconds_of["rollout", "policy"] for n in (1, 2)
    )
    assert near < far < near + 2.1 * weights / hardware("h100").network
    shared_out = {**common, "sharding": "fsdp2"}
    fsdp2 = plan("ppo", QWEN, **shared_out, ds3_gather_for_generation=False)
    table = 2 * 152064 * 3584  # embeddings or head; those of both trained models are one unit
    expected = 512 * (weights - 2 * table) + 3 * table
    assert fsdp2.phases[0].sent.all_gather == pytest.approx(expected, rel=1e-4)
    assert part(fsdp2, "communication", "rollout") < 5e9
    fsdp2 = plan("ppo", QWEN, **shared_out)
    assert fsdp2.phases[0].sent.all_gather == pytest.approx(weights + table, rel=1e-4)
    assert part(fsdp2, "communication", "rollout") > weights


@pytest.mark.parametrize("layout", ["four", "shared"])
def test_ppo_under_fsdp2_gathers_embeddings_and_heads_once_a_phase(layout):
    """Chunks of a phase share them, and each gathers the layers (`FullyShard.passes`)."""
    common = {"gpus": 4, "sharding": "fsdp2", "layout": layout, "gradient_accumulation_steps": 8}
    e = plan("ppo", QWEN, **common, local_rollout_forward_batch_size=2)
    table = 2 * 152064 * 3584
    layers = 2 * 7_615_616_512 - 2 * table
    roots = {"old_logprobs": 3, "reference": 2, "value": 3, "score": 1}
    if layout == "shared":  # one trunk: its values come with its log-probabilities
        roots = {"old_logprobs": 2, "reference": 2, "score": 1}
    sent = {f.name: (f.times, f.sent.all_gather) for f in e.phases if f.name in roots}
    assert sent.keys() == roots.keys()
    for name, (chunks, gathered) in sent.items():
        assert chunks > 1
        assert gathered == pytest.approx(chunks * layers + roots[name] * table, rel=1e-4), name


def test_ppo_under_ddp_sums_gradients_in_every_step():
    """Of policy and value model, in each of the minibatches of every epoch."""
    how = {"gpus": 2, "sharding": "ddp", "num_ppo_epochs": 3, "num_mini_batches": 2}
    sent = {f.name: f.sent for f in plan("ppo", QWEN, **how, gradient_accumulation_steps=4).phases}
    value = 7_615_616_512 - 152064 * 3584 + 3584
    both = 7_615_616_512 + value
    assert sent["backward"].all_reduce == pytest.approx(3 * 2 * 4 * both, rel=1e-4)


def test_each_scheme_sends_what_it_sends_in_a_pass_or_in_a_step():
    """Llama-3.1-8B in 16 bits, 4 passes a step: (all-reduce, all-gather, reduce-scatter)."""
    numbers = 8_030_261_248
    kept = 1_000_000_000  # ZeRO-3 has them from forward to backward
    norms = 65 * 4096  # gathered once a step
    head = 128256 * 4096 + 4096
    expected = {
        "zero1": (1, 1, 0),
        "zero2": (4, 1, 0),
        "zero3": (0, 4 * (2 - kept / numbers) - 3 * norms / numbers, 4),
        "fsdp2": (0, 4 * (2 - head / numbers), 1),
        "ddp": (2, 0, 0),  # in the 32 bits of its gradients
    }
    for sharding, times in expected.items():
        e = plan(gpus=16, nodes=2, sharding=sharding, gradient_accumulation_steps=4)
        sent = [
            sum(getattr(f.sent, kind) for f in e.phases)
            for kind in ("all_reduce", "all_gather", "reduce_scatter")
        ]
        assert sent == pytest.approx([2 * numbers * x for x in times], rel=1e-6), sharding
    assert Sent(3, 5, 7).bytes(4) == (6 + 5 + 7) * 3 / 4


def test_offload_moves_states_and_takes_time():
    """Gradients go down in fp32, weights come up in 16 bits; CPUs update 4.5 billion a second."""
    common = {"gpus": 8, "sharding": "zero3", "device": "rtx4090"}
    none, states, everything = (plan(**common, offload=x) for x in ("none", "optimizer", "all"))
    assert none.peak > states.peak > everything.peak
    assert none.step_seconds < states.step_seconds < everything.step_seconds
    mine = 8_030_261_248 / 8
    moved = mine * (4 + 2) / hardware("rtx4090").host + 8 * mine / CPU_ADAM
    assert states.seconds_of["optimizer", "policy"] == pytest.approx(moved, rel=0.01)
    assert part(states, "gradients", "optimizer") == part(states, "optimizer", "forward") == 0
    assert part(everything, "parameters", "forward") == 0


def test_offload_says_what_it_takes_of_main_memory():
    """DeepSpeed in 16 bits: an fp32 copy, its gradients and two moments (16), a buffer (2), and
    with `all` the weights (2); its own rule of thumb has 16 and 18 (stage3.py,
    `estimate_zero3_model_states_mem_needs`). FSDP2: everything as wide as the weights."""
    numbers, common = 8_030_261_248, {"gpus": 8, "device": "h100"}
    for sharding, what, each in (
        ("zero2", "optimizer", 18),
        ("zero3", "optimizer", 18),
        ("zero3", "all", 20),
        ("fsdp2", "all", 4 * 4),
    ):
        e = plan(**common, sharding=sharding, offload=what)
        largest = 8 * 128256 * 4096 * 2 * (sharding == "zero2")
        assert e.main_memory == pytest.approx(each * numbers + largest, rel=1e-6), sharding
        assert e.fits and any("of main memory a machine; not checked" in x for x in e.caveats)
        has = replace(e, hardware=e.hardware.with_(main_memory=e.main_memory - 1))
        assert not has.fits and any("H100" in x for x in has.caveats)
    halves = plan(gpus=16, nodes=2, device="h100", sharding="zero3", offload="all")
    assert halves.main_memory == pytest.approx(10 * numbers, rel=1e-6)
    assert plan(**common, sharding="zero3").main_memory == 0
    policy = {**common, "stage": "ppo", "sharding": "zero3", "offload": "all"}
    assert plan(**policy).main_memory == pytest.approx((20 + 20 + 2 + 2) * numbers, rel=0.07)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"offload": "all"}, "needs a sharding that can do it, and sharding='none' cannot"),
        ({"offload": "optimizer", "gpus": 2}, "sharding='ddp' cannot: choose zero1, zero2, zero3"),
        ({"offload": "all", "gpus": 2, "sharding": "zero2"}, "zero2 keeps weights whole"),
        ({"offload": "optimizer", "gpus": 2, "sharding": "fsdp2"}, "choose offload='all'"),
        (
            {"offload": "all", "gpus": 2, "sharding": "zero3", "device": "laptop"},
            "where a CPU has them already",
        ),
        ({"fsdp_units": "layers", "gpus": 2}, "fsdp_units='layers'"),
        ({"reduce_bucket_size": 0}, "reduce_bucket_size must be a whole number of at least 1"),
    ],
)
def test_what_nothing_does_is_refused_in_one_line(more, line):
    with pytest.raises(ValueError) as error:
        plan(model=SMALL, prompt_length=8, response_length=8, **more)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_paged_states_leave_the_gpu_where_there_is_no_room():
    """Of the states only those of small tensors and scales stay; they come and go over the bus."""
    common = {"dtype": "bfloat16", "model": LLAMA8}
    stay, paged = (
        plan(device="h100", optim=x, **common) for x in ("adamw_bnb_8bit", "paged_adamw_8bit")
    )
    tables = 128256 * 4096
    # 32 bits for the embedding and 65 norms of 4096; 8 bits and scales for the rest.
    states = 8 * (tables + 65 * 4096) + (8_030_261_248 - tables - 65 * 4096) * (2 + 8 / 256)
    assert part(stay, "optimizer", "optimizer") == pytest.approx(states, rel=1e-6)
    left = 8 * 65 * 4096 + (8_030_261_248 - tables - 65 * 4096) * 8 / 256
    assert part(paged, "optimizer", "optimizer") == pytest.approx(left, rel=1e-6)
    assert stay.seconds_of == paged.seconds_of, "there is room for all of them"
    tight = plan(device="a100-40", optim="paged_adamw_32bit", **common)
    states = 8 * (8_030_261_248 - 65 * 4096)
    missing = min(states, states + tight.peak - tight.hardware.memory)
    assert missing > 0
    without = plan(device="h100", optim="paged_adamw_32bit", **common)
    assert tight.seconds_of["optimizer", "policy"] > 2 * missing / tight.hardware.host
    assert without.seconds_of["optimizer", "policy"] < 1


@pytest.mark.parametrize("name", BUNDLED)
def test_eight_bit_states_of_embeddings_have_32_bits(name):
    """Bytes of bitsandbytes' real state after a step of a bundled model, as transformers' Trainer
    makes it, less two code books that all tensors share."""
    optim = pytest.importorskip("bitsandbytes").optim
    model = load(name).base
    optimizer = optim.AdamW8bit(model.parameters())
    whole = {"optim_bits": 32}
    overrides = optim.GlobalOptimManager.get_instance()
    overrides.register_module_override(model.get_input_embeddings(), "weight", whole)
    ids = torch.arange(5, 45)[None]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    tensors = [
        x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)
    ]
    measured = sum({x.data_ptr(): x.nbytes for x in tensors}.values())
    e = estimate("sft", load(name).config_dict(), "laptop", {"optim": "adamw_bnb_8bit"})
    assert part(e, "optimizer", "optimizer") == measured - 2 * 256 * 4


@pytest.mark.parametrize("k", [2, 4, 8])
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_tensor_parallel_training_shares_out_everything(stage, k):
    """Weights, gradients and states within 2 % of 1/k, the same arithmetic in all, and two sums a
    layer and pass over the devices."""
    common = {"gpus": 8, "sharding": "ddp", "gradient_checkpointing": False}
    one, shared = plan(stage, **common), plan(stage, **common, tensor_parallel=k)
    for name in ("parameters", "gradients", "optimizer"):
        whole, mine = (part(e, name, "optimizer") for e in (one, shared))
        assert mine == pytest.approx(whole / k, rel=0.02)
    assert shared.flops == pytest.approx(one.flops, rel=0.02)
    backward = next(f for f in shared.phases if f.name == "backward")
    assert backward.sums == (2 * 4096 * backward.tokens, 2 * 32 + 1)
    assert shared.seconds_of["forward", "policy"] < one.seconds_of["forward", "policy"]


def test_experts_are_gathered_whole():
    """A layer of a mixture is one unit with all its experts, though a token passes two of them."""
    mixture = {**SMALL, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    e = plan(model=mixture, gpus=2, sharding="fsdp2", prompt_length=8, response_length=8)
    expert = 3 * 384 * 1024
    layer = 8 * expert + 8 * 384 + 4 * 384 * 384 + 2 * 384
    assert part(e, "communication", "backward") >= 2 * 2 * layer, "used, and the next one"
    assert part(e, "gradients", "backward") >= 2 * 8 * expert, "one layer's, before they leave"


def test_what_is_sent_meanwhile_slows_computing():
    """The longer of both, and of the shorter one as much as computing is slower."""
    s = plan("sft", QWEN, gpus=8, sharding="fsdp2").setup
    hw, sent = hardware("h100"), Sent(all_gather=1e12)
    alone = communication(s, hw, sent)
    for busy in (alone / 2, 3 * alone):
        spent = with_sent(s, hw, sent, busy, 1, 0.0)
        assert spent == pytest.approx(max(busy, alone) + OVERLAP * min(busy, alone))
    assert with_sent(s, hw, Sent(), 2.0, 1, 0.0) == 2.0
