"""The list of published figures: its schema, its halves, and whether its numbers can be true.

pytest tests/test_published_figures.py

The list was typed off tables, so what it says is held against physics and against arithmetic that
the sources print beside their rates: no rate above what the chips can do, no peak below the
weights.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_lab.cost.architecture import architecture
from rlhf_lab.cost.estimate import estimate
from rlhf_lab.models.load import presets

FOLDER = Path(__file__).parents[1] / "benchmarks"
LLAMA2, FLAGS = "meta-llama/Llama-2-7b-hf", "torchtune-flags/packed/memory"
TERA = 1e12
# Dense products of one device and bytes a second of its memory, from data sheets; twice for FP8.
PEAKS = {
    "a100": (312, 2039),
    "a800": (312, 2039),
    "h100": (989, 3350),
    "h200": (989, 4800),
    "v100": (125, 900),
    "rtx4090": (330, 1008),
    "a6000": (155, 768),
    "l40s": (362, 864),
    "mi250x": (191, 1638),
}
TOO_FAST = ("torchtune-models/8b-lora-a6000/throughput",)
"""The source names a card that could hardly do it; the list's note says so."""


@pytest.fixture(scope="module")
def bench():
    """(published_figures, published_plans)."""
    path = sys.path[:]
    sys.path.insert(0, str(FOLDER))
    import published_figures
    import published_plans

    yield published_figures, published_plans
    sys.path[:] = path
    for name in ("published_figures", "published_calls", "published_plans"):
        del sys.modules[name]


@pytest.fixture(scope="module")
def figures(bench):
    return bench[0].load()


def named(figures, name):
    return next(f for f in figures if f.id == name)


def stated(bench, figure):
    """Parameters of its model, or None: of mixtures those that a token meets."""
    config = bench[1].model_config(figure.model, figure.complete.get("sequence"))
    return (
        architecture(config).parameters()
        if config and "num_experts_per_tok" not in config
        else None
    )


# --------------------------------------------------------------------------------------- the schema


def test_there_are_enough_of_each_kind_in_each_half(bench, figures):
    by = bench[0].counts(figures)
    assert len(figures) >= 60
    assert set(by) == {(k, h) for k in bench[0].KINDS for h in bench[0].HALVES}
    assert min(by.values()) >= 15
    assert len({f.source["address"] for f in figures}) >= 30


def test_every_entry_is_complete(bench, figures):
    assert [(f.id, line) for f in figures for line in bench[0].faults(f)] == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"unit": "tokens"}, "unit 'tokens' of memory"),
        ({"value": 0}, "value 0"),
        ({"stage": "tuning"}, "stage 'tuning'"),
        ({"meter": None}, "no meter"),
        ({"bytes_per_unit": 1024}, "bytes_per_unit 1024"),
        ({"software": ""}, "no software"),
        ({"hardware": {"name": "a100-80", "gpus": 1}}, "hardware without nodes"),
        ({"config": {"batch_size": 2}}, "config: batch_size=2"),
        ({"config": {"micro_batch": True}}, "config: micro_batch=True"),
        ({"assumed": {"optimizer": "adam"}}, "assumed: optimizer='adam'"),
        ({"source": {"title": "t", "address": "a", "says": "s"}}, "source without date"),
    ],
)
def test_what_is_wrong_with_an_entry_is_named(bench, figures, change, fault):
    assert list(bench[0].faults(replace(named(figures, FLAGS), **change))) == [fault]


def test_no_figure_is_there_twice(figures):
    assert max(Counter(f.id for f in figures).values()) == 1
    runs = Counter((f.kind, f.source["address"], f.canonical) for f in figures)
    assert [k for k, n in runs.items() if n > 1] == []


def test_every_source_and_model_of_the_tables_is_used(bench, figures):
    tables = bench[0].tables()
    assert {g["source"] for g in tables["groups"]} == set(tables["sources"])
    used = {f.model for f in figures}
    likes = {m["like"] for m in tables["models"].values() if "like" in m}
    assert set(tables["models"]) <= used | likes
    assert used - set(tables["models"]) <= set(presets())


# --------------------------------------------------------------------------------------- the halves


def test_the_digest_is_of_address_and_configuration(figures):
    """Written out by hand for one figure; the literal digests hold the split still."""
    text = (
        "https://github.com/pytorch/torchtune/blob/main/README.md#optimization-flags\n"
        '{"config":{"accumulation":1,"checkpointing":"none","compile":false,"loss":"plain",'
        '"micro_batch":2,"optimizer":"adamw","packed":true,"precision":"bf16","sequence":4096},'
        '"hardware":{"gpus":1,"name":"a100-80","nodes":1},"model":"meta-llama/Llama-3.2-3B",'
        '"stage":"sft"}'
    )
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert named(figures, FLAGS).digest == digest
    assert named(figures, FLAGS).half == ("locked" if int(digest[-1], 16) % 2 else "open")


HELD = {
    "torchtune-flags/packed/memory": "c2683a07a8bad57d",
    "ds-chat-ppo/peak/memory": "47b065d2c62910ce",
    "llm-foundry/a100-80-7b-2048-8/throughput": "bace400bd6e08a55",
    "llama2-card/7b/hours": "749e5543fa0227ce",
}


@pytest.mark.parametrize("name", HELD)
def test_the_halves_do_not_move(figures, name):
    assert named(figures, name).digest[:16] == HELD[name]


def test_only_source_and_configuration_decide(figures):
    f = named(figures, FLAGS)
    for change in ({"value": 1.0}, {"assumed": {}}, {"note": "late"}, {"unit": "GB"}):
        assert replace(f, **change).digest == f.digest
    assert replace(f, config={**f.config, "micro_batch": 4}).digest != f.digest
    assert replace(f, source={**f.source, "address": "elsewhere"}).digest != f.digest


def test_numbers_of_one_run_are_in_one_half(figures):
    halves: dict[str, set[str]] = {}
    for f in figures:
        halves.setdefault(f.source["address"] + f.canonical, set()).add(f.half)
    assert {len(h) for h in halves.values()} == {1}


# --------------------------------------------------------------------------- whether it can be true


def test_no_training_is_faster_than_the_chip(bench, figures):
    """6 FLOPs a parameter and token (4 with frozen weights) stay below 85 % of the peak."""
    checked = 0
    for f in figures:
        n, peak = stated(bench, f), PEAKS.get(str(f.hardware["name"]).split("-")[0])
        if f.kind != "throughput" or n is None or peak is None or f.stage not in bench[1].TRAINING:
            continue
        c = f.complete
        tokens = {"tokens/s/GPU": f.value, "tokens/s": f.value / f.hardware["gpus"]}.get(f.unit)
        if f.unit == "s" and "accumulation" in c and "sequence" in c:
            tokens = c["micro_batch"] * c["accumulation"] * c["sequence"] / f.value
        if tokens is None:
            continue
        double = 2 if c.get("precision") == "fp8-amp" else 1
        share = tokens * (4 if "lora" in c else 6) * n / (peak[0] * TERA * double)
        assert 0.005 < share < (1 if f.id in TOO_FAST else 0.85), (f.id, share)
        checked += 1
    assert checked > 100


def test_no_decoding_is_faster_than_the_memory(bench, figures):
    """Every token of batch 1 reads the weights once; quantised ones are at least half a byte."""
    checked = 0
    for f in figures:
        n, peak = stated(bench, f), PEAKS.get(str(f.hardware["name"]).split("-")[0])
        if f.kind != "throughput" or f.stage != "decode" or n is None or peak is None:
            continue
        q = str(f.complete.get("quantisation", ""))
        width = 2 if not q else 1 if q == "int8" else 0.5
        read = f.value / f.complete["batch"] * n * width
        assert read < peak[1] * 1e9 * f.hardware["gpus"], f.id
        checked += 1
    assert checked > 40


def test_no_peak_is_below_the_weights_or_above_the_card(bench, figures):
    room = {"a100-40": 40, "a100-80": 80, "h100": 80, "h200": 141, "v100": 32, "l40s": 48}
    room |= {"rtx4090": 24, "rtx3090-280w": 24, "a6000": 48, "h100-96-hbm2e-500w": 96}
    checked = 0
    for f in figures:
        n = stated(bench, f)
        if f.in_bytes is None or n is None:
            continue
        c, everywhere = f.complete, "all GPUs" in f.meter
        sharded = c.get("sharding") in ("fsdp", "zero3") and c.get("offload", "none") == "none"
        devices = f.hardware["gpus"] if sharded and not everywhere else 1
        width = 0.5 if "quantisation" in c else 2
        if c.get("offload") == "all":
            width = 0
        devices *= c.get("tensor_parallel", 1)
        assert f.in_bytes > 0.85 * n * width / devices, f.id
        if f.hardware["name"] in room:
            cards = f.hardware["gpus"] if everywhere else 1
            assert f.in_bytes < room[f.hardware["name"]] * 2**30 * cards, f.id
        checked += 1
    assert checked > 120


@pytest.mark.parametrize(
    ("name", "mfu"),
    [
        ("a100-80-7b-2048-8", 64.23),
        ("a100-80-7b-65536-8", 46.97),
        ("a100-80-7b-1024-8", 58.01),
        ("a100-80-70b-2048-64", 53.33),
        ("a100-80-125m-2048-8", 44.79),
        ("h100-30b-2048-32", 43.92),
        ("h100-1b-2048-8", 41.82),
        ("h100-3b-2048-16", 43.73),
        ("a100-40-13b-2048-32", 52.62),
        ("a100-40-70b-2048-64", 35.87),
    ],
)
def test_llm_foundry_prints_the_same_mfu(bench, figures, name, mfu):
    """Its formula: (6 N + 12 L d T) × tokens a second ÷ peak, in the table beside the rate."""
    f = named(figures, f"llm-foundry/{name}/throughput")
    config = bench[1].model_config(f.model, f.config["sequence"])
    n, shape = architecture(config).parameters(), config["n_layer"] * config["n_embd"]
    flops = 6 * n + 12 * shape * f.config["sequence"]
    peak = 312e12 if "a100" in name else 989.4e12
    assert 100 * f.value * flops / peak == pytest.approx(mfu, rel=0.01)


def test_fms_rows_are_of_4096_tokens(figures):
    """Peak memory of full tuning in bf16 is five times the weights: gradients, two moments, and one
    more in the optimizer's step (torch's for-each form)."""
    for name, gpus in (("1-4", 1), ("2-2", 2), ("1-8", 1), ("2-4", 2)):
        f = named(figures, f"fms-full/{name}/memory")
        assert f.value == pytest.approx(5 * 2 * 7_241_732_096 / gpus, rel=0.001)


def test_units_of_time(figures):
    assert named(figures, "ds-chat-hours/1xv100-opt-1.3b/hours").in_hours == 1.8 * 24
    assert named(figures, "fsdp-qlora/3090-7b-b4/hours").in_hours == pytest.approx(998 / 3600)
    assert named(figures, "litgpt-lora/llama2-7b-1/memory").in_bytes == pytest.approx(21.3e9)
    assert named(figures, "ds-chat-sft/opt-1.3b/memory").in_bytes == pytest.approx(22.95 * 2**30)
    assert named(figures, "vllm-2031/llama2-7b/memory").in_bytes is None


# ---------------------------------------------------------------------------------- today's planner


def test_a_figure_becomes_the_plan_that_says_the_same(bench, figures):
    plans = bench[1]
    c = plans.call(named(figures, FLAGS))
    by_hand = estimate(
        "sft",
        presets()["meta-llama/Llama-3.2-3B"],
        "a100-80",
        dict(
            dtype="bfloat16",
            per_device_train_batch_size=2,
            prompt_length=0,
            response_length=4096,
            padded=False,
            loss="plain",
            optim="adamw_torch_fused",
            attn_implementation="flash_attention_2",
        ),
    )
    assert c.missing == c.nearly == []
    assert c.plan().peak == by_hand.peak
    assert plans.predicted(named(figures, FLAGS), by_hand) == by_hand.peak / 2**30
    rate = named(figures, "torchtune-flags/packed/throughput")
    assert plans.predicted(rate, by_hand) == pytest.approx(2 * 4096 / by_hand.step_seconds)


@pytest.mark.parametrize(
    ("name", "missing", "nearly"),
    [
        (
            "torchtune-flags/compile/memory",
            [],
            ["what a compiler fuses as Liger's kernels"],
        ),
        ("torchtitan-h100/8b-8-fp8/throughput", ["precision fp8-amp"], None),
        ("gpt-fast/7b-int8/throughput", [], ["compiled code as an engine"]),
        ("trt-llm/llama-3.1-8b-instruct-h100-128-128/throughput", [], None),
        ("ds-chat-hours/8xa100-80-opt-13b/hours", ["micro-batch"], []),
        ("peft-metamath/full/throughput", ["average length"], []),
        ("litgpt-lora/llama2-7b-fsdp2-1/memory", ["doubt: the peak is that of loading"], None),
        ("smollm2/1.7b/hours", ["how it was run: its micro-batch and sharding"], []),
    ],
)
def test_what_a_plan_leaves_out_is_listed(bench, figures, name, missing, nearly):
    c = bench[1].call(named(figures, name))
    for found, wanted in ((c.missing, missing), (c.nearly, nearly)):
        if wanted == []:
            assert found == [] or found[0].startswith(("a100-80-330w", "hardware"))
        assert all(any(x.startswith(w) for x in found) for w in wanted or ())


def test_what_a_figure_says_reaches_the_plan(bench, figures):
    """Optimizer steps in backward, losses in chunks, offloaded activations, fused steps."""
    c = bench[1].call(named(figures, "torchtune-flags/offloaded-activations/memory"))
    said = {
        "optimizer_in_backward": True,
        "activation_offloading": True,
        "gradient_checkpointing": True,
        "loss": "chunked",
        "optim": "adamw_torch_fused",
        "use_liger_kernel": True,
    }
    assert said.items() <= c.settings.items()
    assert c.plan().setup.optimizer_in_backward
    upcast = bench[1].call(named(figures, "fms-qlora/mistral-upcast-1-4/memory")).settings
    assert (upcast["dtype"], upcast["bf16"], upcast["load_in_4bit"]) == ("float32", True, True)
    wide = bench[1].call(named(figures, "fms-liger/full-4-4-liger/memory")).settings
    assert wide["bf16"] and "dtype" not in wide and wide["fsdp_units"] == "root"


def test_every_large_miss_of_the_open_half_is_explained(bench, figures):
    rows = [bench[1].compare(f) for f in figures if f.half == "open"]
    large = [r for r in rows if r.why]
    assert [r.figure.id for r in large if r.why == "not known"] == []
    named_ids = [f"{f.id}" for f in figures if f.half == "open"]
    for kind, lines in bench[1].MISSES.items():
        for prefix in lines:
            assert any(i.startswith(prefix) and i.endswith(kind) for i in named_ids), prefix


def test_every_figure_is_planned_or_says_why_not(bench, figures):
    for f in figures:
        row = bench[1].compare(f)
        assert row.ratio is None or row.ratio > 0, f.id
        assert row.ratio is not None or row.missing, f.id


def test_the_file_is_the_list_that_is_loaded(bench, figures):
    raw = json.loads((FOLDER / "published_figures.json").read_text(encoding="utf-8"))
    rows = [r for g in raw["groups"] for r in g["rows"]]
    assert len(figures) == sum(k in r for r in rows for k in bench[0].KINDS)
