"""A model's matrices, read off its config as a plain dict: parameters and LoRA, digit for digit.

    a = architecture({"model_type": "llama", "hidden_size": 64, ...})
    a.parameters(), a.by_part(), a.lora_parameters(r=16)

Pure arithmetic: imports no torch and no transformers, so that the planner opens anywhere. A family
is what its layer is made of: the linear maps (name, in, out, bias) and the width of its norms. The
same list gives parameters here, and FLOPs and activations elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from ..display import did_you_mean

PARTS = ("embedding", "attention", "mlp", "norms", "head")


@dataclass(frozen=True)
class Linear:
    """A linear map: `part` as in `PARTS`; `copies` counts experts.

    `lora`: what peft calls it, where that is not its name: fused maps have several names, each of
    which brings a rank of its own; () where peft does not reach it.
    """

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    part: str = "mlp"
    copies: int = 1
    lora: tuple[str, ...] | None = None

    @property
    def parameters(self) -> int:
        return self.copies * (self.inputs + self.bias) * self.outputs

    @property
    def targets(self) -> tuple[str, ...]:
        """The names by which peft adapts it."""
        return (self.name,) if self.lora is None else self.lora

    def rank(self, r: int, targets: tuple[str, ...]) -> int:
        """Rank of each copy's adapter under these `lora_targets`; 0 without one."""
        return r * sum(name in targets for name in self.targets)

    def lora_parameters(self, r: int, targets: tuple[str, ...]) -> int:
        """r · (inputs + outputs) for each copy (Hu et al. 2106.09685, section 4.1)."""
        return self.copies * self.rank(r, targets) * (self.inputs + self.outputs)


@dataclass(frozen=True)
class Layer:
    """`count` equal layers: their linear maps and the parameters of the norms of one of them."""

    count: int
    linears: tuple[Linear, ...]
    norms: int


@dataclass(frozen=True)
class Architecture:
    """A decoder: widths, and what its layers are made of.

    `embedding` counts token and position tables and the maps of `outer`; `final_norm` the norm
    before the head; `head_width` what the head reads. `experts`, `active`: of a mixture, else 1.
    `norm_first`: layers norm what they read, else what they hand on. `outer`: linear maps outside
    the layers, applied once to each token (OPT's to and from narrower embeddings).
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
    norm_first: bool = True
    outer: tuple[Linear, ...] = ()

    def __hash__(self) -> int:
        return self._hash  # segments of a model are looked up by it (`memory.py`)

    @cached_property
    def _hash(self) -> int:
        return hash((self.family, self.hidden, self.vocabulary, self.layers))

    @property
    def lm_head(self) -> Linear:
        """The map to the vocabulary; its weight is the embedding's where they are tied."""
        return Linear("lm_head", self.head_width, self.vocabulary, part="head")

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
        idle = sum(
            layer.count * linear.parameters * (self.experts - self.active) // self.experts
            for layer in self.layers
            for linear in layer.linears
            if linear.copies > 1
        )
        return self.parameters(head) - idle

    def lora_targets(
        self, targets: str | Iterable[str] | None = None, head: str = "lm"
    ) -> tuple[str, ...]:
        """The names that LoRA adapts, as peft 0.21 takes them: its default of the family,
        "all-linear" (every map but the head), or those you name.

        transformers fuses a mixture's experts into bare parameters. peft adapts them, and the
        router, under their names in the checkpoint: gate and up proj (w1 and w3) only together.
        Where the family is a mixture it reaches no dense MLP by a name that experts have too.

        Raises ValueError for names that are not there (peft passes over them as long as one is).
        """
        there = dict.fromkeys(name for _, linear in self._linears() for name in linear.targets)
        if targets is None:
            if self.family in NO_DEFAULT_TARGETS:
                raise ValueError(
                    f'peft has no default targets for {self.family}: name them, or "all-linear"'
                )
            return tuple(n for n in DEFAULT_TARGETS if n in there)
        if isinstance(targets, str):
            if targets.lower() == "all-linear":
                return tuple(there)
            raise ValueError(
                f'targets={targets!r}: choose "all-linear" or a list of names '
                "(peft reads another string as a pattern)"
            )
        wanted = tuple(dict.fromkeys(targets))
        if head == "lm":
            there |= dict.fromkeys(self.lm_head.targets)
        for name in wanted:
            if name not in there:
                raise ValueError(
                    f"no linear layer {name!r} in {self.family}: choose from {', '.join(there)}"
                )
        for _, linear in self._linears():
            lacking = [name for name in linear.targets if name not in wanted]
            if 0 < len(lacking) < len(linear.targets):
                raise ValueError(
                    f"{self.family} fuses {' and '.join(linear.targets)} into "
                    f"{linear.name}: name {lacking[0]} too, or neither"
                )
        return wanted

    def lora_parameters(
        self, r: int, targets: str | Iterable[str] | None = None, head: str = "lm"
    ) -> int:
        """Parameters trained with LoRA: the adapters; with head="score" (a reward model) also the
        score head, which is trained whole (peft's modules_to_save); "none": adapters alone."""
        names = self.lora_targets(targets, head)
        adapters = sum(n * linear.lora_parameters(r, names) for n, linear in self._linears())
        if head == "lm":
            return adapters + self.lm_head.lora_parameters(r, names)
        return adapters + self.by_part(head)["head"]

    def _linears(self) -> Iterator[tuple[int, Linear]]:
        """→ (how many of them, linear map): everything but the head."""
        yield from ((1, linear) for linear in self.outer)
        yield from ((layer.count, linear) for layer in self.layers for linear in layer.linears)


DEFAULT_TARGETS = ("q_proj", "v_proj", "c_attn", "query_key_value")
"""What peft adapts unless told otherwise; a family has either the first two or one of the rest."""

NO_DEFAULT_TARGETS = ("phi3", "mixtral", "qwen3_moe")
"""Families for which peft asks for names. (It has some for mixtral, and then finds none there.)"""


SIZES = (
    "vocab_size",
    "hidden_size",
    "n_embd",
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "num_hidden_layers",
    "n_layer",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "n_positions",
    "word_embed_proj_dim",
    "moe_intermediate_size",
    "num_local_experts",
    "num_experts",
    "num_experts_per_tok",
    "decoder_sparse_step",
)
"""Fields that have to be whole numbers above 0, where they are there."""


class _Fields(dict):
    """A config's fields; one that is asked for and not there is a ValueError."""

    def __missing__(self, name: str):
        raise ValueError(f"the {self['model_type']} config has no {name}")


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a transformers config, as a dict (a config.json, or `.to_dict()`).

    Of a nested config (Gemma 3 with images) it is that of the `text_config`. Sizes have to be
    there; what else the dict leaves out has the default of the family's config class. Raises
    ValueError for an unknown family, with the known ones, and for sizes that cannot be.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"a config is a dict, got a {type(config).__name__}: its .to_dict()?")
    if isinstance(config.get("text_config"), Mapping):
        # Whether the head is tied, the outer config says.
        tied = {k: config[k] for k in ("tie_word_embeddings",) if config.get(k) is not None}
        config = {**config["text_config"], **tied}
    family = str(config.get("model_type") or "")
    if family not in FAMILIES:
        hint = did_you_mean(family, FAMILIES)
        raise ValueError(f"model_type {family!r}: {hint}choose from {', '.join(sorted(FAMILIES))}")
    build, defaults = FAMILIES[family]
    fields = _Fields({k: v for k, v in {**defaults, **config}.items() if v is not None})
    for name in SIZES:
        value = fields.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"the {family} config has {name}={value!r}, no whole number above 0")
    return _same(build(fields))


@lru_cache(maxsize=64)
def _same(made: Architecture) -> Architecture:
    """Equal architectures are one object: what is kept of one (`memory.py`) is found at once."""
    return made


def _head_dim(c: Mapping[str, Any], width: str, heads: str) -> int:
    """Width of a head: the hidden size shared out evenly."""
    if c[width] % c[heads]:
        raise ValueError(
            f"the {c['model_type']} config has {width}={c[width]}, which "
            f"{heads}={c[heads]} does not divide"
        )
    return c[width] // c[heads]


# --------------------------------------------------------------------- families with gated MLPs


def _gated(c: Mapping[str, Any]) -> Architecture:
    """Llama and its relatives: RMS norms, gate · up · down, grouped key-value heads."""
    family, h = c["model_type"], c["hidden_size"]
    a = c["num_attention_heads"]
    k = c.get("num_key_value_heads", a)
    d = c.get("head_dim") or _head_dim(c, "hidden_size", "num_attention_heads")
    if a % k:
        raise ValueError(
            f"the {family} config has num_attention_heads={a}, which "
            f"num_key_value_heads={k} does not divide"
        )
    qkv = c.get("attention_bias", False) or family == "qwen2"
    out = c.get("attention_bias", False) and family != "qwen2"
    if family == "phi3":
        attention = (
            Linear("qkv_proj", h, (a + 2 * k) * d, part="attention"),
            Linear("o_proj", a * d, h, part="attention"),
        )
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
        family,
        h,
        a,
        k,
        d,
        c["vocab_size"],
        c["max_position_embeddings"],
        c["tie_word_embeddings"],
        tuple(layer for layer in (dense, sparse) if layer.count),
        embedding=c["vocab_size"] * h,
        final_norm=h,
        head_width=h,
        experts=_experts(c) if sparse.count else 1,
        active=c.get("num_experts_per_tok", 1) if sparse.count else 1,
    )


def _experts(c: Mapping[str, Any]) -> int:
    default = {"mixtral": 8, "qwen3_moe": 128}.get(c["model_type"], 1)
    return c.get("num_local_experts") or c.get("num_experts") or default


def _mlps(c: Mapping[str, Any]):
    """→ (dense layers, their MLP), (layers with experts, their router and experts)."""
    h, width, n = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    bias, family = c.get("mlp_bias", False), c["model_type"]
    if family == "phi3":
        mlp = (Linear("gate_up_proj", h, 2 * width), Linear("down_proj", width, h))
    else:
        lora = () if family == "qwen3_moe" else None  # its names stand for the experts
        mlp = (
            Linear("gate_proj", h, width, bias, lora=lora),
            Linear("up_proj", h, width, bias, lora=lora),
            Linear("down_proj", width, h, bias, lora=lora),
        )
    experts, sparse = _experts(c), 0
    if family == "mixtral":
        sparse = n
    elif family == "qwen3_moe":
        skip, step = c.get("mlp_only_layers", ()), c["decoder_sparse_step"]
        sparse = sum(i not in skip and (i + 1) % step == 0 for i in range(n))
        width = c["moe_intermediate_size"]
    up = ("w1", "w3") if family == "mixtral" else ("gate_proj", "up_proj")
    down = ("w2",) if family == "mixtral" else ("down_proj",)
    mixture = (
        Linear("gate", h, experts),
        Linear("gate_up_proj", h, 2 * width, copies=experts, lora=up),
        Linear("down_proj", width, h, copies=experts, lora=down),
    )
    return (n - sparse, mlp), (sparse, mixture)


# ---------------------------------------------------------------------- GPT-2, GPT-NeoX and OPT


def _gpt2(c: Mapping[str, Any]) -> Architecture:
    h, width = c["n_embd"], c.get("n_inner", 4 * c["n_embd"])
    linears = (
        Linear("c_attn", h, 3 * h, True, "attention"),
        Linear("c_proj", h, h, True, "attention"),
        Linear("c_fc", h, width, True),
        Linear("c_proj", width, h, True),
    )
    return Architecture(
        "gpt2",
        h,
        c["n_head"],
        c["n_head"],
        _head_dim(c, "n_embd", "n_head"),
        c["vocab_size"],
        c["n_positions"],
        c["tie_word_embeddings"],
        (Layer(c["n_layer"], linears, 4 * h),),
        embedding=(c["vocab_size"] + c["n_positions"]) * h,
        final_norm=2 * h,
        head_width=h,
    )


def _neox(c: Mapping[str, Any]) -> Architecture:
    h, width, a = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    bias, d = c["attention_bias"], _head_dim(c, "hidden_size", "num_attention_heads")
    linears = (
        Linear("query_key_value", h, 3 * h, bias, "attention"),
        Linear("dense", h, h, bias, "attention"),
        Linear("dense_h_to_4h", h, width, True),
        Linear("dense_4h_to_h", width, h, True),
    )
    return Architecture(
        "gpt_neox",
        h,
        a,
        a,
        d,
        c["vocab_size"],
        c["max_position_embeddings"],
        c["tie_word_embeddings"],
        (Layer(c["num_hidden_layers"], linears, 4 * h),),
        embedding=c["vocab_size"] * h,
        final_norm=2 * h,
        head_width=h,
    )


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
    outer = ()
    if narrow != h:
        outer = (
            Linear("project_in", narrow, h, part="embedding"),
            Linear("project_out", h, narrow, part="embedding"),
        )
    # OPT's positions begin at 2: the table has two rows more than the context.
    tables = c["vocab_size"] * narrow + (c["max_position_embeddings"] + 2) * h
    return Architecture(
        "opt",
        h,
        a,
        a,
        _head_dim(c, "hidden_size", "num_attention_heads"),
        c["vocab_size"],
        c["max_position_embeddings"],
        c["tie_word_embeddings"],
        (Layer(c["num_hidden_layers"], linears, 2 * affine),),
        embedding=tables + sum(linear.parameters for linear in outer),
        final_norm=affine if ends_in_norm else 0,
        head_width=narrow,
        norm_first=c["do_layer_norm_before"],
        outer=outer,
    )


UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (_gated, UNTIED),
    "mistral": (_gated, UNTIED | {"num_key_value_heads": 8}),
    "qwen2": (_gated, UNTIED | {"num_key_value_heads": 32}),
    "qwen3": (_gated, UNTIED | {"num_key_value_heads": 32, "head_dim": 128}),
    "phi3": (_gated, UNTIED),
    "gemma": (_gated, TIED | {"num_key_value_heads": 16, "head_dim": 256}),
    "gemma2": (_gated, TIED | {"num_key_value_heads": 4, "head_dim": 256}),
    # The published text_configs give only what differs from the class.
    "gemma3_text": (
        _gated,
        TIED
        | {
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
        },
    ),
    "mixtral": (_gated, UNTIED | {"num_key_value_heads": 8, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        _gated,
        UNTIED
        | {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
            "decoder_sparse_step": 1,
        },
    ),
    "gpt2": (_gpt2, TIED | {"n_positions": 1024}),
    "gpt_neox": (_neox, UNTIED | {"attention_bias": True}),
    "opt": (
        _opt,
        TIED
        | {
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
        },
    ),
}
"""By model_type: how to read the config, and what its class takes for granted."""
