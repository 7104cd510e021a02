"""One layer of each family, written as transformers computes it, on a tape (see `tape.py`).

The order of operations, which intermediate values exist and what is cast are those of
transformers' modelling code; the widths come from `architecture.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from .architecture import Architecture, Layer, Linear
from .tape import Store, Tape, Value


@dataclass(frozen=True)
class PassConfig:
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

    @property
    def block(self) -> int:
        """Bytes to which the allocator rounds."""
        return 512 if self.gpu else 1

    @property
    def tokens(self) -> int:
        """b · s"""
        return self.b * self.s


def linear(t: Tape, p: PassConfig, lin: Linear, x: Value) -> Value:
    """A linear map, with its adapters (peft's Linear.forward) where it has some."""
    y = t.linear(x, lin.inputs, lin.outputs, p.bytes_per_weight, trained=p.trained, bias=lin.bias)
    rank = lin.rank(p.lora_r, p.targets) if p.lora_r else 0
    if not rank:
        return y
    itemsize = y.itemsize
    x = t.cast(x, p.adapter_bytes_per_weight)
    low = t.linear(x, lin.inputs, rank, p.adapter_bytes_per_weight, trained=True)
    y = t.add(y, t.mul(t.linear(low, rank, lin.outputs, p.adapter_bytes_per_weight, trained=True)))
    return t.cast(y, itemsize)


class LayerRun:
    """A layer being written on a tape."""

    def __init__(self, tape: Tape, model: Architecture, layer: Layer, p: PassConfig):
        self.t, self.m, self.p = tape, model, p
        self.linears = {(lin.part, lin.name): lin for lin in layer.linears}
        self.facts = model.facts

    # ------------------------------------------------------------------------------ small parts

    def linear(self, x: Value, name: str, part: str = "attention") -> Value:
        return linear(self.t, self.p, self.linears[part, name], x)

    def norm(self, x: Value, width: int | None = None) -> Value:
        t, p, width = self.t, self.p, width or self.m.hidden
        rows = x.numel // width
        if self.facts.norm == "layer":
            return t.layer_norm(x, rows, width, p.trained, p.bytes_per_weight)
        fp32 = t.cast(x, 4)
        scale = t.pointwise(t.mean(t.pointwise(fp32, plain=True), rows), "output")
        normed = t.mul(fp32, scale)
        if self.facts.norm == "rms_fp32":  # (x · w) is cast, not x
            return t.cast(t.scale(normed, width, p.trained, 4), x.itemsize)
        return t.scale(t.cast(normed, x.itemsize), width, p.trained, p.bytes_per_weight)

    def rotate(self, x: Value) -> Value:
        """x · cos + rotate_half(x) · sin; the tables have the precision of the hidden states."""
        t = self.t

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
        flops = 4.0 * pairs * m.head_dim
        if k.numel < q.numel and not p.context and (p.padded or p.attention == "eager"):
            k, v = t.copy(k, q.numel), t.copy(v, q.numel)  # repeat_kv
        if p.context:
            return self.read_cache(q, flops)
        if p.attention != "eager":
            mask = p.b * p.s * p.s if p.padded else 0
            out = t.attention(q, k, v, p.b * m.heads * p.s, mask, flops)
            return t.copy(out) if self.facts.partial_rotary else out
        if self.facts.interleaved_qkv:
            v = t.copy(v)  # a batched product needs it apart
        scores = t.mul(t.matmul(q, k, pairs, flops / 2))
        if self.facts.softcap:
            scores = t.mul(t.pointwise(t.mul(scores), "output"))
        # The mask's bytes are counted once for the whole pass (`heads.resident_bytes`).
        scores = t.add(scores, Value(Store(t, 0), pairs, self.stream))
        if self.facts.fp32_softmax:
            scores = t.cast(scores, 4)
        weights = t.cast(t.pointwise(scores, "output"), v.itemsize)
        return t.copy(t.matmul(weights, v, q.numel, flops / 2))

    def read_cache(self, q: Value, flops: float) -> Value:
        """One query against a cache, which is counted elsewhere; reading it is the work."""
        t, p, m = self.t, self.p, self.m
        cache = 2.0 * p.b * p.context * m.kv_heads * m.head_dim * q.itemsize
        t.count_product((flops, cache, 1.0))
        t.forward.moved += 2 * cache  # keys and values are copied to grow
        t.forward.called += 2
        return t.result(q.numel, q.itemsize, [])

    # ------------------------------------------------------------------------------------ layers

    def layer(self, x: Value) -> Value:
        """The layer's output, with the same number of values as its input."""
        self.stream = x.itemsize
        run = {"gated": self.gated, "gpt2": self.gpt2, "gpt_neox": self.gpt_neox, "opt": self.opt}
        return run[self.facts.layer](x)

    def gated(self, x: Value) -> Value:
        """Llama and its relatives."""
        around = self.facts.norms_around
        y = self.gated_attention(self.norm(x))
        x = self.t.add(x, self.norm(y) if around else y)
        y = self.gated_mlp(self.norm(x))
        return self.t.add(x, self.norm(y) if around else y)

    def gated_attention(self, x: Value) -> Value:
        m = self.m
        if ("attention", "qkv_proj") in self.linears:
            q, k, v = self.parts(self.linear(x, "qkv_proj"))
        else:
            q, k = self.linear(x, "q_proj"), self.linear(x, "k_proj")
            if self.facts.qk_norm:
                q, k = self.norm(q, m.head_dim), self.norm(k, m.head_dim)
            v = self.linear(x, "v_proj")
        q, k = self.rotate(q), self.rotate(k)
        return self.linear(self.attend(q, k, v), "o_proj")

    def parts(self, qkv: Value) -> list[Value]:
        """Queries, keys and values of a joint projection."""
        heads = (self.m.heads, self.m.kv_heads, self.m.kv_heads)
        return self.t.split(qkv, *(self.p.tokens * n * self.m.head_dim for n in heads))

    def gated_mlp(self, x: Value) -> Value:
        t = self.t
        if ("mlp", "gate") in self.linears:
            return self.mixture(x)
        if ("mlp", "gate_up_proj") in self.linears:
            both = self.linear(x, "gate_up_proj", "mlp")
            gate, up = t.split(both, both.numel // 2, both.numel // 2)
            del both
        else:
            gate, up = self.linear(x, "gate_proj", "mlp"), None
        gate = t.pointwise(gate)
        up = up or self.linear(x, "up_proj", "mlp")
        return self.linear(t.mul(gate, up), "down_proj", "mlp")

    def mixture(self, x: Value) -> Value:
        """Router and active experts; each token passes `active` of them."""
        t, p, m = self.t, self.p, self.m
        up, down = self.linears["mlp", "gate_up_proj"], self.linears["mlp", "down_proj"]
        router = t.pointwise(t.cast(self.linear(x, "gate", "mlp"), 4), "output")
        routed = t.copy(x, x.numel * m.active)
        both = t.linear(routed, up.inputs, up.outputs, p.bytes_per_weight, trained=False)
        gate, value = t.split(both, both.numel // 2, both.numel // 2)
        inner = t.mul(t.pointwise(gate), value)
        out = t.linear(inner, down.inputs, down.outputs, p.bytes_per_weight, trained=False)
        weighed = t.mul(
            out, Value(router.store, p.tokens * m.active, out.itemsize, router.needs, router.source)
        )
        return t.copy(weighed, x.numel)

    def gpt2(self, x: Value) -> Value:
        q, k, v = self.parts(self.linear(self.norm(x), "c_attn"))
        x = self.t.add(self.linear(self.attend(q, k, v), "c_proj"), x)
        del q, k, v
        y = self.gelu_new(self.linear(self.norm(x), "c_fc", "mlp"))
        return self.t.add(x, self.linear(y, "c_proj", "mlp"))

    def gpt_neox(self, x: Value) -> Value:
        t = self.t
        attended = self.neox_attention(self.norm(x))
        y = t.pointwise(self.linear(self.norm(x), "dense_h_to_4h", "mlp"))
        y = self.linear(y, "dense_4h_to_h", "mlp")
        return t.add(t.add(y, attended), x)

    def neox_attention(self, x: Value) -> Value:
        q, k, v = self.parts(self.linear(x, "query_key_value"))
        q, k = self.t.copy(self.rotate(q)), self.t.copy(self.rotate(k))
        return self.linear(self.attend(q, k, v), "dense")

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
