"""What a model of any family is made of, read off the model itself, built without weights.

The planner knows the layers of many families by heart (`cost/families.yaml`); of every other
decoder that transformers has, the matrices are read here. Most of the seconds that takes go into
importing transformers: what was read is kept, in `structures/` of where the lab keeps what is of
this machine, and that of presets in `structures.json`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import version
from math import prod
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

from ..display import did_you_mean, first_line
from ..runs.json_files import JsonObject, lab_home, replace_file
from ..stages import read_table
from .names import presets

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

Map: TypeAlias = tuple[str, int, int, bool, str, int, tuple[str, ...] | None]
"""A linear map as `cost.decoder.Linear` has its fields: name, inputs, outputs, bias, part, copies,
and peft's names, () where it does not reach it."""
MIXERS = re.compile("attn|attention|mixer|mamba|ssm|conv|recurrent|time|lstm")
"""What the parts of a layer are called in which tokens see each other; the rest is its MLP."""
NO_CACHE = re.compile("linear|mamba|conv|recurrent")
"""Kinds of layers (`layer_types`) whose memory does not grow with the context."""
KEYS = re.compile(r"(index_)?(k|v|kv)_proj|kv_a_proj|project_[kv]$|W[kv]$")
JOINT = re.compile("qkv|query_key_value|c_attn")
"""Maps whose results are keys and values, or all of queries, keys and values."""
CROSS = re.compile("(encoder_attn|cross_?attn|cross_?attention)$", re.IGNORECASE)
"""Attention to an encoder, beside a decoder's own: nothing is cached for it without one."""
RECURRENT = {
    "DeltaNet": "num_v_heads head_k_dim head_v_dim",
    "DeltaAttention": "qkv_dim head_dim",
    "Mixer|MambaLayer": "intermediate_size ssm_state_size",
    "RecurrentBlock": "lru_width",
}
"""Modules (transformers 5.23) by the end of their class's name, and the fields whose product is the
size of the state that they keep of a sequence in fp32."""
NARROW = {
    "LightningAttention": "num_attention_heads head_dim head_dim",
    "CCAProjection": "v_proj_delayed.out_features",
}
"""The same of states as wide as the weights."""
CONTEXTS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
NO_LIMIT = 2**20
"""Tokens where a config names no longest row: state space models, ALiBi."""
ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")
WITH_MORE = frozenset(
    "dots3_note emu3 fuyu gemma3 gemma3n gemma4 gemma4_assistant gemma4_unified "
    "gemma4_unified_assistant got_ocr2 llama4 mllama moss_transcribe_diarize qwen3_5 qwen3_5_moe "
    "qwen4_exp".split()
)
"""Types of models with a text part and others (images, sound) that transformers 5.23 loads as a
language model (AutoModelForCausalLM), which is what the trainers train."""
Structure: TypeAlias = JsonObject
"""The fields of `cost.decoder.Architecture`; a layer is how many there are of it, its maps, other
numbers that it learns, numbers in its cache, and (tokens, layers) of those with a window."""
PEFT_NAMES = {"mixtral": ("w1", "w3", "w2"), "qwen2_moe": ("gate_proj", "up_proj", "down_proj")}
"""What peft 0.21 calls an expert's maps, by the pattern that transformers converts a family's
checkpoints with; of other families it reaches no experts."""
OWN_HEADS = frozenset(
    "modernbert-decoder recurrent_gemma xlstm inkling_text inkling2_text prophetnet bert big_bird "
    "camembert data2vec-text electra ernie megatron-bert rembert roberta roberta-prelayernorm "
    "roc_bert roformer xlm-roberta xlm-roberta-xl xmod".split()
)
"""Types of models (transformers 5.23) that do more between trunk and logits than PPO's
`language_head` and TRL 1.16's fused head know: a dense layer, a norm, a cap of another name."""
NO_KEYS = frozenset("falcon_mamba mamba mamba2 openai-gpt reformer rwkv xlm xlnet".split())
"""Types of models (transformers 5.23) whose outputs have no `past_key_values`, with which responses
are sampled: a state of their own, or nothing."""


def not_loaded(config: Mapping[str, object]) -> str:
    """Why the trainers cannot load a model that can be planned by its text part; "" if they can."""
    kind = config.get("model_type")
    if "text_config" not in config or kind in WITH_MORE:
        return ""
    return (
        f"planned only: {kind} does not load as a language model (AutoModelForCausalLM), which is "
        "what is trained"
    )


def check_head(kind: str) -> None:
    """Raises ValueError, one line, for a type of models whose logits are no plain product of the
    trunk's states, or that keeps no keys and values."""
    if kind in NO_KEYS:
        raise ValueError(
            f"{kind} keeps no keys and values (past_key_values), with which responses are sampled "
            "here: transformers' Trainer trains it"
        )
    if kind in OWN_HEADS:
        raise ValueError(
            f"{kind} has layers of its own between trunk and logits, which neither PPO nor TRL's "
            "trainers run: transformers' Trainer trains it"
        )


def structure_of(config: Mapping[str, object]) -> Structure:
    """The structure of a transformers config, as a dict: kept from an earlier time, or read now.

    Raises ValueError, one line, for what is no decoder of the installed transformers.
    """
    shipped: dict[str, Structure] = read_table(__file__, "structures.json")
    for hub_id, structure in shipped.items():
        if presets()[hub_id] == config:
            return structure
    return _kept(json.dumps(config, sort_keys=True, default=str))


@cache
def _kept(config: str) -> Structure:
    reader = Path(__file__).read_text("utf-8")  # another one reads anew
    key = hashlib.sha256(f"{version('transformers')} {config} {reader}".encode()).hexdigest()
    file = lab_home() / "structures" / f"{key[:32]}.json"
    try:
        kept: Structure = json.loads(file.read_text("utf-8"))
        return kept
    except (OSError, ValueError):
        structure = read(json.loads(config, object_hook=_number))  # none yet, or a damaged one
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, json.dumps(structure))
    except OSError:
        pass  # a machine that keeps nothing reads it again
    return structure


def matrix_names(config: Mapping[str, object]) -> list[str]:
    """Dotted names of the modules of a config's model that hold a matrix. Raises ValueError for
    what is no decoder alone."""
    model, *_ = _build(config)
    weights = ((name, getattr(m, "weight", None)) for name, m in model.named_modules())
    return [name for name, weight in weights if weight is not None and weight.dim() > 1]


def _number(found: JsonObject) -> JsonObject | float:
    """Infinite numbers, as transformers writes them into a config.json."""
    return float(found["__float__"]) if "__float__" in found else found


def read(config: Mapping[str, object]) -> Structure:
    """Build the model on `meta`, and look at it."""
    model, head, own, scores = _build(config)
    table = cast("nn.Embedding", model.get_input_embeddings())
    hidden, seen = _size(own, "hidden_size"), set[int]()
    heads = _size(own, "num_attention_heads", default=1)
    kv_heads = _size(own, "num_key_value_heads", default=heads)
    head_dim = _size(own, "head_dim", default=hidden // heads)
    kinds: dict[tuple[tuple[Map, ...], int, int, tuple[int, int]], list[int]] = {}
    depth = _size(own, "num_hidden_layers", default=0)
    layers = _stack(model, depth)
    # HRM runs its layers several times, each with a cache of its own.
    times = max(1, depth // max(1, len(layers)))
    windows, unknown = _windows(own)
    types = getattr(own, "layer_types", None) or [""] * len(layers)
    joint = 2 * kv_heads * head_dim
    extra = _size(own, "prompt_length", default=0)  # CPM-Ant's own tokens before every prompt
    for layer, kind, window in zip(layers, types, windows or [0] * len(layers)):
        maps, tables, vectors = _parts(layer, seen, hidden)
        cached = 0 if NO_CACHE.search(kind) else times * _cached(layer, hidden, joint)
        narrow, wide = _state(layer)
        state = narrow + extra * cached, wide
        unknown |= bool(NO_CACHE.search(kind)) and not any(state)
        key = _as_peft_names(maps, own.model_type), tables + vectors, cached, state
        kinds.setdefault(key, []).append(window)
    unknown |= not any(cached or any(state) for *_, cached, state in kinds)
    head_weight = table.weight if head is None else head.weight
    seen |= {id(p) for p in (table.weight, *([] if head is None else head.parameters()))}
    outer, tables, vectors = _parts(model, seen, hidden)
    tables += table.weight.numel()
    return {
        "family": str(own.model_type),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocabulary": head_weight.shape[0],
        "context": _size(own, *CONTEXTS, default=NO_LIMIT),
        "tied": head_weight is table.weight,
        "layers": [
            (len(near), *key, [*Counter(w for w in near if w).items()])
            for key, near in kinds.items()
        ],
        "windows_unknown": windows is None and not unknown,
        "cache_unknown": unknown,
        "embedding": tables + sum(n * (i + b) * o for _, i, o, b, _, n, _ in outer),
        "final_norm": vectors,
        "head_width": hidden if head is None else head.weight.shape[1],
        "experts": max((m[5] for maps, *_ in kinds for m in maps), default=1),
        "active": _size(own, *ACTIVE, default=1),
        "outer": outer,
        "head_bias": head is not None and head.bias is not None,
        "reward_head": scores,
    }


def _cached(layer: nn.Module, hidden: int, joint: int) -> int:
    """Numbers that a token leaves in a layer's cache of keys and values, also where several layers
    share their matrices. `joint`: of a layer with one map for queries, keys and values."""
    if "CrossAttention" in type(layer).__name__:  # to what text does not have
        return 0
    crossed = [m for name, m in layer.named_modules() if CROSS.search(name)]
    maps, _, _ = _parts(layer, {id(p) for m in crossed for p in m.parameters()}, hidden)
    cached = sum(m[2] * m[5] for m in maps if KEYS.match(m[0]))
    if not cached and any(JOINT.search(name.lower()) for name, *_ in maps):
        cached = joint
    # Keys of an indexer (DeepSeek-V3.2's sparse attention); dots3's are fp32, each as two numbers.
    for module in layer.modules():
        if cached and (name := type(module).__name__).endswith("Indexer"):
            cached += cast("int", module.head_dim) * (2 if name.startswith("Dots3") else 1)
    return cached


def _state(layer: nn.Module) -> tuple[int, int]:
    """→ numbers that a layer keeps of a sequence of any length, as wide as its weights (mostly the
    last inputs of convolutions), and in fp32."""
    sizes = [0, 0]
    for module in layer.modules():
        name = type(module).__name__
        for wide, table in enumerate((NARROW, RECURRENT)):
            for end, fields in table.items():
                if re.search(f"({end})$", name):
                    sizes[wide] += prod(attrgetter(f)(module) for f in fields.split())
        if kernel := getattr(module, "conv_kernel_size", getattr(module, "conv1d_width", 1) - 1):
            weights = {n: p for n, p in module.named_parameters() if re.search("conv|static", n)}
            called, weight = next(iter(weights.items()))
            channels = weight.shape["static" in called]  # of Inkling 2's: (kernel, channels)
            sizes["ShortConvolution" in name] += kernel * channels
    return sizes[0], sizes[1]


def _windows(config: PreTrainedConfig) -> tuple[list[int] | None, bool]:
    """→ of each layer how many tokens it attends to, 0: all, as transformers' cache of the model
    has it, None where that is not known; and whether it keeps something else than the last keys and
    values, or a state."""
    from transformers import DynamicCache, cache_utils

    try:
        layers = DynamicCache(config=config).layers
    except (AttributeError, KeyError, TypeError, ValueError):  # no types, or unknown ones
        return None, False
    if any(type(layer).__module__ != cache_utils.__name__ for layer in layers):
        return None, True
    return [getattr(layer, "sliding_window", 0) for layer in layers], False


def _build(
    config: Mapping[str, object],
) -> tuple[PreTrainedModel, nn.Linear | None, PreTrainedConfig, bool]:
    """→ the decoder, on `meta`; its head, of which it may be a part; its config; whether
    transformers puts a `score` head on it, which reward models are made with."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers import AutoModelForMaskedLM as Encoders
    from transformers import AutoModelForSequenceClassification as Scored
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from .hub import quiet_transformers

    fields = dict(config)
    family = str(fields.pop("model_type", "") or "")
    if family not in CONFIG_MAPPING:
        line = f"model_type {family!r}: transformers {version('transformers')} does not know it; "
        if "auto_map" in fields:
            raise ValueError(
                f"{line}its code comes with the model (auto_map), and is not read here"
            )
        raise ValueError((line + did_you_mean(family, CONFIG_MAPPING, near=0.75)).rstrip("; "))
    try:
        with quiet_transformers(), torch.device("meta"):
            whole = AutoConfig.for_model(family, **fields)
            text = whole.get_text_config(decoder=True)
            encoder = type(text) in Encoders._model_mapping and not getattr(text, "is_decoder", 1)
            alone = type(text) in AutoModelForCausalLM._model_mapping
            auto = AutoModelForCausalLM if alone else AutoModelForImageTextToText
            of = text if alone else whole
            if type(of) in auto._model_mapping and not (whole.is_encoder_decoder or encoder):
                model = auto.from_config(of)  # type: ignore[no-untyped-call]
                decoder = model if alone else model.get_decoder()
                scores = type(whole) in Scored._model_mapping
                scores = scores and hasattr(Scored.from_config(whole), "score")
                return decoder, model.get_output_embeddings(), text, scores
    except Exception as error:  # a config that cannot be raises whatever its class raises
        line = f"no {family} model can be made of this config: {first_line(error)}"
        raise ValueError(line) from None
    raise ValueError(f"model_type {family!r}: not a decoder alone, which is what the stages train")


def _size(config: PreTrainedConfig, *names: str, default: int | None = None) -> int:
    """The first of these fields that is a number above 0."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except RuntimeError:  # it differs from layer to layer: the first one's
            value = getattr(config.per_layer_config[0], name, None)
        if isinstance(value, int) and value > 0:
            return value
    if default is None:
        raise ValueError(f"the {config.model_type} config has no {names[0]}")
    return default


def _stack(model: nn.Module, depth: int) -> list[nn.Module]:
    """The layers: of all lists of modules, those as long as the config says before others, the one
    with the most parameters, and those like it."""
    from torch.nn import ModuleList

    lists = [m for m in model.modules() if type(m) is ModuleList and len(m)]
    sizes = [(len(m) == depth, sum(p.numel() for p in m.parameters())) for m in lists]
    largest = type(lists[sizes.index(max(sizes))][0]) if lists else None
    return [layer for found in lists if type(found[0]) is largest for layer in found]


def _parts(root: nn.Module, seen: set[int], hidden: int) -> tuple[tuple[Map, ...], int, int]:
    """→ the maps under a module whose parameters were not `seen`, numbers of other tables, numbers
    of vectors. Experts that are modules of their own are one map with as many copies."""
    maps: dict[str, Map] = {}
    tables = vectors = 0
    for path, module in root.named_modules():
        own = {n: p for n, p in module.named_parameters(recurse=False) if id(p) not in seen}
        seen |= {id(p) for p in own.values()}
        for found in _maps(path, module, own, hidden):
            key = re.sub(r"\.\d+\.", ".*.", path) + f".{found[0]}"
            copies = maps[key][5] if key in maps else 0
            maps[key] = (*found[:5], copies + found[5], found[6])
        tables += sum(p.numel() for p in own.values() if p.dim() > 1)
        vectors += sum(p.numel() for p in own.values() if p.dim() < 2)
    return tuple(maps.values()), tables, vectors


def _maps(path: str, module: nn.Module, own: dict[str, nn.Parameter], hidden: int) -> Iterator[Map]:
    """The linear maps that are a module's own parameters, which are taken out of `own`: those of
    linear modules, and routers (experts, inputs) and experts (experts, …) that are bare."""
    from torch.nn import Embedding, Linear
    from transformers.pytorch_utils import Conv1D

    leaf, part = path.rpartition(".")[2], "attention" if MIXERS.search(path) else "mlp"
    module_is_linear = isinstance(module, Linear | Conv1D)
    for name, weight in list(own.items()):
        shape = tuple(weight.shape)
        copies, sides = (shape[0], shape[1:]) if len(shape) == 3 else (1, shape)
        bare = not module_is_linear and hidden in sides and "conv" not in path
        if len(sides) != 2 or isinstance(module, Embedding) or not (module_is_linear or bare):
            continue
        bias = own.pop(f"{name}_bias" if copies > 1 else "bias", None) is not None
        del own[name]
        wide = max(sides, key=lambda side: side != hidden)
        inputs, outputs = (wide, hidden) if "down" in name else (hidden, wide)
        if module_is_linear:
            inputs, outputs = sides if isinstance(module, Conv1D) else sides[::-1]
        called = leaf if name == "weight" else name
        yield called, inputs, outputs, bias, part, copies, None if module_is_linear else ()


def _as_peft_names(maps: tuple[Map, ...], family: str) -> tuple[Map, ...]:
    """The maps of a layer with the names that peft has for a mixture's."""
    from transformers import conversion_mapping

    patterns: dict[str, str] = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    names = PEFT_NAMES.get(patterns.get(family, ""), ())
    bare = {"gate_up_proj": names[:2], "down_proj": names[2:], "gate": ("gate",)} if names else {}
    return tuple(
        (*m[:6], () if m[0] in names else None) if m[6] is None else (*m[:6], bare.get(m[0], ()))
        for m in maps
    )
