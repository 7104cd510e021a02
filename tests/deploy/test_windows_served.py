"""The server's room for models whose layers attend within a window, against transformers' engine.

pytest tests/deploy/test_windows_served.py      (needs the extra `serve`)
"""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from rlhf_lab.cost.architecture import architecture

pytest.importorskip("starlette", reason="needs a server: pip install 'rlhf-lab[serve]'")

from rlhf_lab.deploy import app

ROWS, STEP = 3, 256
SIZES = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2)
SIZES |= dict(head_dim=128, vocab_size=99, num_hidden_layers=6, max_position_embeddings=16384)


def model(windowed: int):
    """Six layers, so many of which attend to 100 tokens."""
    kinds = ["sliding_attention"] * windowed + ["full_attention"] * (6 - windowed)
    config = Gemma3TextConfig(**SIZES, sliding_window=100, layer_types=kinds, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def started(model, free, monkeypatch):
    monkeypatch.setattr(app, "available_memory", lambda: free)
    return app.start_engine(model, ROWS, None, False)


@pytest.mark.parametrize("windowed", [0, 3, 5])
def test_the_longest_requests_find_room_in_the_engine(windowed, monkeypatch):
    """As many as there are rows, and what the engine holds is what was reckoned, not twice it."""
    loaded, free = model(windowed), 100 * 2**20
    engine = started(loaded, free, monkeypatch)
    try:
        batching = engine._cb.batch_processor
        cache, masks = batching.cache, batching.inputs_and_outputs.attention_mask
        pages = app.engine_room(
            architecture(loaded.config.to_dict()), app.SHARE * free / 4, ROWS, 16384, STEP
        )[1]
        fit = 0
        while fit < ROWS and can_store(cache, f"row {fit}", engine.context):
            fit += 1
        assert cache.num_blocks >= pages - 1 and 64 < engine.context < 16384
        held = cache.cache_tensor.nbytes + sum(mask.nbytes for mask in masks.values())
        # One such request is as large as the room: its copies in a step are the rest.
        copies = 3 * 2 * 128 * 4 * engine.context
        assert fit >= 1 and 0.8 < (held + copies) / (app.SHARE * free) < 1.1
    finally:
        engine._cb.stop(block=True)


def can_store(cache, name, tokens):
    """transformers' own answer; what it takes for the request is kept."""

    class Request:
        request_id = name

        def current_len(self):
            return 0

    return cache.can_store_request_tokens(Request(), tokens)


def test_windows_make_room_for_longer_requests():
    """By hand, of six layers of 512 numbers a token, within pages of 32: five layers keep four
    pages (of 100 tokens), the sixth all. A page of all layers has two masks' rows of 6 pages."""
    numbers = 8e6
    read = architecture(model(5).config.to_dict())
    longest, pages = app.engine_room(read, numbers, 1, 16384, STEP)
    kept = 512 * (5 * 128 + -(-longest // 32) * 32)
    by_hand = kept + 2 * STEP * 6 * kept / 3072 + 768 * longest
    assert by_hand <= numbers < by_hand + (512 + 2 * STEP) * 32 + 768
    assert pages >= -(-kept // (3072 * 32)) + 2
    whole = app.engine_room(architecture(model(0).config.to_dict()), numbers, 1, 16384, STEP)
    assert whole == (numbers // (3072 + 768 + STEP) // 32 * 32, whole[0] // 32 + 1)
    assert longest > 2 * whole[0]


def test_states_have_no_place_in_the_engine():
    """transformers' pages are of full and sliding attention: it knows no other kind of layer."""
    from any_config import small_config
    from transformers import AutoConfig
    from transformers.generation.continuous_batching.cache import group_layers_by_attn_type

    config = small_config("falcon_h1")
    kind = config.pop("model_type")
    loaded = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))
    with pytest.raises(ValueError, match="^falcon_h1 keeps a state of each request .*'vllm'$"):
        app.start_engine(loaded, ROWS, None, False)
    kinds = SimpleNamespace(layer_types=["linear_attention", "full_attention"])
    with pytest.raises(ValueError, match="Invalid layer type: linear_attention"):
        group_layers_by_attn_type(kinds)
