"""Small random-weight models of every family we claim, as folders like those on the hub."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = [f"w{i}" for i in range(40)]
CONTEXT = 96

# Special tokens as the family's own tokenizers name them: bos, eos, pad, unk; and whether a text
# begins with bos.
SPECIAL = {
    "llama": ("<s>", "</s>", "<|finetune_right_pad_id|>", "<unk>", True),
    "mistral": ("<s>", "</s>", "<pad>", "<unk>", True),
    "qwen2": (None, "<|im_end|>", "<|endoftext|>", None, False),
    "qwen3": (None, "<|im_end|>", "<|endoftext|>", None, False),
    "gpt2": ("<|endoftext|>", "<|endoftext|>", "[PAD]", "<|endoftext|>", False),
    "gpt_neox": ("<|endoftext|>", "<|endoftext|>", "<|padding|>", None, False),
    "opt": ("</s>", "</s>", "<pad>", "</s>", True),
    "gemma": ("<bos>", "<eos>", "<pad>", "<unk>", True),
    "gemma2": ("<bos>", "<eos>", "<pad>", "<unk>", True),
    "gemma3_text": ("<bos>", "<eos>", "<pad>", "<unk>", True),
}
FAMILIES = list(SPECIAL)

COMMON = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": CONTEXT,
}
CONFIGS = {
    "llama": {**COMMON, "num_key_value_heads": 1},
    "mistral": {**COMMON, "num_key_value_heads": 1, "sliding_window": 24},
    "qwen2": {**COMMON, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen3": {**COMMON, "num_key_value_heads": 1, "head_dim": 8},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT},
    "gpt_neox": COMMON,
    "opt": {
        "hidden_size": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": CONTEXT,
        "word_embed_proj_dim": 8,
        "do_layer_norm_before": False,
    },
    "gemma": {**COMMON, "num_key_value_heads": 1, "head_dim": 8},
    "gemma2": {
        **COMMON,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 24,
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": {
        **COMMON,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 24,
        "query_pre_attn_scalar": 8,
    },
}
"""OPT's as its 350M: embeddings narrower than the layers, norms after them."""


def make_tokenizer(family: str, with_pad: bool):
    """A word-level tokenizer with the family's special tokens; Qwen 2's own class, byte-level."""
    from tokenizers import Tokenizer, processors
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    bos, eos, pad, unk, begins = SPECIAL[family]
    special = list(dict.fromkeys(t for t in (bos, eos, pad if with_pad else None, unk) if t))
    if family == "qwen2":  # transformers loads it as this class, whatever was saved
        letters = sorted(ByteLevel.alphabet())
        vocabulary = {c: i for i, c in enumerate([*letters, *special])}
        return Qwen2Tokenizer(
            vocab=vocabulary,
            merges=[],
            eos_token=eos,
            pad_token=pad if with_pad else None,
            unk_token=None,
        )
    vocabulary = {w: i for i, w in enumerate([*WORDS, *special])}
    made = Tokenizer(WordLevel(vocabulary, unk_token=unk or WORDS[0]))
    made.pre_tokenizer = WhitespaceSplit()
    names = {"bos_token": bos, "eos_token": eos, "unk_token": unk}
    if with_pad:
        names["pad_token"] = pad
    if begins:
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, **{k: v for k, v in names.items() if v})


def make_folder(
    folder: Path, family: str, with_pad: bool = True, seed: int = 0, **config_values: int
) -> Path:
    """A random model of the family with its tokenizer, saved as on the hub."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer(family, with_pad)
    config = AutoConfig.for_model(
        family,
        **{**CONFIGS[family], **config_values},
        vocab_size=len(tokenizer),
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(count: int = 24) -> list[dict]:
    """Instructions, answers and preferences in the families' few words."""
    return [
        {
            "prompt": f"w{i % 40} w{(i * 7) % 40} ?",
            "completion": f"w{(i + 1) % 40} w2",
            "chosen": f"w{(i + 1) % 40} w2",
            "rejected": f"w3 w{(i + 5) % 40} w4 w1",
        }
        for i in range(count)
    ]


def data(made: list[dict] | None = None):
    """Rows as `lab.load_data` reads them, evaluated on all that they train on."""
    from dataclasses import replace

    import rlhf_lab as lab
    from rlhf_lab.data.load import Split

    read = lab.load_data(made or rows())
    parts = {
        name: Split(part.train, part.train)
        for name, part in vars(read).items()
        if isinstance(part, Split)
    }
    return replace(read, **parts)


def model_and_rows(folder: Path, examples: list[dict]) -> Path:
    """A random model in `model` and a file `rows.json`, in which nothing is wrong; → the folder."""
    (folder / "rows.json").write_text(json.dumps(examples))
    make_folder(folder / "model", "llama")
    return folder
