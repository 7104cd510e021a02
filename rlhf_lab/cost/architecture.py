"""A model's matrices, read off its config as a plain dict: parameters and LoRA, digit for digit.

    a = architecture({"model_type": "llama", "hidden_size": 64, ...})
    a.parameters(), a.by_part(), a.lora_parameters(r=16)

Pure arithmetic: imports no torch and no transformers, so that the planner opens anywhere. A family
is what its layer is made of: the linear maps (name, in, out, bias) and the width of its norms. The
same list gives parameters here, and FLOPs and activations elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PARTS = ("embedding", "attention", "mlp", "norms", "head")


@dataclass(frozen=True)
class Linear:
    """A linear map inside a layer: `part` is attention or mlp; `copies` counts experts.

    `module` is false where transformers keeps the weights as bare parameters (fused experts), which
    LoRA does not adapt.
    """

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    part: str = "mlp"
    copies: int = 1
    module: bool = True

    @property
    def parameters(self) -> int:
        return self.copies * (self.inputs + self.bias) * self.outputs


@dataclass(frozen=True)
class Layer:
    """`count` equal layers: their linear maps and the parameters of the norms of one of them."""

    count: int
    linears: tuple[Linear, ...]
    norms: int


@dataclass(frozen=True)
class Architecture:
    """A decoder: widths, and what its layers are made of.

    `a` heads of `d` numbers read `k` key-value heads. `embedding` counts token and position tables
    (and OPT's projections); `final_norm` the norm before the head; `head_width` what the head
    reads. `experts`, `active`: of a mixture, else 1.
    """

    family: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    tied: bool
    layers: tuple[Layer, ...]
    embedding: int
    final_norm: int
    head_width: int
    experts: int = 1
    active: int = 1

    @property
    def depth(self) -> int:
        """Number of layers."""
        return sum(layer.count for layer in self.layers)

    def by_part(self, head: str = "lm") -> dict[str, int]:
        """Parameters by part. `head`: "lm" (a tied one is counted with the embedding), "score" (a
        reward or value model: one output, no bias), or "none" (the trunk alone)."""
        parts = dict.fromkeys(PARTS, 0)
        parts["embedding"] = self.embedding
        parts["norms"] = self.final_norm
        for layer in self.layers:
            parts["norms"] += layer.count * layer.norms
            for linear in layer.linears:
                parts[linear.part] += layer.count * linear.parameters
        if head not in ("lm", "score", "none"):
            raise ValueError(f"head={head!r}: choose from lm, score, none")
        if head == "score":
            parts["head"] = self.head_width
        elif head == "lm" and not self.tied:
            parts["head"] = self.head_width * self.vocabulary
        return parts

    def parameters(self, head: str = "lm") -> int:
        """All parameters, a tied head counted once."""
        return sum(self.by_part(head).values())

    def active_parameters(self, head: str = "lm") -> int:
        """Parameters that one token uses: of a mixture, those of its active experts only."""
        idle = sum(layer.count * linear.parameters * (self.experts - self.active) // self.experts
                   for layer in self.layers for linear in layer.linears
                   if linear.copies > 1)  # fmt: skip
        return self.parameters(head) - idle

    def lora_targets(self, targets: str | tuple[str, ...] | None = None) -> tuple[str, ...]:
        """Names of the linear maps that LoRA adapts: peft's default of the family, "all-linear"
        (all but the head), or those you name. Raises ValueError for a name that is not there."""
        there = list(dict.fromkeys(
            linear.name for layer in self.layers for linear in layer.linears if linear.module))  # fmt: skip
        if targets == "all-linear":
            return tuple(there)
        if targets is None:
            return tuple(n for n in DEFAULT_TARGETS if n in there)
        wanted = (targets,) if isinstance(targets, str) else tuple(targets)
        for name in wanted:
            if name not in there:
                raise ValueError(f"no linear layer {name!r} in {self.family}: choose from "
                                 f"{', '.join(there)}")  # fmt: skip
        return wanted

    def lora_parameters(self, r: int, targets: str | tuple[str, ...] | None = None) -> int:
        """Parameters of the adapters: r · (inputs + outputs) of each map (Hu et al. 2106.09685,
        section 4.1)."""
        names = self.lora_targets(targets)
        return sum(layer.count * r * (linear.inputs + linear.outputs)
                   for layer in self.layers for linear in layer.linears
                   if linear.module and linear.name in names)  # fmt: skip


DEFAULT_TARGETS = ("q_proj", "v_proj", "c_attn", "query_key_value", "qkv_proj")
"""What peft adapts unless told otherwise; a family has either the first two or one of the rest."""


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a transformers config, as a dict (a config.json, or `.to_dict()`).

    What the dict leaves out has the default of the family's config class. Raises ValueError for
    an unknown family, with the known ones.
    """
    family = config.get("model_type", "")
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r}: choose from {', '.join(sorted(FAMILIES))}")
    build, defaults = FAMILIES[family]
    return build({**defaults, **{k: v for k, v in config.items() if v is not None}})


# --------------------------------------------------------------------- families with gated MLPs


def _gated(c: Mapping[str, Any]) -> Architecture:
    """Llama and its relatives: RMS norms, gate · up · down, grouped key-value heads."""
    family, h = c["model_type"], c["hidden_size"]
    a = c["num_attention_heads"]
    k, d = c.get("num_key_value_heads", a), c.get("head_dim", h // a)
    qkv = c.get("attention_bias", False) or family == "qwen2"
    out = c.get("attention_bias", False) and family != "qwen2"
    if family == "phi3":
        attention = (Linear("qkv_proj", h, (a + 2 * k) * d, part="attention"),
                     Linear("o_proj", a * d, h, part="attention"))  # fmt: skip
    else:
        attention = (
            Linear("q_proj", h, a * d, qkv, "attention"),
            Linear("k_proj", h, k * d, qkv, "attention"),
            Linear("v_proj", h, k * d, qkv, "attention"),
            Linear("o_proj", a * d, h, out, "attention"),
        )
    # Gemma 2 and 3 norm before and after each half; Qwen 3 and Gemma 3 norm queries and keys.
    norms = (4 if family in ("gemma2", "gemma3_text") else 2) * h
    norms += 2 * d if family in ("qwen3", "qwen3_moe", "gemma3_text") else 0
    dense, sparse = (Layer(n, attention + mlp, norms) for n, mlp in _mlps(c))
    return Architecture(
        family, h, a, k, d, c["vocab_size"], c["max_position_embeddings"],
        c["tie_word_embeddings"], tuple(layer for layer in (dense, sparse) if layer.count),
        embedding=c["vocab_size"] * h, final_norm=h, head_width=h,
        experts=_experts(c) if sparse.count else 1,
        active=c.get("num_experts_per_tok", 1) if sparse.count else 1,
    )  # fmt: skip


def _experts(c: Mapping[str, Any]) -> int:
    return c.get("num_local_experts") or c.get("num_experts") or 1


def _mlps(c: Mapping[str, Any]):
    """→ (dense layers, their MLP), (layers with experts, their router and experts)."""
    h, width, n = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    bias = c.get("mlp_bias", False)
    if c["model_type"] == "phi3":
        mlp = (Linear("gate_up_proj", h, 2 * width), Linear("down_proj", width, h))
    else:
        mlp = (Linear("gate_proj", h, width, bias), Linear("up_proj", h, width, bias),
               Linear("down_proj", width, h, bias))  # fmt: skip
    experts, sparse = _experts(c), 0
    if c["model_type"] == "mixtral":
        sparse = n
    elif c["model_type"] == "qwen3_moe":
        skip, step = c["mlp_only_layers"], c["decoder_sparse_step"]
        sparse = sum(i not in skip and (i + 1) % step == 0 for i in range(n))
        width = c["moe_intermediate_size"]
    mixture = (
        Linear("gate", h, experts, module=False),
        Linear("gate_up_proj", h, 2 * width, copies=experts, module=False),
        Linear("down_proj", width, h, copies=experts, module=False),
    )
    return (n - sparse, mlp), (sparse, mixture)


# ---------------------------------------------------------------------- GPT-2, GPT-NeoX and OPT


def _gpt2(c: Mapping[str, Any]) -> Architecture:
    h, width = c["n_embd"], c.get("n_inner") or 4 * c["n_embd"]
    linears = (
        Linear("c_attn", h, 3 * h, True, "attention"),
        Linear("c_proj", h, h, True, "attention"),
        Linear("c_fc", h, width, True),
        Linear("c_proj", width, h, True),
    )
    return Architecture(
        "gpt2", h, c["n_head"], c["n_head"], h // c["n_head"], c["vocab_size"], c["n_positions"],
        c["tie_word_embeddings"], (Layer(c["n_layer"], linears, 4 * h),),
        embedding=(c["vocab_size"] + c["n_positions"]) * h, final_norm=2 * h, head_width=h,
    )  # fmt: skip


def _neox(c: Mapping[str, Any]) -> Architecture:
    h, width, a = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    bias = c["attention_bias"]
    linears = (
        Linear("query_key_value", h, 3 * h, bias, "attention"),
        Linear("dense", h, h, bias, "attention"),
        Linear("dense_h_to_4h", h, width, True),
        Linear("dense_4h_to_h", width, h, True),
    )
    return Architecture(
        "gpt_neox", h, a, a, h // a, c["vocab_size"], c["max_position_embeddings"],
        c["tie_word_embeddings"], (Layer(c["num_hidden_layers"], linears, 4 * h),),
        embedding=c["vocab_size"] * h, final_norm=2 * h, head_width=h,
    )  # fmt: skip


def _opt(c: Mapping[str, Any]) -> Architecture:
    h, width, bias = c["hidden_size"], c["ffn_dim"], c["enable_bias"]
    a, narrow = c["num_attention_heads"], c.get("word_embed_proj_dim", c["hidden_size"])
    affine = 2 * h if c["layer_norm_elementwise_affine"] else 0
    linears = (
        *(Linear(n, h, h, bias, "attention") for n in ("q_proj", "k_proj", "v_proj", "out_proj")),
        Linear("fc1", h, width, bias),
        Linear("fc2", width, h, bias),
    )
    ends_in_norm = c["do_layer_norm_before"] and not c["_remove_final_layer_norm"]
    projections = 2 * narrow * h if narrow != h else 0
    return Architecture(
        "opt", h, a, a, h // a, c["vocab_size"], c["max_position_embeddings"],
        c["tie_word_embeddings"], (Layer(c["num_hidden_layers"], linears, 2 * affine),),
        # OPT's positions begin at 2: the table has two rows more than the context.
        embedding=c["vocab_size"] * narrow + (c["max_position_embeddings"] + 2) * h + projections,
        final_norm=affine if ends_in_norm else 0, head_width=narrow,
    )  # fmt: skip


UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (_gated, UNTIED),
    "mistral": (_gated, UNTIED),
    "qwen2": (_gated, UNTIED),
    "qwen3": (_gated, UNTIED | {"head_dim": 128}),
    "phi3": (_gated, UNTIED),
    "gemma": (_gated, TIED | {"head_dim": 256}),
    "gemma2": (_gated, TIED | {"head_dim": 256}),
    "gemma3_text": (_gated, TIED | {"head_dim": 256}),
    "mixtral": (_gated, UNTIED | {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen3_moe": (_gated, UNTIED | {"num_experts": 128, "num_experts_per_tok": 8,
                                    "mlp_only_layers": (), "decoder_sparse_step": 1}),
    "gpt2": (_gpt2, TIED | {"n_positions": 1024}),
    "gpt_neox": (_neox, UNTIED | {"attention_bias": True}),
    "opt": (_opt, TIED | {"enable_bias": True, "layer_norm_elementwise_affine": True,
                          "do_layer_norm_before": True, "_remove_final_layer_norm": False}),
}  # fmt: skip
"""By model_type: how to read the config, and what its class takes for granted."""
