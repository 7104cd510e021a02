"""Accounts of one training step: where in the step each byte is, on real or on fake tensors.

A fake tensor has a shape and a type but no numbers (`torch._subclasses.fake_tensor`). Code that
reads numbers, such as a loss to log or how many positions a mask selects, is given plain answers:
`FakeAccount`. `StepAccount` is the same account for real tensors: what the fake one is checked by.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from ..metering.flop_counter import operation_flops
from ..metering.memory_tracker import MemoryKey, MemoryTracker

aten = torch.ops.aten
Value = Any
"""An argument or a result of an operation: tensors, numbers, lists of them."""


class StepAccount(MemoryTracker):
    """An account that knows where in a step it is.

    `enter` begins a phase, which lasts until the next. A new storage is `logits` where its last
    dimension is one of `widths` (the vocabulary, or a tile of it), of the model whose pass it is;
    else it is of the current component.
    """

    def __init__(self, block: int = 1, widths: Iterable[int] = ()):
        super().__init__(block)
        self.widths = frozenset(widths)
        self.flops: Counter[MemoryKey] = Counter()
        """(phase, role) → FLOPs"""
        self.owners: dict[int, str] = {}
        """id of a parameter → its role"""
        self._blind = False

    @property
    def at(self) -> MemoryKey | None:
        """(phase, role) at hand"""
        return self._at

    def enter(self, phase: str, role: str, component: str = "activations") -> None:
        """A phase begins, and ends where the next begins. One met again keeps the higher peak."""
        if self._at != (phase, role):
            self._at = phase, role
            self._most = sum(self.peaks.get(self._at, {}).values())
            self._look()
        self.call(role, component)

    def call(self, role: str, component: str = "activations") -> MemoryKey:
        """New storages are of this role and component from now on; → what it was before."""
        before, self.label = self.label, (role, component)
        return before

    def count(self, flops: int) -> None:
        """Add work to the phase and role at hand."""
        if self._at:
            self.flops[self._at[0], self.label[0]] += flops

    @contextmanager
    def counted_as(self, passes: Fraction | int) -> Iterator[None]:
        """The work of this block stands for so many like it."""
        before = Counter(self.flops)
        yield
        for at, flops in self.flops.items():
            more = flops - before[at]
            self.flops[at] = before[at] + int(more * passes)

    def restart(self) -> None:
        """Forget what happened; what is alive stays."""
        self.peaks.clear()
        self.flops.clear()
        self.peak, self._most = self.total, 0

    def own_states(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's states belong to the roles of their parameters."""
        for parameter, state in optimizer.state.items():
            tensors = [x for x in tree_leaves(state) if isinstance(x, Tensor)]
            self.own(self.owners.get(id(parameter), ""), "optimizer", tensors)

    def __torch_dispatch__(
        self,
        func: OpOverload[..., Value],
        types: object,
        args: tuple[Value, ...] = (),
        kwargs: Mapping[str, Value] | None = None,
    ) -> Value:
        """Run one operation, count its work, and book what it made."""
        kwargs = dict(kwargs or {})
        if func.namespace == "prim":  # fake tensors are asked for their device
            return func(*args, **kwargs)
        out = self.answer(func, args, kwargs)
        if (flops := operation_flops(func, args, kwargs, out)) is not None:
            self.count(flops)
        # A gradient that reaches a value twice: without a dispatch mode autograd adds it in place
        # (torch/csrc/autograd/input_buffer.cpp), so the sum must not count beside its parts. The
        # old part is freed at once, and what is left is looked at with what comes next.
        self._blind = (
            func is aten.add.Tensor
            and self._at is not None
            and self._at[0] == "backward"
            and not torch.is_grad_enabled()
        )
        self.book(out)
        self._blind = False
        if self.block == 1 and torch.Tag.pointwise in func.tags:
            self._see_casts(func, args)
        return out

    def answer(
        self, func: OpOverload[..., Value], args: tuple[Value, ...], kwargs: dict[str, Value]
    ) -> Value:
        return func(*args, **kwargs)

    def _see_casts(self, func: OpOverload[..., Value], args: tuple[Value, ...]) -> None:
        """Within a pointwise operation on a CPU, inputs of another type than the common one are
        copies for a moment (ATen/TensorIterator.cpp); a GPU casts each number as it reads it."""
        inputs = [x for x in args if isinstance(x, Tensor) and x.dim()]
        if func._overloadpacket in _MASKED or len({x.dtype for x in inputs}) < 2:
            return
        common = reduce(torch.promote_types, (x.dtype for x in inputs))
        size = sum(x.numel() for x in inputs if x.dtype != common) * common.itemsize
        self._count((self.label[0], "workspace"), size)
        self._look()
        self._count((self.label[0], "workspace"), -size)

    def _look(self) -> None:
        if not self._blind:
            super()._look()

    def _add(self, tensor: Tensor, label: MemoryKey, relabel: bool = False) -> None:
        if not relabel and tensor.dim() > 1 and tensor.shape[-1] in self.widths:
            # A critic has no vocabulary: what autograd does between two passes is the policy's.
            role = "policy" if label[0] in ("reward", "value") else label[0]
            label = role, "logits"
        super()._add(tensor, label, relabel)


class FakeAccount(StepAccount):
    """An account that answers what cannot be known without numbers.

    A number read from a tensor is 1, a condition is true (but "less than", "is NaN" and "is
    infinite" are false), `unique` finds one value. A mask selects all positions; one of two
    dimensions (rows, n) selects `response` positions of each row where n is at least that, and
    the longest row of a mask is as long as the mask is wide.
    """

    def __init__(self, block: int = 1, widths: Iterable[int] = (), response: int = 0):
        super().__init__(block, widths)
        self.response = response

    def answer(
        self, func: OpOverload[..., Value], args: tuple[Value, ...], kwargs: dict[str, Value]
    ) -> Value:
        packet = func._overloadpacket
        if packet is aten._local_scalar_dense:
            return _number(args[0])
        if packet in _FOUND:
            return _FOUND[packet](self, *args)
        if packet in _SELECT:
            args = (args[0], self._positions(args[1]), *args[2:])
        out = func(*args, **kwargs)
        if packet in _FALSE:
            out.is_false = True
        elif packet is aten.sum and args[0].dtype == torch.bool and args[1:] == ([1],):
            out.longest = args[0].shape[1]
        elif packet is aten.max and hasattr(args[0], "longest"):
            out.longest = args[0].longest
        return out

    def selected(self, mask: Tensor) -> int:
        """How many positions a mask, (b, t) or any shape, selects."""
        if mask.dim() == 2 and 0 < self.response <= mask.shape[1]:
            return mask.shape[0] * self.response
        return mask.numel()

    def _positions(self, indices: Iterable[Tensor | None]) -> list[Tensor | None]:
        """Masks become positions, as the kernels themselves do it."""
        made: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                made.append(index)
            else:
                places = torch.zeros(self.selected(index), dtype=torch.long, device=index.device)
                made += [places] * index.dim()
        return made

    def _nonzero(self, mask: Tensor) -> Tensor:
        return torch.zeros(self.selected(mask), mask.dim(), dtype=torch.long, device=mask.device)

    def _masked_select(self, x: Tensor, mask: Tensor) -> Tensor:
        return x.new_empty(self.selected(mask))

    def _unique(self, x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
        places = torch.zeros(x.shape, dtype=torch.long)
        return x.new_empty(1), places, torch.zeros(1, dtype=torch.long)

    def _grouped_mm(self, a: Tensor, b: Tensor, ends: Tensor, *_: object) -> Tensor:
        """Experts: rows (S, m) by (groups, m, n), or (m, S) by (S, n); fake tensors refuse fp32."""
        shape = (a.shape[0], b.shape[2]) if b.dim() == 3 else (len(ends), a.shape[0], b.shape[1])
        return a.new_empty(shape)


_MASKED = {aten.where, aten.masked_fill, aten.masked_fill_}
_FALSE = {aten.lt, aten.isnan, aten.isinf}
_SELECT = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
_FOUND: dict[object, Callable[..., Value]] = {
    aten.nonzero: FakeAccount._nonzero,
    aten.masked_select: FakeAccount._masked_select,
    aten._unique2: FakeAccount._unique,
    aten._grouped_mm: FakeAccount._grouped_mm,
}


def _number(x: Tensor) -> bool | int | float:
    if x.dtype == torch.bool:
        return not getattr(x, "is_false", False)
    return 1.0 if x.dtype.is_floating_point else getattr(x, "longest", 1)


def materialise(model: nn.Module) -> nn.Module:
    """Give a model made on the meta device tensors of the current mode (fake ones, in a fake mode).

    Shared tensors stay shared, and each keeps its type and whether it is trained. Adapters must be
    in place before: peft cannot inject them into fake tensors.
    """
    made: dict[int, Tensor] = {}
    for module in model.modules():
        tables: tuple[dict[str, Value], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, old in table.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    trained = isinstance(old, nn.Parameter)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if trained else new
                table[name] = made[id(old)]
    return model
