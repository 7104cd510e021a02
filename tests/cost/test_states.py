"""What a request keeps beside plain keys and values, against transformers' own caches on `meta`.

pytest tests/cost/test_states.py
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from rlhf_lab.cost.architecture import architecture
from rlhf_lab.cost.estimate import Estimate, estimate
from rlhf_lab.cost.serving import request_bytes
from rlhf_lab.simulate.shortcuts import _grow

ROWS, PROMPT = 2, 5
SIZES: dict[str, dict[str, object]] = {
    "trocr": {"decoder_layers": 2},  # with maps for an encoder, which nothing is cached of
    "qwen3_5_text": {"num_hidden_layers": 4},
    "kimi_linear": {"num_hidden_layers": 5},
    "falcon_h1": {"num_hidden_layers": 2},
    "jamba": {"num_hidden_layers": 8},
    "minimax": {"num_hidden_layers": 2},
    "lfm3": {"num_hidden_layers": 4},
    "inkling2_text": {"num_hidden_layers": 6},
    "zaya": {"num_hidden_layers": 2},
    "zamba2": {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", *3 * ["hybrid"]],
        "hybrid_layer_ids": [1, 2, 3],
    },
    "deepseek_v32": {"num_hidden_layers": 2},
    "dots3_note_text": {"num_hidden_layers": 4},
    "cpmant": {"num_hidden_layers": 2},
    "phi4_multimodal": {"num_hidden_layers": 2},
    "hrm_text": {"num_hidden_layers": 2},
    "ctrl": {"num_hidden_layers": 2},
}
"""Families that keep states, keys of an indexer, or have names of their own for keys and values."""


def inference(config: dict[str, object], **settings: object) -> Estimate:
    sizes = {"prompt_length": PROMPT, "response_length": 8, "per_device_train_batch_size": ROWS}
    return estimate("inference", config, "h200", {"dtype": "bfloat16", **sizes, **settings})


def planned(e: Estimate, phase: str) -> float:
    return e.ledger.total(quantity="bytes", component="kv_cache", phase=phase)


def held(found: object) -> Iterator[torch.Tensor]:
    """All numbers that lie in a cache; counters are whole numbers."""
    if isinstance(found, torch.Tensor):
        if found.is_floating_point():
            yield found
    elif isinstance(found, dict | list):
        for part in found.values() if isinstance(found, dict) else found:
            yield from held(part)
    elif type(found).__module__.startswith("transformers") and hasattr(found, "__dict__"):
        yield from held(vars(found))


def cache_bytes(family: str, config: object, rows: int, prompt: int) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.zeros(rows, prompt, dtype=torch.long, device="meta")
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    different = {id(t): t for t in held(cache)}
    return sum(t.untyped_storage().nbytes() for t in different.values())


@pytest.mark.parametrize("family", SIZES)
def test_the_cache_is_transformers_own(family: str) -> None:
    config = AutoConfig.for_model(family, **SIZES[family])
    e = inference(config.to_dict())
    assert planned(e, "prefill") == cache_bytes(family, config, ROWS, PROMPT)
    said = [line for line in e.caveats if "whatever its length" in line]
    assert bool(said) == bool(e.models[0].state_bytes(2))


def test_sizes_by_hand() -> None:
    one = AutoConfig.for_model("qwen3_5_text", num_hidden_layers=4).to_dict()
    # Three of four layers: 32 heads of 128 · 128 in fp32, 4 inputs of 8192 convolutions in 16 bits.
    assert architecture(one).state_bytes(2) == 3 * (32 * 128 * 128 * 4 + 8192 * 4 * 2)
    sparse = AutoConfig.for_model("deepseek_v32", num_hidden_layers=2).to_dict()
    assert architecture(sparse).cached == 2 * (512 + 64 + 128)


def test_fewer_requests_fit() -> None:
    config = AutoConfig.for_model("qwen3_5_text", num_hidden_layers=4).to_dict()
    e = inference(config, engine="vllm", concurrency=4)
    state, keys = 3 * (32 * 128 * 128 * 4 + 8192 * 4 * 2), 2 * 4 * 256 * 2
    assert request_bytes(e.setup) == 16 * keys + state
    assert planned(e, "decode") == 4 * request_bytes(e.setup)
    assert "an engine's pages may be larger" in " ".join(e.caveats)
    halves = inference(config, engine="vllm", concurrency=4, gpus=2, tensor_parallel=2)
    assert request_bytes(halves.setup) == (16 * keys + state) / 2


def test_text_reads_no_cross_attention() -> None:
    sizes = {"num_hidden_layers": 5, "cross_attention_layers": [3]}
    config = AutoConfig.for_model("mllama", text_config=sizes).to_dict()
    assert architecture(config).cached == 4 * 2 * 8 * 128


@pytest.mark.parametrize("family", ["deepseek_v4", "rwkv"])
def test_what_is_not_known_is_said_first(family: str) -> None:
    config = AutoConfig.for_model(family, num_hidden_layers=4).to_dict()
    assert "is not known here" in architecture(config).remarks[0]


def test_in_the_x_ray_keys_grow_and_states_do_not() -> None:
    cache = DynamicCache(config=AutoConfig.for_model("qwen3_5_text", num_hidden_layers=4))
    keys, state = torch.zeros(1, 4, 5, 256), torch.zeros(1, 32, 128, 128)
    cache.update(keys, keys, 3)
    cache.update_recurrent_state(state, 0)
    _grow(cache, 9)
    assert cache.layers[3].keys.shape == cache.layers[3].values.shape == (1, 4, 9, 256)
    assert cache.layers[0].recurrent_states[0].shape == state.shape
