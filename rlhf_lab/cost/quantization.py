"""Weights in fewer bits: what they take, and what their kernels read (`quantization.yaml`)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..stages import read_table
from .architecture import Architecture, Linear


@dataclass(frozen=True, kw_only=True)
class Format:
    """How weights of inference are kept; the fields are explained in the table."""

    source: str
    bits: float
    row_bits: float = 0.0
    head: bool = False
    entry: float = 0.0
    checkpoint: Sequence[str] = ()
    fused_rows: int | None = None
    share: float = 1.0
    calls: float = 0.0
    engines: Sequence[str] = ("vllm",)
    products: str = ""
    products_share: float = 1.0

    def size(self, x: Linear, itemsize: int = 2) -> float:
        """Bytes of one copy of a map's weights with their scales; its bias stays as wide as the
        model was, `itemsize` bytes a number."""
        row = self.row_bits + 8 * itemsize * x.bias
        return (x.inputs * x.outputs * self.bits + x.outputs * row) / 8

    def moved(self, x: Linear, rows: float, itemsize: int) -> tuple[float, float]:
        """→ bytes of weights that a product of so many rows reads, and bytes' worth of what it
        takes to write them out before: read small, write at the speed of that kernel."""
        size = self.size(x)
        if self.fused_rows is None or rows <= self.fused_rows:
            return size, 0.0
        whole = float(x.inputs * x.outputs * itemsize)
        return whole, (size + whole) / self.share


GROUPS = (128, 64, 32, -1)
"""Weights that share a scale and a zero in GPTQ and AWQ; -1: all of an output row."""


def _formats() -> Iterator[tuple[str, Format]]:
    """The entries of the table; `packed`: bits of a packed weight, in groups of `GROUPS`, each with
    a scale in 16 bits and a zero as wide as a weight."""
    for name, entry in read_table(__file__).items():
        packed = entry.pop("packed", ())
        kind = Format(**{"bits": 0.0, **entry})
        if not packed:
            yield name, kind
        for bits, group in ((b, g) for b in packed for g in GROUPS):
            words = [*kind.checkpoint, f'"bits": {bits}', f'"group_size": {group}']
            rows = {"row_bits": 16 + bits, "bits": bits}
            size = rows if group < 0 else {"bits": bits + (16 + bits) / group}
            usual = (bits, group) == (4, 128)
            full = name if usual else f"{name}_{bits}_{'row' if group < 0 else f'g{group}'}"
            yield full, replace(kind, checkpoint=words, **size)


FORMATS: dict[str, Format] = dict(_formats())
"""Formats by name."""


ENTRY = 105.0
"""Bytes that the header of a safetensors file takes for a tensor: name, dtype, shape, offsets."""


def _inside(model: Architecture, head: bool) -> list[tuple[int, Linear]]:
    """The maps of all layers, the one to the vocabulary too where a format reaches it (`head`), and
    how often the model has each."""
    inside = [(y.count * x.copies, x) for y in model.layers for x in y.linears]
    return inside + [(1, model.lm_head)] * (head and not model.tied)


def weight_bytes(model: Architecture, name: str, itemsize: int, head: str = "lm") -> float:
    """Bytes of a model whose layers are in this format, the rest in `itemsize`. `head`: "lm", or
    "score" of a reward model."""
    kind = FORMATS[name]
    inside = _inside(model, kind.head)
    rest = model.parameters(head) - sum(n * x.parameters // x.copies for n, x in inside)
    return sum(n * kind.size(x, itemsize) for n, x in inside) + rest * itemsize


def file_bytes(model: Architecture, name: str, itemsize: int, head: str = "lm") -> float:
    """The same of its safetensors file ("none": as it is), with what the header and the tables of a
    format take."""
    kind = FORMATS.get(name)
    plain = float(model.parameters(head) * itemsize)
    maps = _inside(model, kind is not None and kind.head)
    others = 2 * model.depth + 2 + sum(n * x.bias for n, x in maps)
    tables = sum(n for n, _ in maps) * (kind.entry if kind else ENTRY) + others * ENTRY
    return (weight_bytes(model, name, itemsize, head) if kind else plain) + tables


_WHOLE = ("llm_int8_skip_modules", "modules_to_not_convert", "ignore")
_PARTLY = ("dynamic", "lm_head", "modules_in_block_to_quantize", "include_input_output_embeddings")
"""Keys of a quantization_config under which some of a model is in another format than the rest."""
_DEFAULTS: dict[str, dict[str, object]] = {
    "bitsandbytes": {"load_in_4bit": False, "bnb_4bit_use_double_quant": False},
    "gptq": {"group_size": 128},
    "awq": {"bits": 4, "group_size": 128},
}
"""What transformers 5.23 takes where a key is left out (utils/quantization_config.py)."""


def quantised(config: Mapping[str, object]) -> dict[str, object]:
    """The `quantization_config` of a transformers config with its method and the defaults of keys
    that are left out; {} where weights are whole."""
    fields = config.get("quantization_config")
    if not isinstance(fields, dict) or not fields:
        return {}
    small = fields.get("load_in_4bit") or fields.get("load_in_8bit")
    method = "bitsandbytes" if small else str(fields.get("quant_method", "unknown"))
    first = {"quant_method": method, **_DEFAULTS.get(method, {})}
    return first | fields | {"quant_method": method}


def format_of(config: Mapping[str, object]) -> str:
    """The format that a transformers config says its checkpoint is in; "none" where it says none.
    Raises ValueError for one that is not in the table, or of which some layers are kept whole."""
    fields = quantised(config)
    if not fields:
        return "none"
    written = json.dumps(fields, default=str)
    whole = [str(x) for key in _WHOLE for x in fields.get(key) or ()]  # type: ignore[attr-defined]
    outside = r"(norm|gate|lm_head|score|router)$|vis"
    inside = r"layers|\.h\.|_proj$|mlp|attn|attention|experts"
    named = [x for x in whole if not re.search(outside, x) and re.search(inside, x)]
    named += [key for key in _PARTLY if fields.get(key)]
    if named:
        raise ValueError(
            f"weights in a format that is not modelled: {fields['quant_method']} of a part of the "
            f"model ({named[0]})"
        )
    for name, kind in FORMATS.items():
        if kind.checkpoint and all(words in written for words in kind.checkpoint):
            return name
    raise ValueError(f"weights in a format that is not modelled: {written[:80]}")
