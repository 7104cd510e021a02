"""A model's matrices, read off its config as a plain dict: parameters and LoRA, digit for digit.

    a = architecture({"model_type": "llama", "hidden_size": 64, ...})
    a.parameters(), a.by_part(), a.lora_parameters(r=16)

Pure arithmetic: imports no torch and no transformers, so that the planner opens anywhere. A family
is what its layer is made of (`families.py`): the linear maps (name, in, out, bias) and the width of
its norms. The same list gives parameters here, and FLOPs and activations elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from ..display import did_you_mean
from .families import FAMILIES, Family

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

    @property
    def facts(self) -> Family:
        """What its family does differently from others."""
        return FAMILIES[self.family]

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
            if not self.facts.lora_defaults:
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
"""What peft adapts by default; a family has either the first two or one of the rest."""

SIZES = tuple(
    "vocab_size hidden_size n_embd intermediate_size ffn_dim n_inner num_hidden_layers n_layer "
    "num_attention_heads n_head num_key_value_heads head_dim max_position_embeddings n_positions "
    "word_embed_proj_dim moe_intermediate_size num_local_experts num_experts num_experts_per_tok "
    "decoder_sparse_step".split()
)
"""Fields that have to be whole numbers above 0, where they are there."""


@dataclass(frozen=True)
class _Config:
    """A config's fields, with the family's defaults and without those that are None."""

    family: str
    fields: Mapping[str, object]

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number above 0. Raises ValueError where it is not, or not there."""
        value = self.fields.get(name, default)
        if value is None:
            raise ValueError(f"the {self.family} config has no {name}")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"the {self.family} config has {name}={value!r}, no whole number above 0"
            )
        return value

    def flag(self, name: str) -> bool:
        return bool(self.fields.get(name, False))

    def share(self, name: str, of: str) -> int:
        """One size shared out evenly over another: a head's width of the hidden size."""
        whole, count = self.size(of), self.size(name)
        if whole % count:
            raise ValueError(
                f"the {self.family} config has {of}={whole}, which {name}={count} does not divide"
            )
        return whole // count


def architecture(config: Mapping[str, object]) -> Architecture:
    """The architecture of a transformers config, as a dict (a config.json, or `.to_dict()`).

    Of a nested config (Gemma 3 with images) it is that of the `text_config`. Sizes have to be
    there; what else the dict leaves out has the default of the family's config class. Raises
    ValueError for an unknown family, with the known ones, and for sizes that cannot be.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"a config is a dict, got a {type(config).__name__}: its .to_dict()?")
    text = config.get("text_config")
    if isinstance(text, Mapping):
        # The outer config has whether the head is tied.
        tied = {k: config[k] for k in ("tie_word_embeddings",) if config.get(k) is not None}
        config = {**text, **tied}
    family = str(config.get("model_type") or "")
    if family not in FAMILIES:
        hint = did_you_mean(family, FAMILIES)
        raise ValueError(f"model_type {family!r}: {hint}choose from {', '.join(sorted(FAMILIES))}")
    facts = FAMILIES[family]
    fields = {"tie_word_embeddings": facts.tied, **facts.defaults, **config}
    c = _Config(family, {k: v for k, v in fields.items() if v is not None})
    for name in SIZES:
        if name in c.fields:
            c.size(name)
    build = {"gated": _gated, "gpt2": _gpt2, "gpt_neox": _gpt_neox, "opt": _opt}[facts.layer]
    return _same(build(c, facts))


@lru_cache(maxsize=64)
def _same(a: Architecture) -> Architecture:
    """Equal architectures are one object, so that caches by architecture (`memory.py`) are fast."""
    return a


def _frame(
    c: _Config,
    hidden: str = "hidden_size",
    heads: str = "num_attention_heads",
    context: str = "max_position_embeddings",
) -> Architecture:
    """Widths and heads, under these names in the config; layers and tables are left out."""
    h, a, vocabulary = c.size(hidden), c.size(heads), c.size("vocab_size")
    d = c.size("head_dim") if "head_dim" in c.fields else c.share(heads, of=hidden)
    tied = c.flag("tie_word_embeddings")
    return Architecture(
        c.family, h, a, a, d, vocabulary, c.size(context), tied, (), vocabulary * h, 0, h
    )


def _gated(c: _Config, facts: Family) -> Architecture:
    """Llama and its relatives: RMS norms, gate · up · down, grouped key-value heads."""
    frame = _frame(c)
    h, a, d = frame.hidden, frame.heads, frame.head_dim
    k = c.size("num_key_value_heads", a)
    if k != a:
        c.share("num_key_value_heads", of="num_attention_heads")
    qkv = facts.qkv_bias or c.flag("attention_bias")
    out = facts.qkv_bias is None and c.flag("attention_bias")
    attention: tuple[Linear, ...] = (
        Linear("q_proj", h, a * d, qkv, "attention"),
        Linear("k_proj", h, k * d, qkv, "attention"),
        Linear("v_proj", h, k * d, qkv, "attention"),
        Linear("o_proj", a * d, h, out, "attention"),
    )
    if facts.fused_maps:
        joint = Linear("qkv_proj", h, (a + 2 * k) * d, part="attention")
        attention = (joint, Linear("o_proj", a * d, h, part="attention"))
    norms = (4 if facts.norms_around else 2) * h + (2 * d if facts.qk_norm else 0)
    sparse = _sparse_layers(c) if facts.experts else 0
    layers = [Layer(c.size("num_hidden_layers") - sparse, attention + _dense(c, facts), norms)]
    experts = active = 1
    if sparse:
        experts = c.size("num_local_experts", c.size("num_experts", facts.experts))
        active = c.size("num_experts_per_tok")
        layers.append(Layer(sparse, attention + _mixture(c, facts, experts), norms))
    layers = [layer for layer in layers if layer.count]
    return replace(
        frame, kv_heads=k, layers=tuple(layers), final_norm=h, experts=experts, active=active
    )


def _dense(c: _Config, facts: Family) -> tuple[Linear, ...]:
    """Gate, up and down projection of an ordinary layer."""
    h, width, bias = c.size("hidden_size"), c.size("intermediate_size"), c.flag("mlp_bias")
    if facts.fused_maps:
        return Linear("gate_up_proj", h, 2 * width), Linear("down_proj", width, h)
    lora = () if facts.experts else None  # in a mixture these names mean the experts
    return (
        Linear("gate_proj", h, width, bias, lora=lora),
        Linear("up_proj", h, width, bias, lora=lora),
        Linear("down_proj", width, h, bias, lora=lora),
    )


def _sparse_layers(c: _Config) -> int:
    """Layers that have experts: every `decoder_sparse_step`-th that is not named as dense."""
    dense, step = c.fields.get("mlp_only_layers", ()), c.size("decoder_sparse_step")
    dense = dense if isinstance(dense, list | tuple) else ()
    layers = range(c.size("num_hidden_layers"))
    return sum(number not in dense and (number + 1) % step == 0 for number in layers)


def _mixture(c: _Config, facts: Family, experts: int) -> tuple[Linear, ...]:
    """Router and experts of a layer."""
    h, (*up, down) = c.size("hidden_size"), facts.expert_maps.split()
    width = c.size("moe_intermediate_size", c.size("intermediate_size"))
    return (
        Linear("gate", h, experts),
        Linear("gate_up_proj", h, 2 * width, copies=experts, lora=tuple(up)),
        Linear("down_proj", width, h, copies=experts, lora=(down,)),
    )


# ---------------------------------------------------------------------- GPT-2, GPT-NeoX and OPT


def _gpt2(c: _Config, facts: Family) -> Architecture:
    frame = _frame(c, "n_embd", "n_head", "n_positions")
    h, positions = frame.hidden, frame.context + facts.position_offset
    width = c.size("n_inner", 4 * h)
    linears = (
        Linear("c_attn", h, 3 * h, True, "attention"),
        Linear("c_proj", h, h, True, "attention"),
        Linear("c_fc", h, width, True),
        Linear("c_proj", width, h, True),
    )
    layers, embedding = (Layer(c.size("n_layer"), linears, 4 * h),), frame.embedding + positions * h
    return replace(frame, layers=layers, embedding=embedding, final_norm=2 * h)


def _gpt_neox(c: _Config, facts: Family) -> Architecture:
    frame = _frame(c)
    h, width, bias = frame.hidden, c.size("intermediate_size"), c.flag("attention_bias")
    linears = (
        Linear("query_key_value", h, 3 * h, bias, "attention"),
        Linear("dense", h, h, bias, "attention"),
        Linear("dense_h_to_4h", h, width, True),
        Linear("dense_4h_to_h", width, h, True),
    )
    layers = (Layer(c.size("num_hidden_layers"), linears, 4 * h),)
    return replace(frame, layers=layers, final_norm=2 * h)


def _opt(c: _Config, facts: Family) -> Architecture:
    frame = _frame(c)
    h, width, bias = frame.hidden, c.size("ffn_dim"), c.flag("enable_bias")
    affine = 2 * h if c.flag("layer_norm_elementwise_affine") else 0
    linears = (
        *(Linear(n, h, h, bias, "attention") for n in ("q_proj", "k_proj", "v_proj", "out_proj")),
        Linear("fc1", h, width, bias),
        Linear("fc2", width, h, bias),
    )
    ends_in_norm = c.flag("do_layer_norm_before") and not c.flag("_remove_final_layer_norm")
    narrow = c.size("word_embed_proj_dim", h)
    outer: tuple[Linear, ...] = ()
    if narrow != h:
        outer = (
            Linear("project_in", narrow, h, part="embedding"),
            Linear("project_out", h, narrow, part="embedding"),
        )
    tables = frame.vocabulary * narrow + (frame.context + facts.position_offset) * h
    return replace(
        frame,
        layers=(Layer(c.size("num_hidden_layers"), linears, 2 * affine),),
        embedding=tables + sum(linear.parameters for linear in outer),
        final_norm=affine if ends_in_norm else 0,
        head_width=narrow,
        norm_first=c.flag("do_layer_norm_before"),
        outer=outer,
    )
