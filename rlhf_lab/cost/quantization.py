"""Weights in fewer bits: what they take, and what their kernels read (`quantization.yaml`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


_TABLE = read_table(__file__)
FORMATS: dict[str, Format] = {name: Format(**entry) for name, entry in _TABLE.items()}
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


def format_of(config: Mapping[str, object]) -> str:
    """The format that a transformers config says its checkpoint is in; "none" where it says none.
    Raises ValueError for one that is not in the table."""
    written = json.dumps(config.get("quantization_config") or "", default=str)
    if written == '""':
        return "none"
    for name, kind in FORMATS.items():
        if kind.checkpoint and all(words in written for words in kind.checkpoint):
            return name
    raise ValueError(f"weights in a format that is not modelled: {written[:80]}")
