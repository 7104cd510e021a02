"""What this process sends to others: every collective, as torch's dispatcher runs it.

All of them come by there, whoever calls: accelerate, DeepSpeed, FSDP2, functional collectives, and
DDP's reducer, which sums buckets of gradients in C++. So names and sizes are those of the calls, in
every step, at the cost of a Python call for each; what a ring passes on of them is arithmetic
(`ring_bytes`). Nothing is looked at before somebody listens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..cost.seconds import Sent
from .memory_tracker import PhaseKey

Heard: TypeAlias = Callable[[str, int, int], None]
"""Is told of a collective: its name, bytes of the larger of what goes in and comes out, and how
many processes take part."""

OPERATIONS = (
    "allreduce_ allreduce_coalesced_ allgather_ _allgather_base_ allgather_coalesced_ "
    "allgather_into_tensor_coalesced_ reduce_scatter_ _reduce_scatter_base_ "
    "reduce_scatter_tensor_coalesced_ broadcast_ reduce_ alltoall_ alltoall_base_"
).split()
"""Of `torch.ops.c10d`. No trainer here sends to one process alone (send, gather, scatter)."""
HERE = torch._C.DispatchKey.BackendSelect
_listeners: list[Heard] = []


def ring_bytes(name: str, size: int, processes: int) -> float:
    """What a process passes on in a ring of so many: to add up, all of it twice but for its own
    part, else once (from or to one process alone: on average over all)."""
    sent = Sent(all_reduce=size) if name.startswith("allreduce") else Sent(all_gather=size)
    return sent.bytes(processes)


def several() -> bool:
    """Whether there are other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def summed(table: Mapping[PhaseKey, int]) -> dict[PhaseKey, int]:
    """Its sum over all processes, which call this together."""
    if not several():
        return dict(table)
    tables: list[dict[PhaseKey, int]] = [{}] * dist.get_world_size()
    dist.all_gather_object(tables, dict(table))
    return dict(sum(map(Counter, tables), Counter()))


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
    for name in OPERATIONS:
        run = partial(_run, name.strip("_"), getattr(torch.ops.c10d, name).default)
        library.impl(name, run, HERE.name, with_keyset=True)
    return library


def _run(
    name: str,
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
            heard(name, size, processes)
    # This gives up the interpreter's lock, which gloo's thread may wait for, as `call_boxed` of a
    # kernel does not (torch 2.13).
    return operation.redispatch(keys.remove(HERE), *args, **kwargs)


def _bytes(values: Sequence[object]) -> int:
    leaves = (x for x in tree_leaves(values) if isinstance(x, Tensor))
    return sum(x.numel() * x.element_size() for x in leaves)
