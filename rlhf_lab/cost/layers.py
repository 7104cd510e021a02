"""One layer of each family, written as transformers computes it, on a tape (see `tape.py`).

The order of operations, which intermediate values exist and what is cast are those of
transformers' modelling code; the widths come from `architecture.py`.
"""

from __future__ import annotations

from typing import NamedTuple

from .architecture import Architecture, Layer, Linear
from .dora import dora
from .quantization import FORMATS
from .tape import Tape
from .values import Store, Value, Way
from .work import PLAIN, product


class PassConfig(NamedTuple):
    """How a model is run: `b` sequences of `s` tokens.

    `autocast`: matrix products in 2 bytes; `trained`: its own weights are; `lora_r`, `targets`:
    rank and names of adapters; `attention`: "sdpa" (fused) or "eager"; `padded`: a mask exists;
    `gpu`: kernels and the allocator's rounding are a GPU's.
    """

    b: int
    s: int
    bytes_per_weight: int = 4
    autocast: bool = False
    trained: bool = True
    lora_r: int = 0
    targets: tuple[str, ...] = ()
    adapter_bytes_per_weight: int = 4
    attention: str = "sdpa"
    padded: bool = True
    gpu: bool = False
    context: int = 0
    """tokens that are read, where they are more than `s`: decoding with a cache"""
    fused: bool = False
    """norms, rotations and gated activations are one kernel each (Liger, Hsu et al., 2410.10989)"""
    away: str = ""
    """what waits in main memory for the backward pass: "" nothing, "inputs" of recomputed layers,
    "all" that is saved"""
    selective: bool = False
    """of recomputed layers every second product and attention stay (torchtitan's selective "op")"""
    dropout: bool = False
    """in front of adapters"""
    quantized: str = "none"
    """what weights are kept in, where their products are to be counted so: of `FORMATS`, or none"""
    use_dora: bool = False
    compiled: bool = False
    """layers, and PPO's work on logits (`ppo/compiled.py`)"""

    @property
    def block(self) -> int:
        """Bytes to which the allocator rounds."""
        return 512 if self.gpu else 1

    @property
    def tokens(self) -> int:
        """b · s"""
        return self.b * self.s


def linear(t: Tape, p: PassConfig, lin: Linear, x: Value, bare: bool = False) -> Value:
    """A linear map, with its adapters (peft's Linear.forward) where it has some; `bare`: a
    parameter that is no linear module's."""
    rank = lin.rank(p.lora_r, p.targets) if p.lora_r else 0
    if rank and (bare or lin.copies > 1):
        return adapted_weights(t, p, lin, x, rank)
    size = lin.inputs, lin.outputs, p.bytes_per_weight
    y = t.linear(x, *size, trained=p.trained, bias=lin.bias, copies=lin.copies)
    if p.quantized != "none":
        _dequantise(t, p, lin, x, y)
    if not rank:
        return y
    itemsize = y.itemsize
    x = t.cast(x, p.adapter_bytes_per_weight)
    if p.use_dora:
        return t.cast(dora(t, p, lin, x, y, rank), itemsize)
    if p.dropout:
        x = t.dropout(x)
    low = t.linear(x, lin.inputs, rank, p.adapter_bytes_per_weight, trained=True)
    y = t.add(y, t.mul(t.linear(low, rank, lin.outputs, p.adapter_bytes_per_weight, trained=True)))
    return t.cast(y, itemsize)


def adapted_weights(t: Tape, p: PassConfig, lin: Linear, x: Value, rank: int) -> Value:
    """Experts, and routers, with adapters: peft adds B · A to their weights, which makes them anew
    in every pass (`ParamWrapper`), and their gradient on the way back. Those of experts are made
    twice, the first time for torch to look at (`register_parametrization`, peft 0.21)."""
    whole, weight = lin.copies * lin.inputs * lin.outputs, p.bytes_per_weight
    pair = lin.copies * rank * (lin.inputs + lin.outputs)
    own = p.adapter_bytes_per_weight
    factors = t.cast(t.result(pair, own, [], weights=(pair * own,)), weight)
    made = product(lin.copies * lin.outputs, rank, lin.inputs, weight)
    t.count_product(made)
    if lin.copies > 1:
        t.count_product(made)
        t.forward.moved += whole * weight
    ways: list[tuple[Value, Way]] = [(factors, "new")]
    merged = t.result(whole, weight, ways, (factors.store,), work=[made, made], last=1)
    return t.grouped(x, merged, lin.inputs, lin.outputs, lin.copies)


def _dequantise(t: Tape, p: PassConfig, lin: Linear, x: Value, y: Value) -> None:
    """Count the last product as one of small weights: what it reads of them, and writing them out
    before, which takes a copy for as long as the product lasts. The backward pass always writes
    them out; LLM.int8 keeps the input for it (bitsandbytes, autograd/_functions.py)."""
    kind, rows = FORMATS[p.quantized], y.numel / lin.outputs
    read, written = kind.moved(lin, rows, y.itemsize)
    flops, touched, times, what = t.forward.products[-1]
    touched += read - lin.inputs * lin.outputs * y.itemsize
    t.forward.products[-1] = flops, touched, times, what
    t.forward.moved += written
    t.forward.called += kind.calls
    whole = lin.inputs * lin.outputs * y.itemsize
    if written:
        Store(t, whole)
    if y.source is not None:
        moved, exponentials, launched = y.source.costs
        moved += (kind.size(lin) + whole) / kind.share
        y.source.costs = moved, exponentials, launched + 1
        y.source.scratch += whole
        if p.quantized == "int8":
            y.source.saved = (*y.source.saved, x.store)


class LayerRun:
    """A layer being written on a tape."""

    def __init__(self, tape: Tape, model: Architecture, layer: Layer, p: PassConfig):
        self.t, self.m, self.p = tape, model, p
        self.linears = {(lin.part, lin.name): lin for lin in layer.linears}
        self.maps, self.cached = layer.linears, layer.cached
        self.facts = model.facts

    # ------------------------------------------------------------------------------ small parts

    def linear(self, x: Value, name: str, part: str = "attention") -> Value:
        bare = name == self.facts.router and not self.facts.router_linear
        return linear(self.t, self.p, self.linears[part, name], x, bare)

    def norm(self, x: Value, width: int | None = None) -> Value:
        t, p, width = self.t, self.p, width or self.m.hidden
        rows = x.numel // width
        kind = self.facts.norm
        if kind == "layer_bare":
            return t.cast(t.row_norm(t.cast(x, 4), rows, width, False, 4), x.itemsize)
        if kind in ("layer", "layer_unbiased"):
            return t.row_norm(x, rows, width, p.trained, p.bytes_per_weight)
        if p.fused and kind in ("rms", "rms_fp32"):
            return t.row_norm(x, rows, width, p.trained, p.bytes_per_weight, liger=True)
        fp32 = t.cast(x, 4)
        if kind == "layer_fp32":  # the mean comes off twice: for the variance, and for the result
            _ = t.mean(fp32, rows)
            squares = t.pointwise(t.add(fp32), plain=True)
            scale = t.pointwise(t.mean(squares, rows), "output")
            return t.cast(t.scale(t.mul(t.add(fp32), scale), width, p.trained, 4), x.itemsize)
        scale = t.pointwise(t.mean(t.pointwise(fp32, plain=True), rows), "output")
        normed = t.mul(fp32, scale)
        if kind == "rms_fp32":  # (x · w) is cast, not x
            return t.cast(t.scale(normed, width, p.trained, 4), x.itemsize)
        return t.scale(t.cast(normed, x.itemsize), width, p.trained, p.bytes_per_weight)

    def rotate(self, x: Value) -> Value:
        """x · cos + rotate_half(x) · sin; the tables have the precision of the hidden states."""
        t = self.t
        if self.p.fused:
            return t.in_place(x)

        def by_table(x: Value) -> Value:
            if self.stream > x.itemsize:  # a product with a table of fp32 is fp32
                return t.pointwise(x, "nothing", self.stream)
            return t.mul(x)

        first = by_table(x)
        return t.add(first, by_table(t.pointwise(x, "nothing")))  # the negated half, freed at once

    def gelu_new(self, x: Value) -> Value:
        """½x(1 + tanh(√(2/π)(x + 0.044715x³))), one operation at a time as transformers does."""
        t = self.t
        inner = t.mul(t.add(x, t.mul(t.pointwise(x, plain=True))))
        return t.mul(t.mul(x), t.mul(t.pointwise(inner, "output")))

    # --------------------------------------------------------------------------------- attention

    def attend(self, q: Value, k: Value, v: Value) -> Value:
        t, p, m = self.t, self.p, self.m
        read = p.context or p.s
        pairs = p.b * m.heads * p.s * read
        flops = 2 * pairs * (m.head_dim + m.value_dim)
        out = p.tokens * m.heads * m.value_dim
        if k.numel < q.numel and not p.context and (p.padded or p.attention == "eager"):
            k, v = t.copy(k, q.numel), t.copy(v, q.numel)  # repeat_kv
        if p.context:
            return self.read_cache(q, flops, out)
        if p.attention != "eager":
            mask = p.b * p.s * p.s if p.padded else 0
            rows = p.b * m.heads * p.s
            attended = t.attention(q, k, v, rows, mask, flops, pairs, out)
            return t.copy(attended) if self.facts.partial_rotary else attended
        if self.facts.interleaved_qkv:
            v = t.copy(v)  # a batched product needs it apart
        scores = t.mul(t.matmul(q, k, pairs, 2 * pairs * m.head_dim))
        if self.facts.softcap:
            scores = t.mul(t.pointwise(t.mul(scores), "output"))
        # The mask's bytes are counted once for the whole pass (`heads.resident_bytes`).
        scores = t.add(scores, Value(Store(t, 0), pairs, self.stream))
        if self.facts.sinks:  # joined to the scores, and the largest of all taken off
            scores = t.add(t.copy(scores), Value(Store(t, 0), pairs, scores.itemsize))
        elif self.facts.fp32_softmax:
            scores = t.cast(scores, 4)
        weights = t.cast(t.pointwise(scores, "output"), v.itemsize)
        if self.facts.sinks:  # a part of a tensor is copied for a product
            weights = t.copy(weights)
        return t.copy(t.matmul(weights, v, out, 2 * pairs * m.value_dim))

    def read_cache(self, q: Value, flops: int, out: int) -> Value:
        """One query against a cache, which is counted elsewhere; reading it is the work."""
        t, p, m = self.t, self.p, self.m
        cache = p.b * p.context * m.kv_heads * (m.head_dim + m.value_dim) * q.itemsize
        t.count_product((flops, cache, 1.0, PLAIN))
        t.forward.moved += 2 * cache  # keys and values are copied to grow
        t.forward.called += 2
        return t.result(out, q.itemsize, [])

    # ------------------------------------------------------------------------------------ layers

    def layer(self, x: Value) -> Value:
        """The layer's output, with the same number of values as its input."""
        self.stream, self.t.compiled = x.itemsize, self.p.compiled
        y: Value = getattr(self, self.facts.layer)(x)
        self.t.read(y)  # by whatever follows
        self.t.compiled = False
        return y

    def gated(self, x: Value) -> Value:
        """Llama and its relatives."""
        t, norms = self.t, self.m.norms
        if norms.startswith("parallel"):
            first = self.norm(x)
            attended = self.gated_attention(first)
            y = self.gated_mlp(self.norm(x) if norms == "parallel_two" else first)
            return t.add(t.add(y, attended), x)
        for part in (self.gated_attention, self.gated_mlp):
            y = part(self.norm(x) if norms != "after" else x)
            x = t.add(x, self.handed_on(y))
        return x

    def handed_on(self, y: Value) -> Value:
        """What attention or MLP adds to the stream."""
        if self.m.norms in ("after", "around"):
            return self.norm(y)
        return self.t.mul(y) if self.facts.scaled_residual else y

    def gated_attention(self, x: Value) -> Value:
        m, facts = self.m, self.facts
        if ("attention", "kv_b_proj") in self.linears:
            return self.linear(self.attend(*self.latent(x)), facts.out_map)
        if facts.qkv_map:
            q, k, v = self.parts(self.linear(x, facts.qkv_map))
        else:
            q, k = self.linear(x, "q_proj"), self.linear(x, "k_proj")
            if facts.qk_norm and not facts.qk_norm_if:
                one = facts.qk_norm == "head"
                q = self.norm(q, m.head_dim if one else m.heads * m.head_dim)
                k = self.norm(k, m.head_dim if one else m.kv_heads * m.head_dim)
            v = self.linear(x, "v_proj")
        if facts.positions == "rotary":
            q, k = self.rotate(q), self.rotate(k)
        return self.linear(self.attend(q, k, v), facts.out_map)

    def latent(self, x: Value) -> tuple[Value, Value, Value]:
        """Queries, keys and values of latent attention: what the cache keeps is narrow, and every
        pass makes keys and values of all heads from all of it."""
        t, p, m, lin = self.t, self.p, self.m, self.linears
        if ("attention", "q_a_proj") in lin:
            low = self.linear(x, "q_a_proj")
            q = self.linear(self.norm(low, low.numel // p.tokens), "q_b_proj")
        else:
            q = self.linear(x, "q_proj")
        down, up = lin["attention", "kv_a_proj_with_mqa"], lin["attention", "kv_b_proj"]
        turned = down.outputs - up.inputs
        still, rest = t.split(q, *(p.tokens * m.heads * n for n in (m.head_dim - turned, turned)))
        both = self.linear(x, "kv_a_proj_with_mqa")
        low, key = t.split(both, p.tokens * up.inputs, p.tokens * turned)
        low = self.norm(low, up.inputs)
        rest, key = self.rotate(rest), self.rotate(key)
        q = t.join(still, rest)
        if p.context:  # all that was read before is made again
            low = t.copy(low, p.b * p.context * up.inputs)
        wide = self.linear(low, "kv_b_proj")
        rows = low.numel // up.inputs * m.heads
        nope, v = t.split(wide, rows * (m.head_dim - turned), rows * m.value_dim)
        return q, t.join(nope, t.copy(key, rows * turned)), v

    def parts(self, qkv: Value) -> list[Value]:
        """Queries, keys and values of a joint projection."""
        heads = (self.m.heads, self.m.kv_heads, self.m.kv_heads)
        return self.t.split(qkv, *(self.p.tokens * n * self.m.head_dim for n in heads))

    def gated_mlp(self, x: Value) -> Value:
        t = self.t
        if ("mlp", self.facts.router) in self.linears:
            y = self.mixture(x)
            if any(name.startswith("shared_") for _, name in self.linears):
                y = t.add(y, self.shared(x))
            return y
        return self.mlp(x)

    def shared(self, x: Value) -> Value:
        """The expert that every token passes, and its gate."""
        t, y = self.t, self.mlp(x, "shared_")
        if ("mlp", "shared_expert_gate") in self.linears:
            gate = t.pointwise(self.linear(x, "shared_expert_gate", "mlp"), "output")
            y = t.mul(y, gate)
        return y

    def mlp(self, x: Value, prefix: str = "") -> Value:
        t, facts = self.t, self.facts
        *ups, down = (prefix + name for name in facts.mlp_maps.split())
        inner = self.linear(x, ups[0], "mlp")
        if not facts.gated:
            inner = self.gelu_new(inner) if facts.gelu_new else t.pointwise(inner)
            return self.linear(inner, down, "mlp")
        up = None
        if len(ups) == 1:
            both = inner
            inner, up = t.split(both, both.numel // 2, both.numel // 2)
            del both
        if self.p.fused:
            up = up or self.linear(x, ups[1], "mlp")
            return self.linear(t.fused_gate(inner, up), down, "mlp")
        inner = t.pointwise(inner)
        up = up or self.linear(x, ups[1], "mlp")
        return self.linear(t.mul(inner, up), down, "mlp")

    def mixture(self, x: Value) -> Value:
        """Router and experts, as transformers' grouped products compute them: each token passes
        `active` of them, in the order of the experts."""
        t, p, m = self.t, self.p, self.m
        scores = t.pointwise(t.cast(self.linear(x, self.facts.router, "mlp"), 4), "output")
        shares = t.copy(scores, p.tokens * m.active)
        del scores
        both = self.linear(t.copy(x, x.numel * m.active), "gate_up_proj", "mlp")
        gate, up = t.split(both, both.numel // 2, both.numel // 2)
        del both
        y = self.linear(t.mul(t.pointwise(gate), up), "down_proj", "mlp")
        del gate, up
        y = t.copy(t.mul(y, shares))  # weighed, and put back in the order of the tokens
        return t.cast(t.mean(y, x.numel), x.itemsize)

    # ------------------------------------------------------------------- families with their own

    def matrices(self, x: Value) -> Value:
        """A layer of which only the matrices are known: two parts with a norm before each, the maps
        in their order. Those that read the hidden width read the norm, others and the last read the
        results of those before, each with an activation."""
        t, m, tokens = self.t, self.m, self.p.tokens

        def joined(values: list[Value], numel: int) -> Value:
            first, *more = values
            if more and first.numel == more[0].numel:  # as a gate
                return joined([t.mul(first, more[0]), *more[1:]], numel)
            whole = t.join(*values) if more else first
            return whole if whole.numel == numel else t.copy(whole, numel)

        for part in ("attention", "mlp"):
            maps = [lin for lin in self.maps if lin.part == part]
            normed, results = self.norm(x), list[Value]()
            for lin in maps:
                last, rows = lin is maps[-1], tokens * min(m.active, lin.copies)
                source = [normed]
                if results and (last or lin.inputs != m.hidden):
                    source, results = results, []
                if last and part == "attention" and self.cached:
                    widths = (m.heads, m.kv_heads, m.kv_heads)
                    q, k, v = (joined(source, tokens * n * m.head_dim) for n in widths)
                    source = [self.attend(q, k, v)]
                y = linear(t, self.p, lin, joined(source, rows * lin.inputs))
                results.append(y if last else t.pointwise(y))
            x = t.add(x, joined(results, x.numel)) if maps else x
        return x

    def plain(self, x: Value) -> Value:
        """GPT-2 and, with `positions` that turn, GPT-NeoX: how long they keep what they read."""
        t, facts = self.t, self.facts
        (up, down), beside = facts.mlp_maps.split(), self.m.norms == "parallel_two"
        normed = [self.norm(x)]
        q, k, v = self.parts(self.linear(normed[0], facts.qkv_map))
        if facts.positions == "rotary":  # the parts of a head are joined anew
            q, k = t.copy(self.rotate(q)), t.copy(self.rotate(k))
        else:
            normed.clear()
        y = self.linear(self.attend(q, k, v), facts.out_map)
        first, x = (y, x) if beside else (None, t.add(x, y))
        del q, k, v, y, normed
        y = self.linear(self.norm(x), up, "mlp")
        y = self.gelu_new(y) if facts.gelu_new else t.pointwise(y)
        y = self.linear(y, down, "mlp")
        return t.add(t.add(y, first), x) if first else t.add(x, y)

    def opt(self, x: Value) -> Value:
        t, first = self.t, self.m.norm_first
        y = self.opt_attention(self.norm(x) if first else x)
        x = t.add(x, y)
        del y
        x = x if first else self.norm(x)
        y = t.pointwise(self.linear(self.norm(x) if first else x, "fc1", "mlp"), "output")
        x = t.add(x, self.linear(y, "fc2", "mlp"))
        return x if first else self.norm(x)

    def opt_attention(self, x: Value) -> Value:
        q = self.t.mul(self.linear(x, "q_proj"))
        k, v = self.linear(x, "k_proj"), self.linear(x, "v_proj")
        return self.linear(self.attend(q, k, v), "out_proj")
