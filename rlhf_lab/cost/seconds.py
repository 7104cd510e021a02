"""How long work takes on a device: every operation is bound by arithmetic or by memory.

The roofline (Williams et al., CACM 52(4), 2009): a matrix product takes the longer of its
arithmetic and of moving its operands; everything else moves bytes, or makes exponentials. A small
operation costs what launching it costs: on a GPU instead of its work, when that is shorter. On a
CPU nothing hides anything: operands are packed before they are multiplied (Goto and van de Geijn,
ACM TOMS 34(3), 2008), and each operation is called, then done.
"""

from __future__ import annotations

from .hardware import Hardware
from .setup import Setup
from .tape import Work


def seconds(work: Work, hw: Hardware, dtype: str) -> float:
    """Seconds of this work on one device. `dtype`: that of the matrix products."""
    if hw.operand_bandwidth:
        return sum(cpu_parts(work, hw, dtype))
    speed = hw.bandwidth * hw.bandwidth_efficiency
    moving, transcendentals = work.moved / speed, work.transcendentals / hw.function_rate
    total, products = 0.0, 0.0
    flat = None if hw.matmul_curve else hw.matmul_rate(dtype)  # the same at every size
    for flops, touched, times in work.products:
        busy = max(flops / (flat or hw.matmul_rate(dtype, flops)), touched / speed)
        total += times * max(busy, hw.op_seconds)
        products += times
    others = max(0.0, work.called + work.launched - products)
    return total + max(moving, transcendentals, others * hw.op_seconds)


def cpu_parts(work: Work, hw: Hardware, dtype: str) -> tuple[float, ...]:
    """Seconds of a CPU, one after the other: arithmetic of products, exponentials, operands of
    products, calls, launches, and streams."""
    operands = sum(touched * times for _, touched, times in work.products)
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
    return "bf16" if s.bf16 or s.dtype == "bfloat16" else "fp32"


def communication(s: Setup, hw: Hardware, gradients: float, weights: float) -> float:
    """Seconds that an optimizer step's exchange takes if nothing hides it.

    `gradients`, `weights`: bytes of one whole copy. A ring moves (n−1)/n of the data once to reduce
    and scatter and once to gather (Patarasuk and Yuan, 2009); sharded weights are gathered for the
    forward and again for the backward pass (Rajbhandari et al., 1910.02054, section 7).
    """
    n = s.gpus
    if n == 1:
        return 0.0
    name = "link" if s.nodes == 1 else "network"
    speed: float | None = getattr(hw, name)
    if not speed:
        raise ValueError(f"{hw.name} has no known {name} between devices: give {name}= in bytes/s")
    share = (n - 1) / n / speed
    gathered = 2 * weights if s.sharding in ("zero3", "fsdp2") else gradients
    return gradients * share + gathered * share
