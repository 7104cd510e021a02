"""A Llama as a GGUF file, for llama.cpp and what is built on it: fp32 weights, tokenizer, template.

llama.cpp's own converter (convert_hf_to_gguf.py) takes many families, but knows a tokenizer by a
hash of what it makes of one sentence: it refuses every new one, the bundled models' too ("BPE
pre-tokenizer was not recognized"). Here the rule by which texts are split is read.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..models.load import gives_scores
from ..models.tokenizer import load_tokenizer
from ..models.weights import load_causal_lm
from ..runs.json_files import JsonObject

PRE_TOKENIZERS = {"ByteLevel": "gpt-2", "Digits, ByteLevel": "smollm"}
"""How texts are split before BPE → llama.cpp's name for it."""


def write_gguf(model: Path, file: Path, name: str) -> None:
    """Write the model of a folder. Raises ValueError, one line, for another family or tokenizer."""
    if find_spec("gguf") is None:
        raise ValueError("a GGUF file is written by gguf: pip install gguf")
    import gguf

    if why := _unfit(json.loads((model / "config.json").read_text())):
        raise ValueError(f"no GGUF file of {model}: {why}")
    tokenizer = load_tokenizer(model)
    pre = _pre_tokenizer(json.loads((model / "tokenizer.json").read_text()))
    lm = load_causal_lm(model)
    c, writer = lm.config, gguf.GGUFWriter(file, "llama")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)

    words = {i: word for word, i in tokenizer.get_vocab().items()}
    kinds = dict.fromkeys(words, gguf.TokenType.NORMAL)
    for i, added in tokenizer.added_tokens_decoder.items():
        kinds[i] = gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED
    rows = range(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([words.get(i, f"[PAD{i}]") for i in rows])
    writer.add_token_types([kinds.get(i, gguf.TokenType.UNUSED) for i in rows])
    gguf.SpecialVocab(model, load_merges=True).add_to_gguf(writer, quiet=True)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for key, weight in lm.state_dict().items():
        if key != "lm_head.weight" or not c.tie_word_embeddings:
            written = str(names.get_name(key, try_suffixes=(".weight", ".bias")))
            writer.add_tensor(written, _as_read(written, weight.numpy(), c))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _unfit(config: JsonObject) -> str:
    """Why a model is not written; "" for one that is."""
    if gives_scores(config):
        return "it gives scores, and llama.cpp generates text; export it to the hub's layout"
    rope = (config.get("rope_parameters") or {}).get("rope_type", "default")
    if config["model_type"] != "llama" or rope != "default":
        what = (
            f"positions of kind {rope} are" if rope != "default" else f"{config['model_type']} is"
        )
        return f"{what} not written here; llama.cpp's converter reads the hub's layout"
    if config.get("quantization_config"):
        return "its weights are quantised; export the run that they come from"
    return ""


def _pre_tokenizer(tokenizer: JsonObject) -> str:
    """llama.cpp's name for the way in which a tokenizer.json splits texts. Raises ValueError."""
    whole = tokenizer["pre_tokenizer"] or {"type": "none"}
    steps = whole.get("pretokenizers", [whole])
    how = ", ".join(step["type"] for step in steps)
    usual = {"add_prefix_space": False, "individual_digits": True, "use_regex": True}
    odd = [n for step in steps for n in usual if n in step and step[n] != usual[n]]
    if tokenizer["model"]["type"] != "BPE" or tokenizer["normalizer"] or odd:
        how += " with settings of its own"
    if how not in PRE_TOKENIZERS:
        raise ValueError(
            f"this tokenizer splits texts by {how}, and a GGUF file is written for BPE by "
            f"{' or '.join(PRE_TOKENIZERS)}: export to the hub's layout, and try llama.cpp's own "
            "converter, which knows those of well-known models"
        )
    return PRE_TOKENIZERS[how]


def _as_read(name: str, weight: Any, config: Any) -> Any:
    """A tensor as llama.cpp reads it: of queries and keys, (heads · d, …), it turns neighbours in
    pairs, where transformers pairs the two halves of a head."""
    of = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    if not (heads := of.get(name.split(".")[-2])):
        return weight
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)
