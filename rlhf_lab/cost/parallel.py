"""Tensor parallelism: what one device holds of a model, and what a sum over devices takes.

Maps are split by their outputs, the one after them by its inputs, so that a layer needs two sums
over devices, one behind attention and one behind the MLP (Shoeybi et al., 1909.08053, section 3);
the embedding is split by the vocabulary and needs a third, once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from ..stages import read_table
from .architecture import Architecture, Layer, Linear
from .hardware import Hardware

if TYPE_CHECKING:
    from .phases import Phase
    from .setup import Setup

BY_INPUTS = frozenset("o_proj out_proj dense down_proj dense_4h_to_h c_proj fc2".split())
"""Maps whose outputs are summed over devices."""
WHOLE = frozenset("gate q_a_proj kv_a_proj_with_mqa".split())
"""Maps that every device holds: routers, and what MLA compresses to."""
FUSED = frozenset("qkv_proj query_key_value c_attn".split())
"""Queries, keys and values in one map."""
_TABLE = read_table(__file__, "engine.yaml")
PROTOCOLS: list[dict[str, float]] = list(_TABLE.pop("protocols").values())
"""How sums over devices are sent."""
ENGINE: dict[str, float] = _TABLE
"""Constants of engines."""


@lru_cache(maxsize=64)
def shard(model: Architecture, k: int) -> Architecture:
    """One of k devices' share of a model. Norms, routers and position tables are whole; where there
    are fewer heads of keys and values than devices, several hold the same one. An odd width is
    rounded up."""
    if k == 1:
        return model
    kv, vocabulary = max(1, model.kv_heads // k), -(-model.vocabulary // k)

    def share(x: Linear) -> Linear:
        if x.name in WHOLE:
            return x
        if x.name in BY_INPUTS:
            return replace(x, inputs=-(-x.inputs // k))
        if x.part == "attention" and x.name in FUSED:
            return replace(x, outputs=(model.heads // k + 2 * kv) * model.head_dim)
        if x.name in ("k_proj", "v_proj"):
            return replace(x, outputs=kv * model.head_dim)
        return replace(x, outputs=-(-x.outputs // k))

    def held(y: Layer) -> Layer:
        latent = any(x.name == "kv_b_proj" for x in y.linears)  # what all heads are made of
        cached = y.cached if latent else y.cached * kv // model.kv_heads
        narrow, wide = (-(-n // k) for n in y.state)
        linears = tuple(map(share, y.linears))
        return replace(y, linears=linears, cached=cached, state=(narrow, wide))

    layers = map(held, model.layers)
    return replace(
        model,
        heads=model.heads // k,
        kv_heads=kv,
        vocabulary=vocabulary,
        embedding=model.embedding - (model.vocabulary - vocabulary) * model.head_width,
        layers=tuple(layers),
    )


def all_reduces(model: Architecture) -> int:
    """Sums over devices in one pass through the model."""
    return 2 * model.depth + 1


def in_parallel(s: Setup, of_stage: Callable[[Setup], list[Phase]]) -> list[Phase]:
    """Phases of a stage whose models are shared out over `s.tensor_parallel` devices: everything
    that follows from matrices is a share, and each pass adds up over the devices as often as it
    goes through a layer: backward once more, and with checkpointing twice."""
    k = s.tensor_parallel
    share = replace(
        s,
        model=shard(s.model, k),
        reward=s.reward and shard(s.reward, k),
        value=s.value and shard(s.value, k),
        teacher=s.teacher and shard(s.teacher, k),
        gpus=s.replicas,
        nodes=1,
        tensor_parallel=1,
    )
    phases = of_stage(share)
    others = {"reward": s.reward, "value": s.value, "teacher": s.teacher}
    for f in phases:
        f.devices, model = k, others.get(f.role) or s.model
        row = model.hidden * s.pass_bytes_per_weight // (2 if s.autocast else 1)
        passes = {"advantage": 0, "optimizer": 0, "backward": 1 + s.gradient_checkpointing}
        often = passes.get(f.name, 1) * all_reduces(model)
        if f.name == "rollout":  # a sum for every token
            f.sums = row * f.tokens / max(1, s.response), often * s.response
        elif often:
            f.sums = row * f.tokens, often
    return phases


def all_reduce_seconds(size: float, k: int, nodes: int, hw: Hardware) -> float:
    """Seconds of a sum of `size` bytes over k devices in `nodes` machines, in a ring: each passes
    on 2(k − 1)/k of it in 2(k − 1) hops (Patarasuk and Yuan, 2009), in NCCL's fastest protocol.

    Raises ValueError where the device has no known link.
    """
    if k == 1:
        return 0.0
    speeds = [hw.speed_of("link")]
    if nodes > 1:  # a ring for each device of a machine
        speeds.append(hw.speed_of("network") * k / nodes)
    near = "nvlink" if speeds[0] >= ENGINE["nvlink"] else "pcie"
    across, moved = 2 * (nodes - 1), 2 * (k - 1) / k * size / min(speeds)
    return min(
        p["begin"] + (2 * (k - 1) - across) * p[near] + across * p["network"] + moved / p["reached"]
        for p in PROTOCOLS
    )
