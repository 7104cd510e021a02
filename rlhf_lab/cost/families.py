"""What sets the model families apart, as data: one entry each, read by the rest of the planner.

A family is what a config names as its `model_type`; the facts are those of transformers 5's
modelling code. A family whose layer is "gated" needs an entry here and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Family:
    """Facts of one family; the defaults are Llama's.

    `layer`: how a layer is put together; "gated" has RMS norms, rotary positions, grouped key-value
    heads and an MLP of gate, up and down. `defaults`: what the family's config class assumes for
    fields that a config leaves out.
    """

    layer: Literal["gated", "gpt2", "gpt_neox", "opt"] = "gated"
    defaults: Mapping[str, object] = field(default_factory=dict)
    tied: bool = False
    """by default the head's matrix is the embedding"""

    # ----------------------------------------------------------------------------- norms
    norm: Literal["rms", "rms_fp32", "layer"] = "rms"
    """"rms_fp32" multiplies by its weight before the cast to 16 bits"""
    norms_around: bool = False
    """attention and MLP have a norm behind them as well as before them"""
    qk_norm: bool = False
    """queries and keys have RMS norms of their own"""

    # ------------------------------------------------------------------------- embeddings
    positions: Literal["rotary", "learned"] = "rotary"
    position_offset: int = 0
    """rows that the table of learned positions has beyond the context"""
    scaled_embedding: bool = False
    """embeddings are multiplied by √hidden"""

    # -------------------------------------------------------------------------- attention
    fused_maps: bool = False
    """one matrix for queries, keys and values, one for gate and up"""
    qkv_bias: bool | None = None
    """queries, keys and values have a bias and the output has none; None: as `attention_bias`"""
    partial_rotary: bool = False
    """`cat` joins rotated and other parts of a head: the result, and so attention's, lies head by
    head in memory"""
    interleaved_qkv: bool = False
    """a head's queries, keys and values lie beside each other in the joint product"""
    softcap: bool = False
    """scores s become tanh(s / c) · c, which fused attention cannot do"""
    fp32_softmax: bool = True

    # --------------------------------------------------------------------------- mixtures
    experts: int = 0
    """experts of a mixture, where the config does not give their number; 0: no mixture"""
    expert_maps: tuple[tuple[str, ...], tuple[str, ...]] = (
        ("gate_proj", "up_proj"),
        ("down_proj",),
    )
    """peft's names of an expert's gate and up, and of its down projection"""
    lora_defaults: bool = True
    """peft has default targets. (It has some for mixtral too, and then finds none of them.)"""


FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(defaults={"num_key_value_heads": 8}),
    "qwen2": Family(qkv_bias=True, defaults={"num_key_value_heads": 32}),
    "qwen3": Family(qk_norm=True, defaults={"num_key_value_heads": 32, "head_dim": 128}),
    "phi3": Family(fused_maps=True, partial_rotary=True, lora_defaults=False),
    "gemma": Family(
        norm="rms_fp32",
        scaled_embedding=True,
        tied=True,
        defaults={"num_key_value_heads": 16, "head_dim": 256},
    ),
    "gemma2": Family(
        norm="rms_fp32",
        norms_around=True,
        scaled_embedding=True,
        softcap=True,
        tied=True,
        defaults={"num_key_value_heads": 4, "head_dim": 256},
    ),
    "gemma3_text": Family(
        norm="rms_fp32",
        norms_around=True,
        qk_norm=True,
        scaled_embedding=True,
        tied=True,
        # The published text_configs give only what differs from the class.
        defaults={
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
        },
    ),
    "mixtral": Family(
        experts=8,
        expert_maps=(("w1", "w3"), ("w2",)),
        lora_defaults=False,
        defaults={"num_key_value_heads": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 1},
    ),
    "qwen3_moe": Family(
        qk_norm=True,
        experts=128,
        lora_defaults=False,
        defaults={
            "num_key_value_heads": 4,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
            "decoder_sparse_step": 1,
        },
    ),
    "gpt2": Family(
        layer="gpt2",
        norm="layer",
        positions="learned",
        fp32_softmax=False,
        tied=True,
        defaults={"n_positions": 1024},
    ),
    "gpt_neox": Family(
        layer="gpt_neox",
        norm="layer",
        partial_rotary=True,
        interleaved_qkv=True,
        defaults={"attention_bias": True},
    ),
    "opt": Family(
        layer="opt",
        norm="layer",
        positions="learned",
        position_offset=2,
        tied=True,
        defaults={
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
        },
    ),
}
"""By `model_type`."""
