"""A model's matrices, read off its config as a plain dict: parameters and LoRA, digit for digit.

    a = architecture({"model_type": "llama", "hidden_size": 64, ...})
    a.parameters(), a.by_part(), a.lora_parameters(r=16)

Pure arithmetic: imports no torch and no transformers, so that the planner opens anywhere. A family
is what its layer is made of (`families.py`): the linear maps (name, in, out, bias) and the width of
its norms. The same list gives parameters here, and FLOPs and activations elsewhere. Of a family
that has no entry there, `models/structure.py` reads the same list off the model itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from ..models.structure import Map, Structure, structure_of
from .decoder import PARTS as PARTS
from .decoder import Architecture as Architecture
from .decoder import Layer as Layer
from .decoder import Linear as Linear
from .families import FAMILIES, NORM_WEIGHTS, TEXT_PARTS, Bias, Family, Norms

SIZES = tuple(
    "vocab_size hidden_size n_embd d_model intermediate_size intermediate_size_mlp ffn_dim n_inner "
    "ffn_hidden_size num_hidden_layers n_layer n_layers num_attention_heads n_head n_heads "
    "num_key_value_heads num_kv_heads head_dim max_position_embeddings n_positions max_seq_len "
    "word_embed_proj_dim moe_intermediate_size shared_expert_intermediate_size num_local_experts "
    "num_experts n_routed_experts num_experts_per_tok decoder_sparse_step kv_lora_rank q_lora_rank "
    "interleave_moe_layer_step qk_rope_head_dim qk_nope_head_dim v_head_dim".split()
)
"""Fields that have to be whole numbers above 0, where they are there."""
ROUGH = (
    "{}: its matrices are known, the memory and time of its layers roughly; "
    "the x-ray runs the real code"
)
FUSED = (
    "{}: layers without keys and values are planned as fused kernels run them; without such "
    "kernels they take several times the memory and time, which the bands leave out"
)
CACHE = (
    "{}: what it keeps of a sequence (compressed keys and values, or a state of its own) is not "
    "known here: memory of generation and requests that fit are wrong; measure them"
)
WHOLE = (
    "{}: its config does not say which layers attend within a window: planned with whole attention"
)
WINDOWED = frozenset(("sliding_attention", "chunked_attention"))
"""Kinds of layers (`layer_types`) that attend to the last tokens only."""


@dataclass(frozen=True)
class _Config:
    """A config's fields, with the family's defaults and without those that are None."""

    family: str
    fields: Mapping[str, object]
    facts: Family

    def __contains__(self, name: str) -> bool:
        return self.facts.fields.get(name, name) in self.fields

    def size(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number above 0, by our name. Raises ValueError where it is not, or not there."""
        name = self.facts.fields.get(name, name)
        value = self.fields.get(name, default)
        if value is None:
            raise ValueError(f"the {self.family} config has no {name}")
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(
                f"the {self.family} config has {name}={value!r}, no whole number above {least - 1}"
            )
        return value

    def flag(self, name: str) -> bool:
        return bool(self.fields.get(name, False))

    def bias(self, fact: Bias, usual: str) -> bool:
        """Whether maps have a bias, by a fact of the family (`families.Bias`)."""
        return fact if isinstance(fact, bool) else self.flag(fact or usual)

    def share(self, name: str, of: str) -> int:
        """One size shared out evenly over another: a head's width of the hidden size."""
        whole, count = self.size(of), self.size(name)
        if whole % count:
            of, name = (self.facts.fields.get(n, n) for n in (of, name))
            raise ValueError(
                f"the {self.family} config has {of}={whole}, which {name}={count} does not divide"
            )
        return whole // count


def architecture(config: Mapping[str, object]) -> Architecture:
    """The architecture of a transformers config, as a dict (a config.json, or `.to_dict()`).

    Of a nested config (a model with images) it is that of the `text_config`, and its `remarks` say
    so. Sizes have to be there; what else the dict leaves out has the default of the family's config
    class. A family without an entry in `families.yaml` is built without weights, which imports
    torch. Raises ValueError, one line, for what is no decoder, and for sizes that cannot be.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"a config is a dict, got {type(config).__name__}: its .to_dict()?")
    inner, remarks = _text_part(config)
    family = str(inner.get("model_type") or "")
    family = TEXT_PARTS.get(family, family)
    known = family in FAMILIES
    read = _described(family, inner) if known else _undescribed(structure_of(config))
    facts = read.facts
    if read.cache_unknown:
        remarks = CACHE.format(read.family), *remarks
    if facts.rough:
        remarks += (ROUGH.format(read.family),)
    mamba = any(name.startswith("mamba_") for name in inner)
    alone = any(any(y.state) and not y.cached for y in read.layers)
    if facts.rough and (mamba or alone or read.cache_unknown):
        remarks += (FUSED.format(read.family),)
    if facts.every_expert:
        remarks += (f"{read.family}: transformers sends every token through every expert",)
    if read.windows_unknown:
        remarks += (WHOLE.format(read.family),)
    return _same(replace(read, remarks=remarks))


def _text_part(config: Mapping[str, object]) -> tuple[Mapping[str, object], tuple[str, ...]]:
    """→ (the config of the decoder, what has to be said of the rest)."""
    text = config.get("text_config")
    others = [name for name in ("audio", "speech", "vision") if config.get(f"{name}_config")]
    if isinstance(text, Mapping):
        # The outer config has whether the head is tied.
        tied = {k: config[k] for k in ("tie_word_embeddings",) if config.get(k) is not None}
        config = {**text, **tied}
    if not others:
        return config, ()
    return config, (f"planned by its text part: its {' and '.join(others)} part is not counted",)


def _described(family: str, config: Mapping[str, object]) -> Architecture:
    """By the facts of a family that has an entry."""
    facts = FAMILIES[family]
    fields = {"tie_word_embeddings": facts.tied, **facts.defaults, **config}
    for ours, theirs in facts.fields.items():  # the classes take both
        if fields.get(theirs) is None and ours in config:
            fields[theirs] = config[ours]
    c = _Config(family, {k: v for k, v in fields.items() if v is not None}, facts)
    for name in SIZES:
        if name in c.fields:
            c.size(name)
    made = (_opt if facts.layer == "opt" else _gated)(c, facts)
    return replace(made, reward_head=facts.reward_head)


def _undescribed(read: Structure) -> Architecture:
    """By what was read off the model."""

    def maps(found: Iterable[Map]) -> tuple[Linear, ...]:
        return tuple(Linear(*m[:6], None if m[6] is None else tuple(m[6])) for m in found)

    layers = tuple(
        Layer(n, maps(found), norms, kv, tuple((w, often) for w, often in windows), tuple(state))
        for n, found, norms, kv, state, windows in read["layers"]
    )
    return Architecture(**{**read, "layers": layers, "outer": maps(read["outer"])})


@lru_cache(maxsize=64)
def _same(a: Architecture) -> Architecture:
    """Equal architectures are one object, so that caches by architecture (`memory.py`) are fast."""
    return a


# ------------------------------------------------------------------------------ the gated layer


def _frame(c: _Config, facts: Family) -> Architecture:
    """Widths, heads and tables; layers are left out."""
    h, a, vocabulary = c.size("hidden_size"), c.size("num_attention_heads"), c.size("vocab_size")
    d = c.size("head_dim") if "head_dim" in c else c.share("num_attention_heads", of="hidden_size")
    tied, context = c.flag("tie_word_embeddings"), c.size("max_position_embeddings")
    rows = vocabulary + (context + facts.position_offset) * (facts.positions == "learned")
    return Architecture(c.family, h, a, a, d, vocabulary, context, tied, (), rows * h, 0, h)


def _gated(c: _Config, facts: Family) -> Architecture:
    """Llama and its relatives: norms, grouped key-value heads, an MLP or experts."""
    frame = _frame(c, facts)
    h, learns, norms = frame.hidden, NORM_WEIGHTS[facts.norm], _norms(c, facts)
    frame = replace(frame, norms=norms)
    if "kv_lora_rank" in c:
        frame, attention, vectors, cached = _latent(c, frame)
    else:
        frame = replace(frame, kv_heads=_kv_heads(c, frame.heads))
        attention, vectors = _attention(c, facts, frame)
        cached = 2 * frame.kv_heads * frame.head_dim
    vectors += NORMS_OF_LAYER[norms] * learns * h
    sparse = _sparse_layers(c) if facts.experts else set[int]()
    dense = set(range(c.size("num_hidden_layers"))) - sparse
    windows = _windows(c, facts)

    def of_kind(number: Collection[int], maps: tuple[Linear, ...]) -> Layer:
        near = Counter(windows[n] for n in number if windows and windows[n])
        return Layer(len(number), attention + maps, vectors, cached, tuple(near.items()))

    layers = []
    if dense:
        width = c.size(facts.dense_width, 4 * h if facts.four_times_wide else None)
        layers.append(of_kind(dense, _mlp(c, facts, width)))
    experts = active = 1
    if sparse:
        names = ("num_local_experts", "num_experts", "n_routed_experts")
        experts = c.size(next((n for n in names if n in c), names[0]), facts.experts)
        active = experts if facts.every_expert else c.size("num_experts_per_tok")
        layers.append(of_kind(sparse, _mixture(c, facts, experts)))
    return replace(
        frame,
        layers=tuple(layers),
        final_norm=learns * h,
        embedding=frame.embedding + facts.embedding_norm * learns * h,
        experts=experts,
        active=active,
        head_bias=c.bias(facts.head_bias, ""),
        windows_unknown=windows is None,
    )


def _windows(c: _Config, facts: Family) -> list[int] | None:
    """Of each layer how many tokens it attends to, 0: all, as transformers' config classes read
    it; None where that is not known."""
    depth, size = c.size("num_hidden_layers"), c.size("sliding_window", 0, least=0)
    switched = "use_sliding_window" in facts.defaults
    if not size or (switched and not c.flag("use_sliding_window")):
        return [0] * depth
    kinds, turning = c.fields.get("layer_types"), c.fields.get("no_rope_layers")
    every = c.size("sliding_window_pattern", facts.whole_every or 0, least=0)
    if isinstance(kinds, list | tuple) and len(kinds) == depth:
        near = [kind in WINDOWED for kind in kinds]
    elif facts.whole_every is None:
        return None
    elif c.family == "llama4_text" and isinstance(turning, list | tuple) and len(turning) == depth:
        near = [bool(turns) for turns in turning]
    else:
        counted = "max_window_layers" in facts.defaults
        first = c.size("max_window_layers", least=0) if counted else 0
        phase = 0 if facts.whole_first else 1
        near = [n >= first and not (every and (n + phase) % every == 0) for n in range(depth)]
    return [size * windowed for windowed in near]


def _kv_heads(c: _Config, heads: int) -> int:
    """Falcon says in two switches what others say in a number."""
    if "multi_query" in c and not c.flag("new_decoder_architecture"):
        return 1 if c.flag("multi_query") else heads
    k = c.size("num_key_value_heads", heads)
    if k != heads:
        c.share("num_key_value_heads", of="num_attention_heads")
    return k


NORMS_OF_LAYER = {"before": 2, "after": 2, "around": 4, "parallel": 1, "parallel_two": 2}
"""How many of the hidden width a layer has."""


def _norms(c: _Config, facts: Family) -> Norms:
    """Where a layer has its norms; some families have switches."""
    if "use_parallel_residual" in c:
        side_by_side: Norms = "parallel" if facts.norms == "before" else facts.norms
        return side_by_side if c.flag("use_parallel_residual") else "before"
    if "parallel_attn" not in c:
        return facts.norms
    pair = c.fields.get("num_ln_in_parallel_attn", 1 + c.flag("new_decoder_architecture")) == 2
    return ("parallel_two" if pair else "parallel") if c.flag("parallel_attn") else "before"


def _attention(c: _Config, facts: Family, frame: Architecture) -> tuple[tuple[Linear, ...], int]:
    """→ the maps of attention, and the numbers it learns beside them."""
    h, a, k, d = frame.hidden, frame.heads, frame.kv_heads, frame.head_dim
    bias = c.bias(facts.qkv_bias, "attention_bias")
    usual = "" if isinstance(facts.qkv_bias, bool) else "attention_bias"
    out = Linear(facts.out_map, a * d, h, c.bias(facts.out_bias, usual), "attention")
    vectors = a if facts.sinks else 0
    if facts.qk_norm and (not facts.qk_norm_if or c.flag(facts.qk_norm_if)):
        whole = facts.qk_norm == "whole"
        vectors += (a + k) * d if whole else 2 * NORM_WEIGHTS[facts.norm] * d
    if facts.qkv_map:
        return (Linear(facts.qkv_map, h, (a + 2 * k) * d, bias, "attention"), out), vectors
    widths = {"q_proj": a, "k_proj": k, "v_proj": k}
    maps = (Linear(name, h, n * d, bias, "attention") for name, n in widths.items())
    return (*maps, out), vectors


def _latent(c: _Config, frame: Architecture) -> tuple[Architecture, tuple[Linear, ...], int, int]:
    """Multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1): keys and values of all
    heads come from one narrow vector of a token, which is what the cache keeps. → the frame with
    the width of a head's queries, maps, numbers of norms, numbers in the cache."""
    h, a, bias = frame.hidden, frame.heads, c.flag("attention_bias")
    narrow, rotated = c.size("kv_lora_rank"), c.size("qk_rope_head_dim")
    query, value = c.size("qk_nope_head_dim") + rotated, c.size("v_head_dim")
    vectors = narrow
    queries: tuple[Linear, ...] = (Linear("q_proj", h, a * query, part="attention"),)
    if "q_lora_rank" in c:
        rank = c.size("q_lora_rank")
        queries = (
            Linear("q_a_proj", h, rank, bias, "attention"),
            Linear("q_b_proj", rank, a * query, part="attention"),
        )
        vectors += rank
    maps = (
        *queries,
        Linear("kv_a_proj_with_mqa", h, narrow + rotated, bias, "attention"),
        Linear("kv_b_proj", narrow, a * (query - rotated + value), part="attention"),
        Linear("o_proj", a * value, h, bias, "attention"),
    )
    frame = replace(frame, head_dim=query, kv_heads=a, value_width=value)
    return frame, maps, vectors, narrow + rotated


def _mlp(
    c: _Config, facts: Family, width: int, lora: tuple[str, ...] | None = None
) -> tuple[Linear, ...]:
    """The maps of an ordinary MLP, `width` wide."""
    h, bias = c.size("hidden_size"), c.bias(facts.mlp_bias, "mlp_bias")
    *up, down = facts.mlp_maps.split()
    if facts.experts and facts.expert_maps:
        lora = ()  # in a mixture these names mean the experts
    joint = 2 if facts.gated and len(up) == 1 else 1
    return (
        *(Linear(name, h, joint * width, bias, lora=lora) for name in up),
        Linear(down, width, h, bias, lora=lora),
    )


def _sparse_layers(c: _Config) -> set[int]:
    """Layers that have experts: those named, or every so manieth after the first that have none."""
    named, dense = c.fields.get("moe_layers"), c.fields.get("mlp_only_layers")
    layers = range(c.size("num_hidden_layers"))
    if isinstance(named, list | tuple):
        return set(named) & set(layers)
    step = c.size("decoder_sparse_step", c.size("interleave_moe_layer_step", 1))
    first = c.size("first_k_dense_replace", 0, least=0)
    dense = dense if isinstance(dense, list | tuple) else ()
    return {n for n in layers if n >= first and n not in dense and (n + 1) % step == 0}


def _mixture(c: _Config, facts: Family, experts: int) -> tuple[Linear, ...]:
    """Router and experts of a layer, and the expert of all tokens where there is one."""
    h, width = c.size("hidden_size"), c.size("moe_intermediate_size", c.size("intermediate_size"))
    names, bias = tuple(facts.expert_maps.split()), facts.expert_bias
    maps: tuple[Linear, ...] = (
        Linear(facts.router, h, experts, bias, lora=None if names or facts.router_linear else ()),
        Linear("gate_up_proj", h, 2 * width, bias, copies=experts, lora=names[:2]),
        Linear("down_proj", width, h, bias, copies=experts, lora=names[2:]),
    )
    if facts.shared_width:
        shared = c.size(facts.shared_width, 0, least=0)
        if facts.shared_width == "n_shared_experts":
            shared *= width
        if shared:
            maps += tuple(
                replace(x, name=f"shared_{x.name}", lora=x.targets) for x in _mlp(c, facts, shared)
            )
    if facts.shared_gate:
        maps += (Linear("shared_expert_gate", h, 1),)
    return maps


# -------------------------------------------------------------------------------------------- OPT


def _opt(c: _Config, facts: Family) -> Architecture:
    frame = _frame(c, facts)
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
    tables = frame.embedding - frame.vocabulary * (h - narrow)
    return replace(
        frame,
        layers=(Layer(c.size("num_hidden_layers"), linears, 2 * affine, 2 * h),),
        embedding=tables + sum(linear.parameters for linear in outer),
        final_norm=affine if ends_in_norm else 0,
        head_width=narrow,
        norm_first=c.flag("do_layer_norm_before"),
        outer=outer,
    )
