"""Counting floating-point operations: every matrix product of our stages, real or fake tensors.

The convention is that of `torch.utils.flop_counter`: a product of m×k by k×n counts 2·m·n·k,
attention counts all query–key pairs (a causal kernel that skips half of them counts in full), its
fused backward five products where the forward has two (the scores are made again), and nothing
but matrix products counts. Added are the operations that torch's table leaves out: attention on a
CPU, in-place products (the gradients of TRL's fused head) and grouped products (experts).

`FlopCounter` reads torch's table without its per-module account, which makes it several times
cheaper, and it takes no operation apart that has a kernel (torch's counter does, which changes
the memory of what it counts). `torch_counter()` is torch's own with our additions, the witness in
the tests.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

# ------------------------------------------------------------------------------------ the formulas
# Each takes an operation's arguments, and → FLOPs. Tensors are used for their shapes only.


def _product(a: Tensor, b: Tensor, *_, **__) -> int:
    """(…, m, k) @ (…, k, n), or (m, k) @ (k,): 2 for every element of `a` per column of `b`."""
    return 2 * a.numel() * (b.shape[-1] if b.dim() > 1 else 1)


def _added_product(_, a: Tensor, b: Tensor, *__, **___) -> int:
    """c + a @ b: the sum itself does not count."""
    return _product(a, b)


def _grouped(a: Tensor, b: Tensor, offsets: Tensor | None = None, *_, **__) -> int:
    """Rows of `a` times the matrix of their group; or (m, S) @ (S, n) cut into groups along S."""
    if a.dim() == 3 and b.dim() == 2:  # groups of b's columns
        return 2 * a.shape[1] * b.numel()
    return _product(a, b)


def _grouped_backward(a: Tensor, weight: Tensor, *_, **__) -> int:
    """Gradients of the rows and of the groups' matrices: a product each."""
    return 2 * _grouped(a, weight)


def _attention(q: Tensor, k: Tensor, v: Tensor, *_, **__) -> int:
    """q (b, a, s, d), k and v with fewer heads perhaps (GQA): scores, and scores · v."""
    return 2 * prod(q.shape[:3]) * k.shape[2] * (q.shape[3] + v.shape[3])


def _attention_backward(_, q: Tensor, k: Tensor, v: Tensor, *__, **___) -> int:
    """The scores again, their gradient, and the gradients of v, q and k: five products."""
    return 2 * prod(q.shape[:3]) * k.shape[2] * (3 * q.shape[3] + 2 * v.shape[3])


def _quantised(x: Tensor, _, shape: Any, *__, **___) -> int:
    """(…, k) @ (n, k)ᵀ, the matrix in 4 bits and of that `shape`."""
    return 2 * x.numel() * shape[0]


def _packets(namespace: Any, *names: str) -> list[Any]:
    """Those operations that this version of torch has."""
    return [getattr(namespace, name) for name in names if hasattr(namespace, name)]


_TABLE: dict[Callable, list[Any]] = {
    _product: _packets(torch.ops.aten, "mm", "bmm", "mv", "dot", "vdot", "_int_mm"),
    _added_product: _packets(
        torch.ops.aten,
        "addmm",
        "addmm_",
        "_addmm_activation",
        "baddbmm",
        "baddbmm_",
        "addbmm",
        "addbmm_",
        "addmv",
        "addmv_",
    ),
    _grouped: _packets(torch.ops.aten, "_grouped_mm"),
    _attention: _packets(
        torch.ops.aten,
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_fused_attention_overrideable",
    ),
    _attention_backward: _packets(
        torch.ops.aten,
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
}
FORMULAS: dict[Any, Callable[..., int]] = {
    packet: formula for formula, packets in _TABLE.items() for packet in packets
}
"""Operation → FLOPs from its arguments. Torch's `addmm` and `bmm` are here too, since its own
formulas refuse the overloads with an `out_dtype`, which TRL's fused head calls on a GPU."""


def _formula(operation: Any) -> Callable[..., int] | None:
    """An operation's formula: ours, that of transformers' experts, or torch's."""
    packet = getattr(operation, "_overloadpacket", operation)
    if packet in FORMULAS:
        return FORMULAS[packet]
    # Custom operations hide the products inside them; they exist once transformers is imported.
    name = str(packet)
    if name == "transformers.grouped_mm_fallback":
        return _grouped
    if name == "transformers.grouped_mm_fallback_backward":
        return _grouped_backward
    if name in ("bitsandbytes.gemm_4bit", "bitsandbytes.gemv_4bit"):
        return _quantised
    return flop_registry.get(packet)


def torch_counter() -> FlopCounterMode:
    """Torch's own FlopCounterMode with every operation of ours registered; slower, by module."""

    def raw(formula: Callable[..., int]) -> Callable[..., int]:
        def flops(*args, out_val=None, **kwargs) -> int:
            return formula(*args, **kwargs)

        flops._get_raw = True  # tensors, not shapes
        return flops

    ours = dict(FORMULAS)
    experts = torch.ops.transformers
    for name, formula in (("", _grouped), ("_backward", _grouped_backward)):
        if hasattr(experts, f"grouped_mm_fallback{name}"):
            ours[getattr(experts, f"grouped_mm_fallback{name}")] = formula
    return FlopCounterMode(display=False, custom_mapping={k: raw(v) for k, v in ours.items()})


# ------------------------------------------------------------------------------------- the counter

_has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
_KNOWN: dict[Any, tuple[Callable[..., int] | None, bool]] = {}
"""Operation → its formula, and whether it must be taken apart to be counted."""


def _look_up(operation: Any) -> tuple[Callable[..., int] | None, bool]:
    formula = _formula(operation)
    apart = (
        formula is None
        and getattr(operation, "namespace", "prim") != "prim"  # those have no kernels
        and _has_kernel(operation.name(), "CompositeImplicitAutograd")
        # With a kernel of its own too (silu's backward) it runs as always: same bytes, same bits.
        and not any(_has_kernel(operation.name(), device) for device in ("CPU", "CUDA"))
    )
    _KNOWN[operation] = formula, apart
    return formula, apart


class FlopCounter(TorchDispatchMode):
    """Counts the FLOPs of matrix products in its block. Works with real and fake tensors.

        with FlopCounter() as counter:
            model(**batch).loss.backward()
        counter.total                      # FLOPs
        counter.by_operation               # {"aten.mm": FLOPs, …}

    `by_module` is not kept: phases are blocks. It adds to what it counted before when entered
    again, and goes with other modes (an `Account`, fake tensors) in either order.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.by_operation: Counter[str] = Counter()
        self.by_label: Counter[str] = Counter()
        self.label = ""
        """whose the next products are"""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see `Account`

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        formula, apart = _KNOWN.get(func) or _look_up(func)
        if apart:  # in inference mode composite operations arrive whole
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if formula is not None:
            flops = self._flops(formula, args, kwargs, out)
            self.total += flops
            self.by_label[self.label] += flops
            self.by_operation[str(getattr(func, "_overloadpacket", func))] += flops
        return out

    @staticmethod
    def _flops(formula: Callable[..., int], args: tuple, kwargs: dict, out: Any) -> int:
        if formula.__module__ == __name__:
            return formula(*args, **kwargs)
        return formula(*args, **kwargs, out_val=out)  # torch's want to see the result


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
        self._said: dict[tuple, int] = {}

    @property
    def counted(self) -> int:
        """How many independent passes were counted: never more than there are features."""
        return len(self._rows)

    def predict(self, shape: Sequence[int]) -> int | None:
        """FLOPs of a pass with these features; None where the counted passes do not say."""
        key = tuple(shape)
        if key not in self._said:
            rest = self._eliminate([Fraction(x) for x in (*key, 0)])
            if any(rest[:-1]):
                return None
            self._said[key] = int(-rest[-1])
        return self._said[key]

    def learn(self, shape: Sequence[int], flops: int) -> None:
        """A counted pass. One that says nothing new is left out."""
        row = self._eliminate([Fraction(x) for x in (*shape, flops)])
        pivot = next((i for i, x in enumerate(row[:-1]) if x), None)
        if pivot is not None:
            self._rows.append((pivot, [x / row[pivot] for x in row]))

    def _eliminate(self, row: list[Fraction]) -> list[Fraction]:
        """What is left of a vector once everything known is taken out of it."""
        for pivot, known in self._rows:
            factor = row[pivot]
            if factor:
                row = [a - factor * b for a, b in zip(row, known, strict=True)]
        return row


class PassCounter:
    """FLOPs by (phase, role) of passes that may lie within each other; counted while their shape
    is news. One pass, here the forward pass of the policy:

        passes.begin(("forward", "policy"), shape)
        …
        passes.end()                    # adds to passes.flops["forward", "policy"]

    What runs while `passes.role` is another role's counts for that one, in the same phase.
    """

    def __init__(self) -> None:
        self.flops: dict[tuple[str, str], int] = defaultdict(int)
        self.fits: dict[tuple[str, str], dict[str, LinearFlops]] = defaultdict(dict)
        """(phase, role) of a pass → a fit for every role that works in it"""
        self.counted = 0
        """how many passes were counted, not computed"""
        self._counter: FlopCounter | None = None
        self._open: list[_Pass] = []

    @property
    def role(self) -> str:
        """Whose the next products are."""
        return self._counter.label if self._counter is not None else ""

    @role.setter
    def role(self, role: str) -> None:
        if self._counter is not None:
            self._counter.label = role

    def begin(self, key: tuple[str, str], shape: Sequence[int] | None) -> None:
        """A pass begins; without a shape it is not counted."""
        now = _Pass(key, shape)
        if shape is not None and self._counter is None and self._predict(key, shape) is None:
            self._counter = FlopCounter()
            self._counter.__enter__()
            now.began = True
        if self._counter is not None:
            self.counted += 1
            now.start, now.role = Counter(self._counter.by_label), self._counter.label
            self._counter.label = key[1]
        self._open.append(now)

    def end(self, failed: bool = False) -> None:
        """The innermost pass ends; its FLOPs are its own, without those of passes within it."""
        this, counted = self._open.pop(), None
        if this.start is not None:
            counted = self._counter.by_label - this.start
            if this.began:
                self._counter.__exit__(None, None, None)
                self._counter = None
            else:
                self._counter.label = this.role
                self._open[-1].inner += counted
            counted = counted - this.inner
        if this.shape is None or failed:
            return
        if counted is None:
            counted = self._predict(this.key, this.shape)
        else:
            self._learn(this.key, this.shape, counted)
        for role, flops in counted.items():
            self.flops[this.key[0], role] += flops

    def _predict(self, key: tuple[str, str], shape: Sequence[int]) -> dict[str, int] | None:
        """FLOPs of a pass by role; None where a count is needed."""
        said = {role: fit.predict(shape) for role, fit in self.fits[key].items()}
        return None if not said or None in said.values() else said

    def _learn(self, key: tuple[str, str], shape: Sequence[int], counted: Counter[str]) -> None:
        fits = self.fits[key]
        for role in {key[1], *fits, *counted}:
            fits.setdefault(role, LinearFlops()).learn(shape, counted[role])


@dataclass
class _Pass:
    key: tuple[str, str]
    shape: Sequence[int] | None
    start: Counter[str] | None = None
    """what the counter said at the beginning, by role, where one runs"""
    role: str = ""
    """whose products were counted before"""
    inner: Counter[str] = field(default_factory=Counter)
    """FLOPs of passes within this one"""
    began: bool = False
    """whether this pass switched the counter on"""
