"""What sets the model families apart, as data (`families.yaml`), read by the rest of the planner.

A family is what a config names as its `model_type`; the facts are those of transformers 5's
modelling code. A family whose layer is "gated" needs an entry there and nothing else; one without
an entry is known by its matrices alone (`UNDESCRIBED`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from ..stages import read_table

Bias: TypeAlias = bool | str | None
"""Whether maps have biases: yes, no, as a field of the config says, or (None) as usual."""
Norms: TypeAlias = Literal["before", "after", "around", "parallel", "parallel_two"]
NORM_WEIGHTS = dict(rms=1, rms_fp32=1, layer=2, layer_unbiased=1, layer_bare=0, layer_fp32=1)
"""Numbers that a norm learns for each number of its input."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Facts of one family; the defaults are Llama's.

    `layer`: how a layer is put together; "gated" has grouped key-value heads and an MLP, and all
    the facts below; "matrices" is a layer of which only these are known. `defaults`: what the
    family's config class assumes for fields that a config leaves out. `fields`: our name of a field
    → the family's.
    """

    layer: Literal["gated", "plain", "opt", "matrices"] = "gated"
    defaults: Mapping[str, object] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    tied: bool = False
    """by default the head's matrix is the embedding"""
    head_bias: Bias = False
    reward_head: bool = True
    """transformers has a class with a score head"""
    rough: bool = False
    """its memory is known to within the wide band only"""

    # ----------------------------------------------------------------------------- norms
    norm: Literal["rms", "rms_fp32", "layer", "layer_unbiased", "layer_bare", "layer_fp32"] = "rms"
    """"rms_fp32" multiplies by its weight before the cast to 16 bits; "layer_bare" has no weights
    and runs in fp32; "layer_fp32" is written out, in fp32, without a bias"""
    norms: Norms = "before"
    """where attention and MLP have norms; "parallel": one, and both read it side by side"""
    qk_norm: Literal["", "head", "whole"] = ""
    """queries and keys have norms of their own: one for every head, or of their whole width"""
    qk_norm_if: str = ""
    """the field of a config that switches these on; "": they are always there"""

    # ------------------------------------------------------------------------- embeddings
    positions: Literal["rotary", "learned", "alibi"] = "rotary"
    position_offset: int = 0
    """rows that the table of learned positions has beyond the context"""
    scaled_embedding: bool = False
    """embeddings are multiplied by √hidden, or by a number of the config"""
    embedding_norm: bool = False
    scaled_residual: bool = False
    """what attention and MLP hand on is multiplied by a number"""

    # -------------------------------------------------------------------------- attention
    qkv_map: str = ""
    """the name of the one matrix for queries, keys and values; "": three"""
    out_map: str = "o_proj"
    qkv_bias: Bias = None
    """of queries, keys and values; None: as `attention_bias`, the output's too"""
    out_bias: Bias = None
    partial_rotary: bool = False
    """`cat` joins rotated and other parts of a head: the result, and so attention's, lies head by
    head in memory"""
    interleaved_qkv: bool = False
    """a head's queries, keys and values lie beside each other in the joint product"""
    softcap: bool = False
    """scores s, and logits, become tanh(s / c) · c, which fused attention cannot do"""
    sinks: bool = False
    """each head has a learned score beside those of the tokens; nor can it do that"""
    whole_every: int | None = 0
    """of layers with a window, every so manieth has none; 0: all have it; None: not known, where
    the config does not list them (`layer_types`)"""
    whole_first: bool = False
    """counted so that the first layer is one of them"""
    eager: bool = False
    """attention is written out whatever is asked for"""
    fp32_softmax: bool = True

    # ------------------------------------------------------------------------------- MLPs
    mlp_maps: str = "gate_proj up_proj down_proj"
    """gate, up and down; or gate and up in one, and down; or, not `gated`, up and down"""
    gated: bool = True
    mlp_bias: Bias = None
    """None: as `mlp_bias`"""
    four_times_wide: bool = False
    """as the hidden size, where the config does not say how wide it is"""
    gelu_new: bool = False
    """the activation is written out"""

    # --------------------------------------------------------------------------- mixtures
    experts: int = 0
    """experts of a mixture, where the config does not give their number; 0: no mixture"""
    expert_maps: str = "gate_proj up_proj down_proj"
    """peft's names of an expert's gate, up and down projection; "": it reaches none"""
    router: str = "gate"
    router_linear: bool = False
    """the router is a module that peft reaches by its name"""
    expert_bias: bool = False
    shared_width: str = ""
    """the field that says how wide the expert is that every token passes"""
    shared_gate: bool = False
    dense_width: str = "intermediate_size"
    """the field that says how wide a layer without experts is"""
    every_expert: bool = False
    """every token passes every expert, weighed with 0 or not"""
    lora_defaults: str = ""
    """peft's default targets; "" where it has none. (It has some for mixtral, and finds none.)"""


_ENTRIES: dict[str, dict[str, object]] = read_table(__file__)
TEXT_PARTS = {str(name): str(family) for name, family in _ENTRIES.pop("text_parts").items()}
"""Models with images, by `model_type` → the family of their decoder."""


def _facts(name: str) -> dict[str, object]:
    """A family's entry on top of the one that it is `like`."""
    own = dict(_ENTRIES[name])
    base = _facts(str(own.pop("like"))) if "like" in own else {}
    return base | own


FAMILIES: Mapping[str, Family] = {
    name: Family(**_facts(name))  # type: ignore[arg-type]
    for name in _ENTRIES
}
"""By `model_type`."""
UNDESCRIBED = Family(layer="matrices", rough=True)
"""A family of which only the matrices are known."""
