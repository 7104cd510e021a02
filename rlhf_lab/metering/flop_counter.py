"""Counting floating-point operations: every matrix product of our stages, real or fake tensors.

The convention is that of `torch.utils.flop_counter`: a product of m×k by k×n counts 2·m·n·k,
attention counts all query–key pairs (a causal kernel that skips half of them counts in full), its
fused backward five products where the forward has two (the scores are made again), and nothing
but matrix products counts. Added are the operations that torch's table leaves out: attention on a
CPU, in-place products (the gradients of TRL's fused head) and grouped products (experts).

`FlopCounter` reads torch's table without counting by module, which makes it several times
cheaper, and it decomposes no operation that has a kernel (torch's counter does, which changes
the memory of what it counts).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .memory_tracker import Args, Kwargs, Operation, PhaseKey

# ------------------------------------------------------------------------------------ the formulas
# Each takes an operation's arguments, and → FLOPs. Tensors are used for their shapes only.

Formula: TypeAlias = Callable[..., int]


def _product(a: Tensor, b: Tensor, *_: object, **__: object) -> int:
    """(…, m, k) @ (…, k, n), or (m, k) @ (k,): 2 for every element of `a` per column of `b`."""
    return 2 * a.numel() * (b.shape[-1] if b.dim() > 1 else 1)


def _added_product(_: object, a: Tensor, b: Tensor, *__: object, **___: object) -> int:
    """c + a @ b: the sum itself does not count."""
    return _product(a, b)


def _grouped(a: Tensor, b: Tensor, offsets: Tensor | None = None, *_: object, **__: object) -> int:
    """Rows of `a` times the matrix of their group; or (m, S) @ (S, n) cut into groups along S."""
    if a.dim() == 3 and b.dim() == 2:  # groups of b's columns
        return 2 * a.shape[1] * b.numel()
    return _product(a, b)


def _grouped_backward(a: Tensor, weight: Tensor, *_: object, **__: object) -> int:
    """Gradients of the rows and of the groups' matrices: a product each."""
    return 2 * _grouped(a, weight)


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> int:
    """q (b, a, s, d), k and v with fewer heads perhaps (GQA): scores, and scores · v."""
    return 2 * prod(q.shape[:3]) * k.shape[2] * (q.shape[3] + v.shape[3])


def _attention_backward(
    _: object, q: Tensor, k: Tensor, v: Tensor, *__: object, **___: object
) -> int:
    """The scores again, their gradient, and the gradients of v, q and k: five products."""
    return 2 * prod(q.shape[:3]) * k.shape[2] * (3 * q.shape[3] + 2 * v.shape[3])


def _quantised(x: Tensor, _: object, shape: Sequence[int], *__: object, **___: object) -> int:
    """(…, k) @ (n, k)ᵀ, the matrix in 4 bits and of that `shape`."""
    return 2 * x.numel() * shape[0]


_OPERATIONS: dict[Formula, str] = {
    _product: "aten.mm aten.bmm aten.mv aten.dot aten.vdot aten._int_mm",
    _added_product: "aten.addmm aten.addmm_ aten._addmm_activation aten.baddbmm aten.baddbmm_ "
    "aten.addbmm aten.addbmm_ aten.addmv aten.addmv_",
    _grouped: "aten._grouped_mm transformers.grouped_mm_fallback",
    _grouped_backward: "transformers.grouped_mm_fallback_backward",
    _quantised: "bitsandbytes.gemm_4bit bitsandbytes.gemv_4bit",
    _attention: "aten._scaled_dot_product_flash_attention_for_cpu "
    "aten._scaled_dot_product_fused_attention_overrideable",
    _attention_backward: "aten._scaled_dot_product_flash_attention_for_cpu_backward",
}
FORMULAS = {name: formula for formula, names in _OPERATIONS.items() for name in names.split()}
"""Operation → FLOPs from its arguments. Torch's `addmm` and `bmm` are here too, since its own
formulas refuse the overloads with an `out_dtype`, which TRL's fused head calls on a GPU."""


# ------------------------------------------------------------------------------------- the counter

_has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key


@cache
def _look_up(operation: Operation) -> tuple[Formula | None, bool]:
    """An operation's formula, ours or torch's, and whether it must be decomposed to be counted."""
    packet: object = getattr(operation, "_overloadpacket", operation)
    formula: Formula | None = FORMULAS.get(str(packet)) or flop_registry.get(packet)
    composite = (
        formula is None
        and getattr(operation, "namespace", "prim") != "prim"  # those have no kernels
        and _has_kernel(operation.name(), "CompositeImplicitAutograd")
        # With a kernel of its own too (silu's backward) it runs as always: same bytes, same bits.
        and not any(_has_kernel(operation.name(), device) for device in ("CPU", "CUDA"))
    )
    return formula, composite


def operation_flops(operation: Operation, args: Args, kwargs: Kwargs, out: object) -> int | None:
    """FLOPs of an operation that returned `out`; None for one that is no matrix product."""
    formula = _look_up(operation)[0]
    if formula is None:
        return None
    if formula.__module__ == __name__:
        return formula(*args, **kwargs)
    return formula(*args, **kwargs, out_val=out)  # torch's want to see the result


Label: TypeAlias = "tuple[_Pass | None, str]"
"""A pass, and the role that works in it."""


class FlopCounter(TorchDispatchMode):
    """Counts the FLOPs of matrix products in its block. Works with real and fake tensors.

        with FlopCounter() as counter:
            model(**batch).loss.backward()
        counter.total                      # FLOPs
        counter.by_operation               # {"aten.mm": FLOPs, …}

    `by_module` is not kept: phases are blocks. It adds to what it counted before when entered
    again, and goes with other modes (a `MemoryTracker`, fake tensors) in either order.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self.by_operation: Counter[str] = Counter()
        self.by_label: Counter[Label] = Counter()
        self.label: Label = None, ""
        """whose the next products are"""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see `MemoryTracker`

    def __torch_dispatch__(
        self, func: Operation, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        kwargs = kwargs or {}
        if _look_up(func)[1]:  # in inference mode composite operations arrive whole
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        flops = operation_flops(func, args, kwargs, out)
        if flops is not None:
            self.total += flops
            self.by_label[self.label] += flops
            self.by_operation[str(getattr(func, "_overloadpacket", func))] += flops
        return out


# ------------------------------------------------------------ counted once per shape, then computed


class LinearFlops:
    """FLOPs of a pass as an exact linear function of a few features of its shape.

    All products of a pass are linear in its tokens, its query–key pairs, its rows of logits, …
    So once the passes that were counted span a feature vector, its FLOPs need no counting:

        fit.learn((tokens, pairs, logits), flops)
        fit.predict((tokens, pairs, logits))      # exact, or None: not in the span, count this one
    """

    def __init__(self) -> None:
        self._rows: list[tuple[int, list[Fraction]]] = []  # (pivot, features … and FLOPs)
        self._predictions: dict[tuple[int, ...], int] = {}

    @property
    def counted(self) -> int:
        """How many independent passes were counted: never more than there are features."""
        return len(self._rows)

    def predict(self, shape: Sequence[int]) -> int | None:
        """FLOPs of a pass with these features; None outside the span of the counted ones."""
        key = tuple(shape)
        if key not in self._predictions:
            rest = self._eliminate([Fraction(x) for x in (*key, 0)])
            if any(rest[:-1]):
                return None
            self._predictions[key] = int(-rest[-1])
        return self._predictions[key]

    def learn(self, shape: Sequence[int], flops: int) -> None:
        """A counted pass. One in the span of those before is left out."""
        row = self._eliminate([Fraction(x) for x in (*shape, flops)])
        pivot = next((i for i, x in enumerate(row[:-1]) if x), None)
        if pivot is not None:
            self._rows.append((pivot, [x / row[pivot] for x in row]))

    def _eliminate(self, row: list[Fraction]) -> list[Fraction]:
        """A vector minus its projection on the rows so far: Gaussian elimination."""
        for pivot, other in self._rows:
            factor = row[pivot]
            if factor:
                row = [a - factor * b for a, b in zip(row, other, strict=True)]
        return row


class PassCounter:
    """FLOPs by (phase, role) of passes that may lie within each other; counted while their shape
    is not in the span of those before. One pass, here the forward pass of the policy:

        passes.begin(("forward", "policy"), shape)
        …
        passes.end()                    # adds to passes.flops["forward", "policy"]

    What runs after `passes.set_role` counts for that role, in the same phase.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.flops: dict[PhaseKey, int] = defaultdict(int)
        self.fits: dict[PhaseKey, dict[str, LinearFlops]] = defaultdict(dict)
        """(phase, role) of a pass → a fit for every role that works in it"""
        self.counted = 0
        """how many passes were counted, not computed"""
        self._counter: FlopCounter | None = None
        self._counting = ExitStack()  # holds the counter while it is on
        self._open: list[_Pass] = []

    def set_role(self, role: str) -> None:
        """Whose the next products are."""
        if self._counter is not None:
            self._counter.label = self._counter.label[0], role

    def begin(self, key: PhaseKey, shape: Sequence[int] | None) -> None:
        """A pass begins; without a shape it is not counted."""
        shape = shape if self.enabled else None
        new = _Pass(key, shape)
        if shape is not None and self._counter is None and self._predict(key, shape) is None:
            self._counter = self._counting.enter_context(FlopCounter())
            new.began = True
        if self._counter is not None:
            self.counted += 1
            new.outer, self._counter.label = self._counter.label, (new, key[1])
        self._open.append(new)

    def end(self, failed: bool = False) -> None:
        """The innermost pass ends; its FLOPs are its own, without those of passes within it."""
        this, counter, counted = self._open.pop(), self._counter, None
        if this.outer is not None and counter is not None:
            labels = counter.by_label.items()
            counted = Counter({role: flops for (owner, role), flops in labels if owner is this})
            counter.label = this.outer
            if this.began:
                self._counting.close()
                self._counter = None
        if this.shape is None or failed:
            return
        if counted is not None:
            self._learn(this.key, this.shape, counted)
        flops = counted if counted is not None else self._predict(this.key, this.shape)
        assert flops is not None  # `begin` counts a pass that cannot be predicted
        for role, value in flops.items():
            self.flops[this.key[0], role] += value

    def _predict(self, key: PhaseKey, shape: Sequence[int]) -> dict[str, int] | None:
        """FLOPs of a pass by role; None where a count is needed."""
        flops: dict[str, int] = {}
        for role, fit in self.fits[key].items():
            if (predicted := fit.predict(shape)) is None:
                return None
            flops[role] = predicted
        return flops or None

    def _learn(self, key: PhaseKey, shape: Sequence[int], counted: Counter[str]) -> None:
        fits = self.fits[key]
        for role in {key[1], *fits, *counted}:
            fits.setdefault(role, LinearFlops()).learn(shape, counted[role])


@dataclass(eq=False)
class _Pass:
    key: PhaseKey
    shape: Sequence[int] | None
    outer: Label | None = None
    """whose products were counted before it, where a counter runs"""
    began: bool = False
    """whether this pass switched the counter on"""
