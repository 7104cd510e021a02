"""Weights in fewer bits: what they take, and what their kernels read (`quantization.yaml`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..stages import read_table
from .architecture import Architecture, Linear


@dataclass(frozen=True, kw_only=True)
class Format:
    """How weights of inference are kept; the fields are explained in the table."""

    source: str
    bits: float
    row_bits: float = 0.0
    head: bool = False
    fused_rows: int | None = None
    share: float = 1.0
    calls: float = 0.0
    engines: Sequence[str] = ("vllm",)
    products: str = ""
    products_share: float = 1.0

    def size(self, x: Linear) -> float:
        """Bytes of one copy of a map's weights with their scales; its bias stays in 16 bits."""
        weights = x.inputs * x.outputs * self.bits + x.outputs * self.row_bits
        return (weights + 16 * x.outputs * x.bias) / 8

    def moved(self, x: Linear, rows: float, itemsize: int) -> tuple[float, float]:
        """→ bytes of weights that a product of so many rows reads, and bytes' worth of what it
        takes to write them out before: read small, write at the speed of that kernel."""
        size = self.size(x)
        if self.fused_rows is None or rows <= self.fused_rows:
            return size, 0.0
        whole = float(x.inputs * x.outputs * itemsize)
        return whole, (size + whole) / self.share


_TABLE = read_table(Path(__file__).with_suffix(".yaml"))
FORMATS = {name: Format(**entry) for name, entry in _TABLE.items()}
"""Formats by name."""


def weight_bytes(model: Architecture, name: str, itemsize: int) -> float:
    """Bytes of a language model whose layers are in this format, the rest in `itemsize`."""
    kind, total = FORMATS[name], 0.0
    inside = [(y.count * x.copies, x) for y in model.layers for x in y.linears]
    if kind.head and not model.tied:
        inside.append((1, model.lm_head))
    for count, x in inside:
        total += count * kind.size(x)
    rest = model.parameters() - sum(count * x.parameters // x.copies for count, x in inside)
    return total + rest * itemsize
