"""What sets the model families apart, as data (`families.yaml`), read by the rest of the planner.

A family is what a config names as its `model_type`; the facts are those of transformers 5's
modelling code. A family whose layer is "gated" needs an entry there and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml


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
    expert_maps: str = "gate_proj up_proj down_proj"
    """peft's names of an expert's gate, up and down projection"""
    lora_defaults: bool = True
    """peft has default targets. (It has some for mixtral too, and then finds none of them.)"""


_FILE = Path(__file__).with_name("families.yaml")
FAMILIES: Mapping[str, Family] = {
    name: Family(**facts) for name, facts in yaml.safe_load(_FILE.read_text("utf-8")).items()
}
"""By `model_type`."""
