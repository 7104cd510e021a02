"""An exact account of tensor memory: every storage, from its first use to its end, by label.

A dispatch mode sees each operation's outputs. A storage that is new is added to the account under
the current label, and a weak reference takes it off when the last tensor that uses it goes. That
counts real tensors on any device and fake tensors (which have shapes and no data) alike, so it
serves both the meter and the x-ray. What a kernel allocates and frees inside itself is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Key = tuple[str, str]
"""(role, component): whose bytes, and what they are."""

GPU_BLOCK = 512
"""Bytes that CUDA's caching allocator rounds every request up to."""


class _End(weakref.ref):
    """Calls back at the end of a storage, as `weakref.finalize` does, at a fraction of its cost."""

    __slots__ = ("key",)


class Account(TorchDispatchMode):
    """Bytes of live storages by (role, component), and the composition at each phase's peak.

    `block`: bytes that a request is rounded up to (1 on a CPU, `GPU_BLOCK` on a GPU).

        with Account() as account:
            account.own("policy", "parameters", model.parameters())
            with account.phase("forward", "policy"):
                loss = model(**batch).loss
        account.peaks["forward", "policy"]       # {("policy", "parameters"): bytes, …}
    """

    def __init__(self, block: int = 1):
        super().__init__()
        self.block = block
        self.live: Counter[Key] = Counter()
        self.total = 0
        self.peak = 0
        self.peaks: dict[Key, dict[Key, int]] = {}
        """(phase, role) → what the peak of that phase was made of"""
        self.label: Key = ("", "activations")
        self.trace: list[tuple[str, int]] | None = None
        """(operation, live bytes after it), where a list is given to fill"""
        self._known: dict[int, tuple[int, Key, _End]] = {}
        self._at: Key | None = None
        self._most = 0

    # ------------------------------------------------------------------------------ what is there

    def own(self, role: str, component: str, tensors: Iterable[Tensor]) -> None:
        """Put these tensors' storages under a label, new to the account or not."""
        for tensor in tensors:
            self._add(tensor, (role, component), relabel=True)
        self._look()

    def _add(self, tensor: Tensor, label: Key, relabel: bool = False) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._known.get(key)
        if known is None:
            size = -(-storage.nbytes() // self.block) * self.block
            if size:
                end = _End(storage, self._gone)
                end.key = key
                self._known[key] = size, label, end
                self._count(label, size)
        elif relabel and known[1] != label:
            size, old, end = known
            self._known[key] = size, label, end
            self._count(old, -size)
            self._count(label, size)

    def _gone(self, end: _End) -> None:
        size, label, _ = self._known.pop(end.key)
        self._count(label, -size)

    def _count(self, label: Key, size: int) -> None:
        self.live[label] += size
        self.total += size

    def _look(self) -> None:
        """Is this the most so far, of all and of the phase?"""
        self.peak = max(self.peak, self.total)
        if self._at is not None and self.total > self._most:
            self._most = self.total
            self.peaks[self._at] = {k: v for k, v in self.live.items() if v}

    @contextmanager
    def labelled(self, component: str) -> Iterator[None]:
        """New storages in this block are this component of whoever's turn it is."""
        before = self.label
        self.label = (before[0], component)
        try:
            yield
        finally:
            self.label = before

    # ------------------------------------------------------------------------------- what happens

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled while a mode is on; keeping dynamo off costs as much

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self._add(leaf, self.label)
        self._look()
        if self.trace is not None:
            self.trace.append((str(func), self.total))
        return out

    @contextmanager
    def phase(self, phase: str, role: str = "", component: str = "activations") -> Iterator[None]:
        """New storages in this block belong to `role`; its peak is kept as `peaks[phase, role]`.

        A phase that is entered again keeps the higher peak.
        """
        before = self._at, self._most, self.label
        self._at, self.label = (phase, role), (role, component)
        self._most = sum(self.peaks.get(self._at, {}).values())
        self._look()
        try:
            yield
        finally:
            self._at, self._most, self.label = before
