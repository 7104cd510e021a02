"""Layers that attend within a window: what they keep, against transformers' own cache.

pytest tests/cost/test_windows.py
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from rlhf_lab.cost.architecture import architecture
from rlhf_lab.cost.estimate import Estimate, estimate
from rlhf_lab.cost.families import FAMILIES
from rlhf_lab.cost.serving import request_bytes
from rlhf_lab.models.names import presets, same_sizes
from rlhf_lab.simulate.step import simulate_step

WINDOW, ROWS = 16, 3
SIZES: dict[str, object] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 1),
}
FAR = {**SIZES, "sliding_window": WINDOW}
SWITCHED = {**FAR, "use_sliding_window": True, "max_window_layers": 3}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "llama": (SIZES, 0),
    "mistral": (FAR, 7),
    "gemma3_text": ({**FAR, "sliding_window_pattern": 3}, 5),
    "gpt_oss": ({**FAR, **EXPERTS}, 4),
    "qwen2": (SWITCHED, 4),
    "granite_swa": (FAR, 5),  # read off the model
}
"""A config, and how many of its seven layers have the window."""


def inference(config: dict[str, object], device: str = "h100", **settings: object) -> Estimate:
    return estimate("inference", config, device, {"dtype": "bfloat16", **settings})


def cache_bytes(e: Estimate, phase: str) -> float:
    return e.ledger.total(quantity="bytes", component="kv_cache", phase=phase)


def held(cache: DynamicCache) -> int:
    """Bytes of the memory behind the keys and values, of which the tensors may be a view."""
    tensors = (t for layer in cache.layers for t in (layer.keys, layer.values))
    return sum(t.untyped_storage().nbytes() for t in tensors)


@pytest.mark.parametrize("prompt, response", [(5, 6), (12, 9), (40, 5)])
@pytest.mark.parametrize("family", MODELS)
def test_the_cache_is_as_large_as_transformers_own(family: str, prompt: int, response: int) -> None:
    fields, windowed = MODELS[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields)).bfloat16()
    ids = torch.randint(2, 60, (ROWS, prompt))
    settings = {"max_new_tokens": response, "min_new_tokens": response, "do_sample": False}
    settings |= {"return_dict_in_generate": True, "eos_token_id": None}
    full = torch.ones_like(ids)
    first = model(ids, attention_mask=full, use_cache=True).past_key_values
    last = model.generate(ids, attention_mask=full, **settings).past_key_values

    lengths = {"prompt_length": prompt, "response_length": response}
    config = {**fields, "model_type": family}
    e = inference(config, per_device_train_batch_size=ROWS, **lengths)

    assert cache_bytes(e, "prefill") == held(first)  # what is cut off is still there
    assert cache_bytes(e, "decode") == held(last)
    per_token = ROWS * 2 * 2 * 8 * 2
    length = prompt + response - 1
    by_hand = per_token * ((7 - windowed) * length + windowed * min(length, WINDOW))
    assert held(last) == by_hand
    assert sum(n for layer in e.models[0].layers for _, n in layer.windows) == windowed


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_of_a_config_are_those_of_transformers(family: str) -> None:
    more = {"use_sliding_window": True, "max_window_layers": 3}
    for asked in ({}, more) if "use_sliding_window" in FAMILIES[family].defaults else ({},):
        config = AutoConfig.for_model(family, **asked)
        layers = DynamicCache(config=config).layers
        found = Counter(getattr(layer, "sliding_window", 0) for layer in layers)
        saved = config.to_dict()
        bare = {k: v for k, v in saved.items() if k not in ("layer_types", "no_rope_layers")}
        for fields in (saved, bare):
            # What some classes leave out, or make of a switch that is off.
            fields = {**fields, "num_experts_per_tok": 2, "head_dim": 128}
            fields |= {"sliding_window": 4096, **asked} if asked else {}
            read = architecture(fields)
            near = Counter(dict(w for layer in read.layers for w in layer.windows))
            if read.windows_unknown:
                assert fields is not saved and FAMILIES[family].whole_every is None and asked
                assert "planned with whole attention" in " ".join(read.remarks)
            else:
                assert near == Counter({w: n for w, n in found.items() if w})


def test_a_list_of_layers_and_a_switch_decide() -> None:
    kinds = ["sliding_attention", "full_attention"] * 3 + ["sliding_attention"]
    listed = architecture({**SWITCHED, "model_type": "qwen2", "layer_types": kinds})
    assert listed.layers[0].windows == ((WINDOW, 4),)
    off = {**SWITCHED, "use_sliding_window": False}
    assert architecture({**off, "model_type": "qwen2"}).layers[0].windows == ()
    chunks = {**SIZES, **EXPERTS, "attention_chunk_size": 32, "intermediate_size_mlp": 48}
    turning = [1, 1, 0, 1, 1, 1, 0]
    chunked = architecture({**chunks, "model_type": "llama4_text", "no_rope_layers": turning})
    assert chunked.layers[0].windows == ((32, 5),)


def test_unknown_windows_are_said_first() -> None:
    fields = {**SWITCHED, "model_type": "smollm3"}
    e = inference(fields, prompt_length=40, response_length=4, per_device_train_batch_size=ROWS)
    assert "planned with whole attention" in e.caveats[0]
    assert cache_bytes(e, "decode") == ROWS * 43 * 7 * 2 * 2 * 8 * 2


@pytest.mark.parametrize("first, last", [(2, 9), (10, 40), (20, 31)])
def test_decoding_reads_what_the_windows_leave(first: int, last: int) -> None:
    model = architecture({**MODELS["gpt_oss"][0], "model_type": "gpt_oss"})
    contexts = torch.linspace(first, last, 20001)
    read = (4 * contexts.clamp(max=WINDOW) + 3 * contexts) / 7
    assert contexts.mean() - model.beyond(first, last) == pytest.approx(float(read.mean()), 1e-4)


def test_a_window_makes_decoding_faster_and_not_prefill() -> None:
    config = presets()["google/gemma-3-27b-pt"]
    text = {**config["text_config"], "model_type": "gemma3_text"}  # type: ignore[dict-item]
    settings = {"prompt_length": 8000, "response_length": 128, "per_device_train_batch_size": 8}
    near, far = inference(text, **settings), inference({**text, "sliding_window": None}, **settings)
    ends = [cache_bytes(e, "decode") for e in (near, far)]
    # Of 62 layers every sixth is whole; 1024 of 8127 tokens stay in the others.
    assert ends[0] / ends[1] == pytest.approx((10 + 52 * 1024 / 8127) / 62)
    assert near.seconds_of["decode", "policy"] < far.seconds_of["decode", "policy"]
    assert near.seconds_of["prefill", "policy"] == far.seconds_of["prefill", "policy"]
    assert near.peak == far.peak  # the prompt is there whole


def test_the_rollout_of_ppo_is_what_the_x_ray_runs() -> None:
    """Our own sampler's cache is transformers', and the x-ray runs both."""
    config = {**FAR, "model_type": "mistral"}
    settings = {"prompt_length": 12, "response_length": 60, "per_device_train_batch_size": 4}
    e = estimate(
        "ppo", config, "laptop", {**settings, "rows": 16, "gradient_accumulation_steps": 1}
    )
    ran = simulate_step(e.setup, config).ledger
    flops = {"quantity": "flops", "phase": "rollout"}
    asked = {"quantity": "bytes", "component": "kv_cache", "phase": "rollout"}
    assert e.ledger.total(**asked) == ran.total(**asked)
    each = e.ledger.total(**flops) / e.steps
    assert each == pytest.approx(ran.total(**flops), rel=0.002)


def test_an_engine_keeps_windows_in_blocks_of_groups() -> None:
    text = {**presets()["google/gemma-3-27b-pt"]["text_config"], "model_type": "gemma3_text"}  # type: ignore[dict-item]
    settings = {"prompt_length": 8000, "response_length": 128, "engine": "vllm"}
    e = inference(text, **settings, concurrency=8)
    # vLLM 0.32: groups of ten layers, six of them for 52; 1024 tokens touch up to 65 blocks of 16.
    per_block = 16 * 2 * 16 * 128 * 2
    assert request_bytes(e.setup) == per_block * (10 * 508 + 60 * 65)
    assert request_bytes(e.setup, 2048) == per_block * (10 * 508 + 60 * 193)
    far = inference({**text, "sliding_window": None}, **settings, concurrency=8)
    assert request_bytes(far.setup) == per_block * 62 * 508
    assert e.serving.fits > 2 * far.serving.fits
    one, whole = (x.serving_at(1) for x in (e, far))
    assert one.per_token < whole.per_token and one.prefill < whole.prefill
    scout = presets()["meta-llama/Llama-4-Scout-17B-16E"]
    chunked = inference(scout, "h200", **{**settings, "prompt_length": 16000}, concurrency=8)
    assert request_bytes(chunked.setup) == 16 * 2 * 8 * 128 * 2 * 48 * 1008  # whole by default


def test_presets_have_their_own_window() -> None:
    windows = {
        "mistralai/Mistral-7B-Instruct-v0.1": 32 * 4096,
        "mistralai/Mistral-7B-Instruct-v0.2": 0,
        "mistralai/Mistral-7B-v0.3": 0,
        "google/gemma-3-27b-it": 52 * 1024,
        "google/gemma-2-9b": 21 * 4096,
        "openai/gpt-oss-20b": 12 * 128,
        "google/gemma-3n-E4B": 16 * 512,
        "Qwen/Qwen2.5-7B": 0,
    }
    for name, tokens in windows.items():
        layers = architecture(presets()[same_sizes()[name]]).layers
        assert sum(w * n for layer in layers for w, n in layer.windows) == tokens, name
