"""Exact memory of tensors: every storage, from its first use to its end, by role and component.

A dispatch mode sees each operation's outputs. A new storage is counted under the current label,
and a weak reference subtracts it when the last tensor that uses it goes. That counts real tensors
on any device and fake tensors (which have shapes and no data) alike, so it serves both the meter
and the x-ray. What a kernel allocates and frees inside itself is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

MemoryKey: TypeAlias = tuple[str, str]
"""(role, component): whose bytes, and what they are."""

PhaseKey: TypeAlias = tuple[str, str]
"""(phase, role)"""

Operation: TypeAlias = "torch._ops.OpOverload[..., object]"
"""One of torch's operations, such as `aten.mm.default`, as a dispatch mode is given it."""

Args: TypeAlias = tuple[object, ...]
Kwargs: TypeAlias = Mapping[str, object]

GPU_BLOCK = 512
"""Bytes that CUDA's caching allocator rounds every request up to."""


def storage_of(tensor: Tensor) -> torch.UntypedStorage:
    """Where a tensor's numbers lie; of a DTensor, those of this process."""
    return getattr(tensor, "_local_tensor", tensor).untyped_storage()


def rounded_bytes(tensor: Tensor, block: int) -> int:
    """Bytes of a tensor's storage, rounded up to whole blocks."""
    return -(-storage_of(tensor).nbytes() // block) * block


def phase_peaks(peaks: Mapping[PhaseKey, dict[MemoryKey, int]]) -> dict[str, dict[MemoryKey, int]]:
    """Phase → bytes by (role, component) at its highest peak, whichever role it was in."""
    found: dict[str, dict[MemoryKey, int]] = {}
    for (phase, _), parts in peaks.items():
        found[phase] = max(found.get(phase, {}), parts, key=lambda p: sum(p.values()))
    return found


class _StorageRef(weakref.ref[torch.UntypedStorage]):
    """Calls back at the end of a storage, as `weakref.finalize` does, at a fraction of its cost."""

    __slots__ = ("key",)
    key: int


class MemoryTracker(TorchDispatchMode):
    """Bytes of live storages by (role, component), and the composition at each phase's peak.

    `block`: bytes that a request is rounded up to (1 on a CPU, `GPU_BLOCK` on a GPU).

        with MemoryTracker() as tracker:
            tracker.own("policy", "parameters", model.parameters())
            with tracker.phase("forward", "policy"):
                loss = model(**batch).loss
        tracker.peaks["forward", "policy"]       # {("policy", "parameters"): bytes, …}
    """

    def __init__(self, block: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.block = block
        self.live: Counter[MemoryKey] = Counter()
        self.total = 0
        self.peak = 0
        self.peaks: dict[PhaseKey, dict[MemoryKey, int]] = {}
        """(phase, role) → what the peak of that phase was made of"""
        self.label: MemoryKey = ("", "activations")
        """what new storages are counted under"""
        self._storages: dict[int, tuple[int, MemoryKey, _StorageRef]] = {}
        self._at: PhaseKey | None = None
        self._most = 0

    # ------------------------------------------------------------------------------ what is there

    def own(self, role: str, component: str, tensors: Iterable[Tensor]) -> None:
        """Count these tensors' storages under a label, whether or not they were seen before."""
        for tensor in tensors:
            self._add(tensor, (role, component), relabel=True)
        self._look()

    def own_gradients(self, role: str, model: nn.Module) -> list[RemovableHandle]:
        """Hooks: a gradient of a model's trained parameters is its role's as soon as it arrives."""

        def arrived(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self.own(role, "gradients", [parameter.grad])

        trained = (p for p in model.parameters() if p.requires_grad)
        return [parameter.register_post_accumulate_grad_hook(arrived) for parameter in trained]

    def _add(self, tensor: Tensor, label: MemoryKey, relabel: bool = False) -> None:
        storage = storage_of(tensor)
        key = storage._cdata
        entry = self._storages.get(key)
        if entry is None:
            size = rounded_bytes(tensor, self.block)
            if size:
                ref = _StorageRef(storage, self._release)
                ref.key = key
                self._storages[key] = size, label, ref
                self._count(label, size)
        elif relabel and entry[1] != label:
            size, old, ref = entry
            self._storages[key] = size, label, ref
            self._count(old, -size)
            self._count(label, size)

    def resized(self, tensor: Tensor) -> None:
        """Count a storage anew that was given another size."""
        if (key := storage_of(tensor)._cdata) in self._storages:
            self._size_anew(key)
        else:
            self._add(tensor, self.label)
        self._look()

    def recount(self) -> None:
        """Count all storages anew: some were given another size while nobody looked."""
        for key in list(self._storages):
            self._size_anew(key)

    def _size_anew(self, key: int) -> None:
        size, label, ref = self._storages[key]
        if (storage := ref()) is not None:
            now = -(-storage.nbytes() // self.block) * self.block
            self._storages[key] = now, label, ref
            self._count(label, now - size)

    def _release(self, ref: _StorageRef) -> None:
        size, label, _ = self._storages.pop(ref.key)
        self._count(label, -size)

    def _count(self, label: MemoryKey, size: int) -> None:
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
        """New storages in this block are this component of the current role."""
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

    def __torch_dispatch__(
        self, func: Operation, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        self.book(out)
        return out

    def book(self, out: object) -> None:
        """Count what an operation made, under the label at hand."""
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self._add(leaf, self.label)
        self._look()

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
