"""What is resident because a model is there and because it is trained, on one device.

Bytes per parameter: weights in their precision, gradients in that of the weights, AdamW two more
numbers of each (Loshchilov and Hutter, 1711.05101). DeepSpeed in 16 bits keeps 2 of weights, 2 of
gradients and 12 of master weights and moments, and shards the last (ZeRO-1), the gradients too
(ZeRO-2), and the weights too (ZeRO-3): Rajbhandari et al., 1910.02054, section 5.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .architecture import Architecture
from .optimizers import OPTIMIZERS
from .setup import Setup
from .tape import Work

NF4 = {False: 4.5 / 8, True: 4.127 / 8}
"""Bytes per weight in NF4 with its scales: 4 bits and 32 per block of 64, or those in 8 bits again
(Dettmers et al., 2305.14314, section 3)."""
BUCKET = 500_000_000
"""Numbers in DeepSpeed's reduce bucket by default (`reduce_bucket_size`)."""


@dataclass
class State:
    """Bytes of one model on one device. `workspace`: what the optimizer's step needs on top;
    `communication`: buffers of a distributed run; `share`: of the gradients, what one device keeps;
    `step`: the work of the optimizer."""

    parameters: float
    gradients: float = 0
    optimizer: float = 0
    workspace: float = 0
    communication: float = 0
    share: float = 1.0
    step: Work = field(default_factory=Work)


def states(
    s: Setup,
    model: Architecture,
    head: str,
    *,
    trained: bool,
    adapters: bool | None = None,
    own_base: bool = True,
) -> State:
    """Weights, gradients, optimizer state and buffers of one model. `adapters`: those are what is
    trained (default: where the setup has a rank); without `own_base` another role holds the base,
    and adapters and head are all there is."""
    adapters = bool(s.lora_r) if adapters is None else adapters
    quantised = s.load_in_4bit and (adapters or not trained)
    weights = _weights(s, model, head, quantised) if own_base else 0.0
    if adapters and (trained or not own_base):
        count, size = _adapters(s, model, head)
        weights += size
    else:
        count, size = model.parameters(head), weights
    if not trained:
        return _sharded(s, model, State(weights), 0)
    if adapters:
        widest = max(max(x.inputs, x.outputs) for y in model.layers for x in y.linears)
        largest = s.lora_r * widest * s.adapter_bytes_per_weight
    else:
        largest = model.vocabulary * model.head_width * s.bytes_per_weight
    optimizer, workspace = _optimizer(s, model, adapters, count, size, largest)
    step = _step(s, size, optimizer, _tensors(s, model, adapters))
    state = State(weights, size, optimizer, workspace, step=step)
    return _sharded(s, model, state, count)


def _tensors(s: Setup, model: Architecture, adapters: bool) -> float:
    """Trained tensors: matrices, biases and norms, or pairs of adapters."""
    if adapters:
        targets = model.lora_targets(s.lora_targets)
        return sum(
            2.0 * y.count for y in model.layers for x in y.linears if x.rank(s.lora_r, targets)
        )
    return sum(y.count * (2.0 + sum(1 + x.bias for x in y.linears)) for y in model.layers) + 2


def _step(s: Setup, size: float, optimizer: float, tensors: float) -> Work:
    """Clipping the gradients' norm (read, then scale), and the optimizer's step. The fused one
    reads and writes everything once; torch's loop over tensors is eight operations, which touch
    twenty tensors and, done in place, take as long as six. GPUs take lists of tensors at once."""
    fused = OPTIMIZERS[s.optim].fused
    moved = 3 * size + 2 * optimizer if fused else 20 * size
    each = 1.0 + (1.0 if fused else 6.0)
    return Work(moved=3 * size + moved, launched=each * (1 if s.gpu else tensors))


def _weights(s: Setup, model: Architecture, head: str, quantised: bool) -> float:
    total = model.parameters(head)
    if not quantised:
        return float(total * s.bytes_per_weight)
    inside = sum(x.parameters * y.count for y in model.layers for x in y.linears)
    return inside * NF4[s.use_bnb_nested_quant] + (total - inside) * s.bytes_per_weight


def _adapters(s: Setup, model: Architecture, head: str) -> tuple[int, float]:
    """→ trained parameters and their bytes; a score head is trained whole (modules_to_save)."""
    count = model.lora_parameters(s.lora_r, s.lora_targets)
    size = float(count * s.adapter_bytes_per_weight)
    if head == "score":
        count, size = count + model.head_width, size + model.head_width * s.bytes_per_weight
    return count, size


def _optimizer(
    s: Setup, model: Architecture, adapters: bool, count: float, size: float, largest: float
) -> tuple[float, float]:
    """→ bytes of the state, bytes of workspace at the step's peak. `count`, `size`: trained numbers
    and their bytes; `largest`: bytes of the largest of them."""
    kind = OPTIMIZERS[s.optim]
    workspace = 0.0
    if kind.workspace == "root":
        # foreach (CUDA's default) makes √v of all parameters at once; a loop, of one at a time.
        workspace = float(size if s.gpu else 2 * largest)
    elif kind.workspace == "update":
        workspace = 3.0 * largest * 4 / s.bytes_per_weight
    if kind.factored:
        return 4.0 * _sides(s, model, adapters), workspace
    return kind.moments * size + count * kind.state_bytes, workspace


def _sides(s: Setup, model: Architecture, adapters: bool) -> int:
    """Rows and columns of all trained matrices."""
    matrices = [(y.count, x) for y in model.layers for x in y.linears]
    if adapters:
        return sum(count * (2 * s.lora_r + x.inputs + x.outputs) for count, x in matrices)
    inside = sum(count * (x.inputs + x.outputs) * x.copies for count, x in matrices)
    return inside + model.vocabulary + model.head_width


def _sharded(s: Setup, model: Architecture, state: State, count: float) -> State:
    """The same on one of `s.replicas` devices."""
    n, kind = s.replicas, s.sharding
    if kind == "ddp":
        return replace(state, communication=state.gradients)  # buckets beside the gradients
    if kind in ("none",) or s.gpus == 1 and kind == "fsdp2":
        return state
    deepspeed = kind.startswith("zero") and s.bytes_per_weight == 2 and not s.load_in_4bit
    if deepspeed and count:  # master weights and moments in fp32
        state = replace(state, optimizer=12.0 * count, workspace=0.0)
    state = replace(state, optimizer=0.0 if s.offload != "none" else state.optimizer / n)
    if kind == "zero1":
        return state
    state = replace(state, gradients=state.gradients / n, share=1 / n)
    if kind == "zero2":
        return replace(state, communication=min(BUCKET, count) * 2.0)
    # ZeRO-3 and FSDP2: weights too; two layers are whole at a time, and their gradients once.
    layer = max(sum(x.parameters for x in y.linears) for y in model.layers)
    table = model.vocabulary * model.head_width
    itemsize = 2 if s.autocast else s.bytes_per_weight
    whole = (2 * layer + table) * itemsize + (layer * itemsize if count else 0)
    parameters = 0.0 if s.offload == "all" else state.parameters / n
    return replace(state, parameters=parameters, workspace=0.0, communication=float(whole))
