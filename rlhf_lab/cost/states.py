"""What is resident because a model is there and because it is trained, on one device.

Bytes per parameter: weights in their precision, gradients in that of the weights, AdamW two more
numbers of each (Loshchilov and Hutter, 1711.05101). DeepSpeed in 16 bits keeps 2 of weights, 2 of
gradients and 12 of master weights and moments, and shards the last (ZeRO-1), the gradients too
(ZeRO-2), and the weights too (ZeRO-3): Rajbhandari et al., 1910.02054, section 5.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

from .architecture import Architecture
from .optimizers import BLOCK, OPTIMIZERS
from .quantization import weight_bytes
from .setup import Setup
from .work import Work

NF4 = {False: 4.5 / 8, True: 4.127 / 8}
"""Bytes per weight in NF4 with its scales: 4 bits and 32 per block of 64, or those in 8 bits again
(Dettmers et al., 2305.14314, section 3)."""
SUB_GROUP = 1_000_000_000
"""Numbers that ZeRO-3 makes a step of at a time (`sub_group_size`)."""


class State(NamedTuple):
    """Bytes of one model on one device.

    `gradients`: at the optimizer's step; `held`: between micro-batches; `fixed`: gradients that are
    there from the start on. `workspace`: what the step needs on top; `communication`: buffers that
    are always there; `bucket`: through which DeepSpeed sums gradients; `paged`: states that the
    device makes room for in a step. `whole`, `trained`: all weights as they are gathered, and all
    gradients as they are made; `host`: what waits in main memory; `stay`: those weights
    that ZeRO-3 gathers once a step, as they are in small tensors; `modules` that it fetches.
    `step`: the work of the optimizer.
    """

    parameters: float
    gradients: float = 0
    optimizer: float = 0
    workspace: float = 0
    communication: float = 0
    held: float = 0
    fixed: float = 0
    paged: float = 0
    host: float = 0
    bucket: float = 0
    whole: float = 0
    stay: float = 0
    trained: float = 0
    modules: float = 0
    step: Work = Work()


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
    quantised = s.small_base and (adapters or not trained)
    weights = _weights(s, model, head, quantised) if own_base else 0.0
    if adapters and (trained or not own_base):
        count, size = _adapters(s, model, head)
        weights += size
    else:
        count, size = model.parameters(head), weights
    if not trained:
        return _sharded(s, model, head, State(weights), 0, 0)
    if adapters:
        widest = max(max(x.inputs, x.outputs) for y in model.layers for x in y.linears)
        largest = s.lora_r * widest * s.adapter_bytes_per_weight
    else:
        largest = model.vocabulary * model.head_width * s.bytes_per_weight
    optimizer, workspace = _optimizer(s, model, head, adapters, count, size)
    step = _step(s, size, optimizer, _tensors(s, model, adapters))
    paged = _paged(s, model, head, adapters)
    if s.optimizer_in_backward:  # a step of one tensor at a time, and no gradient is left
        size, workspace = 0.0, min(workspace, float(largest))
    state = State(weights, size, optimizer - paged, workspace, paged=paged, step=step)
    return _sharded(s, model, head, state, count, largest)


def _tensors(s: Setup, model: Architecture, adapters: bool) -> float:
    """Trained tensors: matrices, biases and norms, or pairs of adapters (and magnitudes)."""
    if adapters:
        targets = model.lora_targets(s.lora_targets)
        each = 2.0 + s.use_dora
        return sum(
            each * y.count for y in model.layers for x in y.linears if x.rank(s.lora_r, targets)
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
    if s.stage == "inference" and s.weights_format != "none":
        return weight_bytes(model, s.weights_format, s.bytes_per_weight)
    total = model.parameters(head)
    if not quantised:
        return float(total * s.bytes_per_weight)
    if s.load_in_8bit:
        return weight_bytes(model, "int8", s.bytes_per_weight, head)
    inside = sum(x.parameters * y.count for y in model.layers for x in y.linears)
    return inside * NF4[s.use_bnb_nested_quant] + (total - inside) * s.bytes_per_weight


def _adapters(s: Setup, model: Architecture, head: str) -> tuple[int, float]:
    """→ trained parameters and their bytes; a score head is trained whole (modules_to_save)."""
    count = model.lora_parameters(s.lora_r, s.lora_targets, dora=s.use_dora)
    size = float(count * s.adapter_bytes_per_weight)
    if head == "score":
        count, size = count + model.head_width, size + model.head_width * s.bytes_per_weight
    return count, size


def _optimizer(
    s: Setup, model: Architecture, head: str, adapters: bool, count: float, size: float
) -> tuple[float, float]:
    """→ bytes of the state, bytes of workspace at the step's peak. `count`, `size`: trained numbers
    and their bytes."""
    kind = OPTIMIZERS[s.optim]
    workspace = 0.0
    itemsize = s.adapter_bytes_per_weight if adapters else s.bytes_per_weight
    if kind.workspace == "root":
        # foreach (CUDA's default) makes √v of all parameters at once; a loop, what it divides one
        # by: √v and a quotient of it, and the quotient of the one before is still there.
        loop = _in_turn(s, model, head, adapters, 2) * itemsize
        workspace = float(size if s.gpu else loop)
    elif kind.workspace == "update":
        # The squared gradient and a sum of it; 16-bit weights and gradients are copied too.
        workspace = 4.0 * _in_turn(s, model, head, adapters, 2 if itemsize > 2 else 4)
    if kind.factored:
        return 4.0 * _sides(s, model, adapters), workspace
    if kind.eight_bit:
        return sum(
            times * _eight_bit(n, wide) for times, n, wide in _pieces(s, model, head, adapters)
        ), workspace
    return kind.moments * size + count * kind.state_bytes, workspace


def _pieces(
    s: Setup, model: Architecture, head: str, adapters: bool
) -> Iterator[tuple[int, int, bool]]:
    """→ (how many of them, numbers, whether transformers' Trainer has its states in 32 bits) of
    every trained tensor. It asks for that for each embedding; our PPO does not."""
    if adapters:
        targets = model.lora_targets(s.lora_targets)
        for y in model.layers:
            for x in y.linears:
                if r := x.rank(s.lora_r, targets):
                    for numbers in (r * x.inputs, r * x.outputs, x.outputs * s.use_dora):
                        yield y.count * x.copies, numbers, False
    else:
        yield 1, model.embedding, s.stage != "ppo"
        for y in model.layers:
            for x in y.linears:
                yield y.count, x.inputs * x.outputs * x.copies, False
                yield y.count, x.outputs * x.copies * x.bias, False
            yield y.count, y.norms, True
        yield 1, model.final_norm, True
    yield 1, 0 if adapters and head == "lm" else model.by_part(head)["head"], False


def _matrices(s: Setup, model: Architecture, head: str, adapters: bool) -> list[int]:
    """Numbers of every trained matrix in the order of the model; of equal layers, two."""
    rank, targets = s.lora_r, model.lora_targets(s.lora_targets) if adapters else ()
    tokens = model.vocabulary * model.head_width
    sizes = [] if adapters else [tokens, model.embedding - tokens]  # and a table of positions
    for y in model.layers:
        one = [x.inputs * x.outputs * x.copies for x in y.linears]
        if adapters:
            maps = [x for x in y.linears if x.rank(rank, targets)]
            one = [
                n for x in maps for n in (rank * x.inputs, rank * x.outputs, x.outputs * s.use_dora)
            ]
        sizes += one * min(2, y.count)
    return [*sizes, 0 if adapters and head == "lm" else model.by_part(head)["head"]]


def _in_turn(s: Setup, model: Architecture, head: str, adapters: bool, copies: int) -> int:
    """The most numbers at once where a loop over tensors makes `copies` of each, and the last
    result of the one before is still there."""
    sizes = [n for n in _matrices(s, model, head, adapters) if n]
    return max(copies * n + before for before, n in pairwise((0, *sizes)))


def _eight_bit(numbers: int, wide: bool) -> float:
    """Bytes of the two moments of a tensor in bitsandbytes' 8-bit AdamW: a byte each and a scale of
    each block, or fp32 where a tensor has less than 4096 numbers."""
    return 8.0 * numbers if wide or numbers < 4096 else 2.0 * numbers + 8 * -(-numbers // BLOCK)


def _paged(s: Setup, model: Architecture, head: str, adapters: bool) -> float:
    """Bytes of states in managed memory: those of tensors of 100,000 numbers and more, without the
    scales of blocks."""
    kind = OPTIMIZERS[s.optim]
    if not (kind.paged and s.gpu):
        return 0.0
    return sum(
        times * n * (2.0 if kind.eight_bit and not wide else 8.0)
        for times, n, wide in _pieces(s, model, head, adapters)
        if n >= 100_000
    )


def _sides(s: Setup, model: Architecture, adapters: bool) -> int:
    """Rows and columns of all trained matrices."""
    matrices = [(y.count, x) for y in model.layers for x in y.linears]
    if adapters:
        one = 1 + s.use_dora  # a vector has its squares whole
        return sum(count * (2 * s.lora_r + x.inputs + one * x.outputs) for count, x in matrices)
    inside = sum(count * (x.inputs + x.outputs) * x.copies for count, x in matrices)
    return inside + model.vocabulary + model.head_width


# ------------------------------------------------------------------------------------------ sharded


def _sharded(
    s: Setup, model: Architecture, head: str, state: State, count: float, largest: float
) -> State:
    """The same on one of `s.replicas` devices. `count`: trained numbers; `largest`: bytes of the
    largest tensor among them."""
    state = state._replace(held=state.gradients, trained=state.gradients, whole=state.parameters)
    if s.sharding == "ddp":
        return state._replace(communication=state.gradients)  # buckets beside the gradients
    if s.sharding == "none":
        return state
    if s.sharding == "fsdp2":
        return _fsdp2(s, state)
    if s.sharding == "zero3":
        pieces = [(times * n, n) for times, n, _ in _pieces(s, model, head, False)]
        small = sum(n for n, one in pieces if one <= s.stage3_param_persistence_threshold)
        mine, away = state.parameters / s.replicas, s.offload == "all"
        state = state._replace(
            parameters=0.0 if away else mine,
            host=mine if away else 0.0,
            stay=state.whole * small / sum(n for n, _ in pieces),
            modules=2 + sum(y.count * (len(y.linears) + 2.0) for y in model.layers),
        )
    if not count:
        return state
    whole = count == model.parameters(head)
    tensors = _kept_tensors(model, head, s.replicas) if whole else 0
    return _zero(s, state, count, tensors, largest)


def _fsdp2(s: Setup, state: State) -> State:
    """Everything shared out, in the precision of the weights; passes have it in theirs."""
    narrow = s.pass_bytes_per_weight / s.bytes_per_weight
    away = s.offload == "all"
    stay, every = 0.0 if away else 1 / s.replicas, (state.parameters, state.gradients)
    kept = sum((*every, state.optimizer, state.paged, state.workspace)) / s.replicas
    return state._replace(
        parameters=state.parameters * stay,
        gradients=state.gradients * stay,
        optimizer=state.optimizer * stay,
        paged=state.paged * stay,
        host=kept if away else 0.0,
        workspace=state.workspace * stay,
        held=state.gradients * narrow,  # nothing is scattered before the last micro-batch
        trained=state.gradients * narrow,
        whole=state.whole * (1 if s.small_base else narrow),
        step=replace(state.step, moved=state.step.moved * stay),
    )


def _zero(s: Setup, state: State, count: float, tensors: int, largest: float) -> State:
    """DeepSpeed: a flat copy of a device's part in fp32, whatever the model's precision, and the
    optimizer's states beside it; for a step, its gradients flat, and in fp32 too. `tensors`:
    numbers in the tensors that the part has a piece of.

    In main memory DeepSpeed 0.19 has its fp32 copy, the states and gradients in fp32 all the time,
    and one more buffer as wide as the model: of the gradients (stage3.py), or of new weights
    (stage_1_and_2.py), which adds up gradients of micro-batches in whole tensors besides."""
    kind, mine = OPTIMIZERS[s.optim], count / s.replicas
    offload, zero3 = s.offload != "none", s.sharding == "zero3"
    itemsize = s.bytes_per_weight
    states = (4 if kind.factored else 4 * kind.moments) + kind.state_bytes
    per, away = 4 + states, states if kind.paged and s.gpu else 0.0
    group = min(mine, SUB_GROUP) if zero3 else mine
    workspace = group * (itemsize + (4 if itemsize < 4 else 0))
    workspace += {"root": 4.0 if s.gpu else 8.0, "update": 12.0}.get(kind.workspace, 0.0) * group
    part, bucket = mine * itemsize, float(s.reduce_bucket_size * itemsize)
    kept = part if zero3 else max(part, float(tensors * itemsize))
    step = replace(state.step, moved=mine * (12 + 2 * per + itemsize))
    adds_up = kept if not zero3 and s.gradient_accumulation_steps > 1 else 0.0
    away_too = mine * (per + 4 + itemsize) + adds_up + (0.0 if zero3 else largest)
    return state._replace(
        gradients=0.0 if zero3 or offload else kept,
        held={"zero1": state.gradients, "zero2": 0.0 if offload else kept}.get(s.sharding, 0.0),
        fixed=part if zero3 and not offload else 0.0,
        optimizer=0.0 if offload else mine * (per - away),
        paged=0.0 if offload else mine * away,
        workspace=0.0 if offload else workspace,
        bucket=bucket,
        host=state.host + away_too * offload,
        communication=(bucket if zero3 else 0.0) + (largest if offload and not zero3 else 0.0),
        step=Work() if offload else step,
    )


def _kept_tensors(model: Architecture, head: str, n: int) -> int:
    """`_whole_tensors`, exact where n is a power of two. Between them a cut may fall less well than
    with fewer devices: there it is what falls with n, at most the figure of the power below."""
    power = 1 << (n - 1).bit_length()
    most = max(_whole_tensors(model, head, m) for m in range(n, power + 1))
    return most if n == power else min(most, _whole_tensors(model, head, power // 2))


@lru_cache(maxsize=256)
def _whole_tensors(model: Architecture, head: str, n: int) -> int:
    """Numbers in the matrices that the fullest of n equal parts of a model has a piece of: ZeRO-1
    and ZeRO-2 keep the gradients of those whole."""
    sizes = [model.embedding]
    for y in model.layers:
        sizes += [x.parameters for x in y.linears] * y.count
    sizes += [model.by_part(head)["head"]]
    ends = list(accumulate(sizes))
    part, fullest = ends[-1] / n, 0
    for i in range(n):
        first, last = bisect_right(ends, i * part), bisect_left(ends, (i + 1) * part)
        fullest = max(fullest, ends[min(last, len(ends) - 1)] - ends[first] + sizes[first])
    return fullest
