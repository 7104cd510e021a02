"""What this process sends to others: every collective, as torch's dispatcher runs it.

All of them come by there, whoever calls: accelerate, DeepSpeed, FSDP2, functional collectives, and
DDP's reducer, which sums buckets of gradients in C++. So names and sizes are those of the calls, in
every step, at the cost of a Python call for each; what a ring passes on of them is arithmetic
(`ring_bytes`). Nothing is looked at before somebody listens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..cost.seconds import Sent

Heard: TypeAlias = Callable[[str, int, int], None]
"""Is told of a collective: its kind, bytes of the larger of what goes in and comes out, and how
many processes take part."""

KINDS = {
    "all_reduce": ("allreduce_", "allreduce_coalesced_"),
    "all_gather": (
        *("allgather_", "_allgather_base_", "allgather_coalesced_"),
        "allgather_into_tensor_coalesced_",
    ),
    "reduce_scatter": (
        *("reduce_scatter_", "_reduce_scatter_base_"),
        "reduce_scatter_tensor_coalesced_",
    ),
    "broadcast": ("broadcast_",),
    "reduce": ("reduce_",),
    "all_to_all": ("alltoall_", "alltoall_base_"),
}
"""Kind → torch's operations (`torch.ops.c10d`). Between two processes alone (send, gather, scatter)
no trainer here sends."""

HERE = torch._C.DispatchKey.BackendSelect
_listeners: list[Heard] = []


def ring_bytes(kind: str, size: int, processes: int) -> float:
    """What a process passes on in a ring of so many: to add up, all of it twice but for its own
    part, else once (from or to one process alone: on average over all)."""
    sent = Sent(all_reduce=size) if kind == "all_reduce" else Sent(all_gather=size)
    return sent.bytes(processes)


def listen(heard: Heard) -> Callable[[], None]:
    """Tell `heard` of every collective from now on. → what ends that."""
    _look()
    _listeners.append(heard)
    return partial(_listeners.remove, heard)


@cache
def _look() -> torch.library.Library:
    """Stand before the kernels of every device from now on: at a dispatch key that every call goes
    by, below autograd, and at which these operations have nothing of their own."""
    library = torch.library.Library("c10d", "IMPL")
    for kind, names in KINDS.items():
        for name in names:
            operation = getattr(torch.ops.c10d, name).default
            library.impl(name, partial(_run, kind, operation), HERE.name, with_keyset=True)
    return library


def _run(
    kind: str,
    operation: torch._ops.OpOverload[..., object],
    keys: torch._C.DispatchKeySet,
    *args: object,
    **kwargs: object,
) -> object:
    if _listeners:
        size = max(map(_bytes, (args[:1], args[1:])))
        processes = next(
            dist.ProcessGroup.unbox(x).size() for x in args if isinstance(x, torch.ScriptObject)
        )
        for heard in tuple(_listeners):
            heard(kind, size, processes)
    # This gives up the interpreter's lock, which gloo's thread may wait for, as `call_boxed` of a
    # kernel does not (torch 2.13).
    return operation.redispatch(keys.remove(HERE), *args, **kwargs)


def _bytes(values: Sequence[object]) -> int:
    leaves = (x for x in tree_leaves(values) if isinstance(x, Tensor))
    return sum(x.numel() * x.element_size() for x in leaves)
