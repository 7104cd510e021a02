"""How long work takes on a device: every operation is bound by arithmetic or by memory.

The roofline (Williams et al., CACM 52(4), 2009): a matrix product takes the longer of its
arithmetic, at the rate of its kind and size, and of moving its operands; everything else moves
bytes, or makes exponentials. A small operation costs what launching it costs: on a GPU instead of
its work, when that is shorter. On a CPU nothing hides anything: operands are packed before they are
multiplied (Goto and van de Geijn, ACM TOMS 34(3), 2008), and each operation is called, then done.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .hardware import Hardware
from .setup import Setup
from .work import CAUSAL, Work


def seconds(work: Work, hw: Hardware, dtype: str) -> float:
    """Seconds of this work on one device. `dtype`: that of the matrix products."""
    if hw.operand_bandwidth:
        return math.fsum(cpu_parts(work, hw, dtype))
    speed = hw.bandwidth * hw.bandwidth_efficiency
    moving, transcendentals = work.moved / speed, work.transcendentals / hw.function_rate
    total, products = 0.0, 0.0
    large, causal, masked, full = hw.rates(dtype)
    for flops, touched, times, kind in work.products:
        if kind:
            rate = causal if kind == CAUSAL else masked
        else:
            rate = large if flops >= full else hw.matmul_rate(dtype, flops)
        busy = max(flops / rate, touched / speed)
        total += times * max(busy, hw.op_seconds)
        products += times
    others = max(0.0, work.called + work.launched - products)
    return total + max(moving, transcendentals, others * hw.op_seconds)


def cpu_parts(work: Work, hw: Hardware, dtype: str) -> tuple[float, ...]:
    """Seconds of a CPU, one after the other: arithmetic of products, exponentials, operands of
    products, calls, launches, and streams."""
    operands = math.fsum(touched * times for _, touched, times, _ in work.products)
    return (
        work.flops / hw.matmul_rate(dtype),
        work.transcendentals / hw.function_rate,
        operands / hw.operand_bandwidth if hw.operand_bandwidth else 0.0,
        work.called * hw.op_seconds,
        work.launched * hw.launch_seconds,
        work.moved / (hw.bandwidth * hw.bandwidth_efficiency),
    )


def product_dtype(s: Setup) -> str:
    """The precision that matrix products run in, as the hardware catalogue names it."""
    if s.fp16 or s.dtype == "float16":
        return "fp16"
    if s.bf16 or s.dtype == "bfloat16":
        return "bf16"
    return "tf32" if s.tf32 else "fp32"


class Sent(NamedTuple):
    """What a phase sends in a step (PPO: in an iteration), in bytes that a collective is called
    with; over the bus to main memory and back (`host`), or activations one way (`stashed`), in
    TRL's way while the device computes, in transformers' not; how many numbers the CPU's optimizer
    updates (`updated`); bytes that it borrows room for (`paged`); and how many modules' weights
    ZeRO-3 fetches. `hides`: it sends while the device computes."""

    all_reduce: float = 0.0
    all_gather: float = 0.0
    reduce_scatter: float = 0.0
    host: float = 0.0
    stashed: float = 0.0
    updated: float = 0.0
    paged: float = 0.0
    fetched: float = 0.0
    hides: bool = True

    def bytes(self, n: int) -> float:
        """That a device sends in a ring of n: to add up, all of it twice but for its own part, to
        gather or to scatter, once (Patarasuk and Yuan, 2009)."""
        share = (n - 1) / n
        return (2 * self.all_reduce + self.all_gather + self.reduce_scatter) * share


CPU_ADAM = 1e9 / 0.22
"""Numbers that a node's CPUs update in a second (ZeRO-Offload, 2101.06840, table 4)."""


def with_sent(s: Setup, hw: Hardware, sent: Sent, busy: float, times: float, room: float) -> float:
    """Seconds of a phase of `busy` seconds of work in all its `times` with what it sends. `room`:
    bytes that are free at the peak; what does not fit there leaves the device and comes back.
    Raises ValueError where the device has no known link."""
    spent = communication(s, hw, sent)
    stash = sent.stashed / hw.host
    busy = max(busy, stash) if s.activation_offloading else busy + stash
    host = (sent.host + 2 * times * min(sent.paged, max(0.0, sent.paged - room))) / hw.host
    if sent.updated:
        host += sent.updated * (s.gpus // s.nodes) / CPU_ADAM
    if not sent.hides:
        return busy + spent + host
    if s.sharding == "fsdp2":  # from memory that is pinned; DeepSpeed's is not by default
        spent, host = max(spent, host), 0.0
    return max(busy, spent) + OVERLAP * min(busy, spent) + host


REACHED = 0.8
"""Of a link, by long collectives: 230 to 250 of 300 GB/s on eight A100 (nccl-tests' bus bandwidth;
docs.alayanew.com, 2026-05-06); of other devices taken to be alike, though sums made by H100's
switches reach more."""
RINGS = 0.22
"""Of all network cards of a machine, which a ring each uses, what gathering layer by layer reaches:
88 of 400 GB/s in the runs of published_figures.json (half open) that wait for it."""
OVERLAP = 0.19
"""By so much computing is slower while the device sends, which takes processors and bandwidth too
(18.9 % on average on four A100, H100 or MI250: 2507.03114)."""
HOOKS = 3.5e-4
"""Seconds that DeepSpeed's hooks of ZeRO-3 take to fetch and release a module's weights in a pass
(the same half)."""


def communication(s: Setup, hw: Hardware, sent: Sent) -> float:
    """Seconds that the devices' exchange takes if nothing hides it. Between machines there are as
    many rings as devices in each, so that each network card passes on its part of the bytes."""
    n = s.replicas
    if n == 1 or not (sent.all_reduce or sent.all_gather or sent.reduce_scatter):
        return 0.0
    speed = hw.speed_of("link") * REACHED if s.gpus > s.nodes else math.inf
    if s.nodes > 1:
        speed = min(speed, hw.speed_of("network") * max(REACHED, RINGS * s.gpus / s.nodes))
    share = (n - 1) / n / speed
    moved = 2 * sent.all_reduce + sent.all_gather + sent.reduce_scatter
    return moved * share + sent.fetched * HOOKS
