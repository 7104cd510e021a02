"""A pencil-and-paper autograd: what PyTorch keeps, frees and computes, in plain arithmetic.

A `Value` is a tensor of which only the size is known. Operations on a `Tape` allocate their result
and note what autograd saves for the backward pass; a `Store` gives its bytes back when nothing
refers to it any more, as a tensor does. So a layer written with these operations (`layers.py`)
gives its memory at every moment, and its work, without a tensor.

The rules are PyTorch's: what each operation saves is in its derivatives.yaml, and a gradient that
reaches a value twice is added in place, unless it is also somebody else's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from sys import getrefcount

from .values import ACTIVATION, BYTE_KINDS, GRADIENT, Fused, Moments, Node, Store, Value, Way
from .work import CAUSAL, MASKED, NOTHING, PLAIN, Costs, Product, Work, product


class Tape:
    """Live bytes, their peak, and the operations of one segment of a model.

    `block`: bytes every request is rounded up to. `autocast`: matrix products run in 2 bytes
    whatever they are given. `grad`: whether anything is saved.
    """

    def __init__(self, block: int = 1, autocast: bool = False, grad: bool = True):
        self.block, self.autocast, self.grad = block, autocast, grad
        self.live, self.by_kind = 0, [0] * len(BYTE_KINDS)
        self.reset_peak()
        self.nodes: list[Node] = []
        self.kept_gradients: list[Store] = []
        self.cache: list[Store] = []
        """kept until the forward pass ends: autocast's copies of trained weights, variables"""
        self.forward, self.backward = Work(), Work()
        self.needed = self.maps = 0
        """products up to the last value that was saved: what a checkpoint computes again; maps"""
        self.kind = ACTIVATION  # of new values
        self.compiled = False
        """what is written now is compiled: all but products and sums of rows is fused"""
        self.returned: list[Store] = []
        """what waits in main memory, and is here again during the whole backward pass"""
        self.selected: dict[int, Sequence[Store]] | None = None
        """where recomputation selects: numbers of the products that stay, and their results"""

    # What `recording.Recorder` does otherwise: it knows no sizes, and finds the peak later.

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak, self.peak_by_kind = self.live, self.by_kind[:]

    def allocated(self, size: int) -> int:
        """The bytes that the allocator gives for a request of `size`."""
        return -(-size // self.block) * self.block

    def rose(self) -> None:
        """More is alive than ever since `reset_peak`."""
        self.reset_peak()

    rises = False
    """whether the last that happened was a rise that `falls` has to know of"""

    def falls(self) -> None:
        """Something is about to be given back."""

    @property
    def moments(self) -> Moments:
        """What may be the peak since `reset_peak`: bytes by kind. It is known here."""
        return [self.peak_by_kind]

    # ------------------------------------------------------------------------------- operations

    def new(self, numel: int, itemsize: int, needs: bool = False) -> Value:
        """A value that is simply there: an input."""
        return Value(Store(self, numel * itemsize), numel, itemsize, needs)

    def result(
        self,
        numel: int,
        itemsize: int,
        inputs: Sequence[tuple[Value, Way]],
        saved: Sequence[Store] = (),
        weights: Sequence[int] = (),
        scratch: int = 0,
        work: Sequence[Product] = (),
        store: Store | None = None,
        last: int = 0,
        costs: Costs = NOTHING,
    ) -> Value:
        """The result of an operation. `inputs`: values, and how their gradients come about;
        `weights`: bytes of the gradients of parameters; `last`: 1 for a product, which saves its
        inputs and not its result; `costs`: of undoing it, beside what follows from sizes."""
        fused, size = self.compiled and not (work or last), numel * itemsize
        if fused:
            store = store or self._made(size, *(value for value, _ in inputs))
            scratch = 0
        store = store or Store(self, size, self.kind)
        if not self.grad:
            return Value(store, numel, itemsize)
        ways = [way for way in inputs if way[0].needs]
        if not (ways or weights or scratch):
            return Value(store, numel, itemsize)
        # A leaf has no source: the segment's own input keeps its gradient in a node of its own.
        targets = []
        for value, how in ways:
            if value.source is None:
                value.source = Node(fused=self.compiled)
                self.nodes.insert(0, value.source)
            targets.append((value.source, value.numel * value.itemsize, how))
        if saved or last:
            self.needed = len(self.forward.products) - last
        for x in (x for here in saved for x in here.roots) if self.compiled else ():
            x.adds = 0  # to keep it once more
        node = Node(targets, saved, weights, scratch, work, store.kind, costs, fused=fused)
        self.nodes.append(node)
        return Value(store, numel, itemsize, True, node)

    def _made(self, size: int, *inputs: Value) -> Store:
        """The result of what compiled code fuses. It is written down where keeping that adds less
        than keeping what it is made of: a sum of two products."""
        if not self.compiled:
            return Store(self, size, self.kind)
        fused = Fused(self, size, [x.store for x in inputs], self.kind)
        # Half as much again is left to numbers of which each row has one.
        written = self.grad and 2 * sum(x.adds for x in fused.roots) > 3 * size
        return fused.write(self.forward) if written else fused

    def read(self, *values: Value) -> None:
        """A product reads these: they are written down."""
        for x in values:
            x.store = x.store.write(self.forward)

    def split(self, x: Value, *numels: int) -> list[Value]:
        """Parts of a value, without a copy; their gradients are joined again."""
        whole = self.result(x.numel, x.itemsize, [(x, "new")], store=x.store)
        if whole.source is not None:
            whole.source.joins = True
        return [Value(x.store, n, x.itemsize, whole.needs, whole.source) for n in numels]

    def _count_moves(self, *values: Value, out: float = 0) -> None:
        if self.compiled:  # counted where it is written down
            return
        for v in values:
            out += v.numel * v.itemsize
        self.forward.moved += out
        self.forward.called += 1

    def count_product(self, done: Product) -> None:
        self.forward.products.append(done)
        self.forward.launched += self.compiled
        self.forward.called += not self.compiled

    def select(self, *stores: Store, maps: bool = False) -> None:
        """The last product stays: attention, and the odd ones of maps."""
        self.maps += maps
        if self.selected is not None and (self.maps % 2 or not maps):
            self.selected[len(self.forward.products) - 1] = stores

    def join(self, *values: Value) -> Value:
        """Values side by side in a new one; each gradient is a part of the one that comes in."""
        numel, itemsize = sum(v.numel for v in values), values[0].itemsize
        self._count_moves(*values, out=numel * itemsize)
        return self.result(numel, itemsize, [(v, "new") for v in values])

    def cast(self, x: Value, itemsize: int) -> Value:
        """Another precision; nothing where it is the same."""
        if x.itemsize == itemsize:
            return x
        if x.cast and x.cast.itemsize == itemsize:
            return x.cast
        self._count_moves(x, out=x.numel * itemsize)
        y = self.result(x.numel, itemsize, [(x, "new")])
        x.cast = y if self.compiled else None
        return y

    def copy(self, x: Value, numel: int | None = None) -> Value:
        """A copy, as `contiguous`, `cat` or an expansion make it; `numel` where it grows."""
        numel = numel or x.numel
        self._count_moves(x, out=numel * x.itemsize)
        return self.result(numel, x.itemsize, [(x, "new")])

    def add(self, *values: Value) -> Value:
        """A sum: saves nothing; each gradient is the one that came in (cast where it must be)."""
        itemsize, numel = max(v.itemsize for v in values), max(v.numel for v in values)
        self._count_moves(*values, out=numel * itemsize)
        ways: list[tuple[Value, Way]] = [
            (v, "same" if (v.itemsize, v.numel) == (itemsize, numel) else "new") for v in values
        ]
        _ = self._widened(values, itemsize)
        return self.result(numel, itemsize, ways)

    def _widened(self, values: Iterable[Value], itemsize: int) -> list[Store]:
        """Copies that a CPU makes, for as long as an operation lasts, of inputs of another
        precision than its own (ATen/TensorIterator.cpp); a GPU casts each number as it reads."""
        if self.block > 1 or self.compiled:
            return []
        return [
            Store(self, v.numel * itemsize, self.kind) for v in values if v.itemsize != itemsize
        ]

    def mul(self, x: Value, y: Value | None = None) -> Value:
        """A product, with a constant where `y` is None; saves the factor of each gradient."""
        if y is None:
            self._count_moves(x, out=x.numel * x.itemsize)
            return self.result(x.numel, x.itemsize, [(x, "new")])
        itemsize, numel = max(x.itemsize, y.itemsize), max(x.numel, y.numel)
        self._count_moves(x, y, out=numel * itemsize)
        saved = (*((y.store,) if x.needs else ()), *((x.store,) if y.needs else ()))
        # The gradient of a factor that was expanded is made whole before it is summed.
        scratch = numel * itemsize * any(v.needs and v.numel < numel for v in (x, y))
        _ = self._widened((x, y), itemsize)
        return self.result(numel, itemsize, [(x, "new"), (y, "new")], saved, scratch=scratch)

    def pointwise(
        self, x: Value, saves: str = "input", itemsize: int | None = None, plain: bool = False
    ) -> Value:
        """A function of each number that saves its "input" or its "output" (or "nothing"). `plain`:
        a square or a cube, else an exponential or the like."""
        itemsize = itemsize or x.itemsize
        self._count_moves(x, out=x.numel * itemsize)
        store, costs = self._made(x.numel * itemsize, x), NOTHING
        saved: tuple[Store, ...] = ()
        if not plain and saves != "nothing":
            self.forward.transcendentals += x.numel
        if saves == "output":
            saved = (store,)
        elif saves == "input":  # the function is computed again on the way back
            saved, costs = (x.store,), NOTHING if plain else (0, x.numel, 0)
        return self.result(x.numel, itemsize, [(x, "new")], saved, store=store, costs=costs)

    def dropout(self, x: Value) -> Value:
        """torch's own: a GPU's kernel saves which numbers stay, a byte each; a CPU multiplies by a
        tensor of what they are multiplied by (ATen/native/Dropout.cpp)."""
        on_gpu = self.block > 1
        kept = Store(self, x.numel * (1 if on_gpu else x.itemsize))
        self._count_moves(x, out=x.numel * x.itemsize + (1 if on_gpu else 4) * kept.size)
        return self.result(x.numel, x.itemsize, [(x, "new")], (kept,))

    def mean(self, x: Value, rows: int) -> Value:
        """The mean, or the sum, of each row; its gradient is only read again."""
        self._count_moves(x, out=rows * x.itemsize)
        store = Store(self, rows * x.itemsize, self.kind)
        return self.result(rows, x.itemsize, [(x, "same")], store=store)

    def row_norm(
        self, x: Value, rows: int, width: int, trained: bool, weight: int, liger: bool = False
    ) -> Value:
        """torch's own layer norm: saves its input, and mean and deviation of every row. `liger`: an
        RMS norm in one kernel, a number a row; its gradient replaces what comes in."""
        self._count_moves(x, out=x.numel * x.itemsize)
        numbers: int = 1 if liger else 2
        saved = x.store, Store(self, numbers * rows * 4)
        grads = (numbers * width * weight,) if trained else ()
        ways: list[tuple[Value, Way]] = [(x, "same" if liger else "new")]
        return self.result(x.numel, x.itemsize, ways, saved, grads)

    # Kernels of Liger, one for what is several operations above (linkedin/Liger-Kernel, `ops/`).

    def in_place(self, x: Value) -> Value:
        """A rotation: written over its input, its gradient over the one that comes in."""
        self._count_moves(x, out=x.numel * x.itemsize)
        return self.result(x.numel, x.itemsize, [(x, "same")], store=x.store)

    def fused_gate(self, gate: Value, up: Value) -> Value:
        """An activation times another value: saves both, and writes the gradients over them."""
        self._count_moves(gate, up, out=gate.numel * gate.itemsize)
        self.forward.transcendentals += gate.numel
        ways: list[tuple[Value, Way]] = [(gate, gate.store), (up, up.store)]
        saved = (gate.store, up.store)
        return self.result(gate.numel, gate.itemsize, ways, saved, costs=(0, gate.numel, 0))

    def scale(self, x: Value, width: int, trained: bool, itemsize: int) -> Value:
        """`weight · x` of an RMS norm: saves x where the weight is trained."""
        out = max(itemsize, x.itemsize)
        self._count_moves(x, out=x.numel * out)
        if not trained:
            return self.result(x.numel, out, [(x, "new")])
        grads = (width * itemsize,)
        return self.result(x.numel, out, [(x, "new")], (x.store,), grads, scratch=x.numel * out)

    def linear(
        self,
        x: Value,
        inputs: int,
        outputs: int,
        weight: int,
        *,
        trained: bool,
        bias: bool = False,
        copies: int = 1,
    ) -> Value:
        """x · W: saves x where W is trained. `weight`: bytes of one of its numbers; `copies`: of
        experts, each of which multiplies its share of x."""
        rows = x.numel // inputs
        saved: tuple[Store, ...] = ()
        if copies > 1:  # autocast knows no grouped products: x takes the precision of the weights
            x = self.cast(x, weight)
        elif self.autocast:
            x = self.cast(x, 2)
        self.read(x)
        itemsize = x.itemsize
        if itemsize < weight:
            # autocast's copy of the weight lives as long as x's gradient needs it
            copy = Store(self, copies * (inputs + bias) * outputs * itemsize)
            saved = (copy,) if x.needs else ()
            if trained and not self.compiled:
                self.cache.append(copy)
        done = product(rows, inputs, outputs, itemsize, copies)
        self.count_product(done)
        saved += (x.store,) if trained else ()
        size = copies * (inputs + bias) * outputs
        y = self.result(
            rows * outputs,
            itemsize,
            [(x, "new")],
            saved,
            (size * weight,) if trained else (),
            scratch=size * itemsize if trained and itemsize < weight else 0,
            work=[done] * (bool(trained) + x.needs),
            last=1,
        )
        self.select(y.store, maps=True)
        return y

    def grouped(self, x: Value, w: Value, inputs: int, outputs: int, copies: int) -> Value:
        """x · W of experts whose weights are a value too: saves both."""
        rows = x.numel // inputs
        done = product(rows, inputs, outputs, w.itemsize, copies)
        self.count_product(done)
        x = self.cast(x, w.itemsize)
        ways: list[tuple[Value, Way]] = [(x, "new"), (w, "new")]
        work = [done] * (x.needs + w.needs)
        return self.result(rows * outputs, w.itemsize, ways, (x.store, w.store), work=work, last=1)

    def matmul(self, x: Value, y: Value, numel: int, flops: float) -> Value:
        """A product of two activations: saves both."""
        if self.autocast:
            x, y = self.cast(x, 2), self.cast(y, 2)
        self.read(x, y)
        done = (flops, (x.numel + y.numel + numel) * x.itemsize, 1.0, PLAIN)
        self.count_product(done)
        return self.result(
            numel,
            x.itemsize,
            [(x, "new"), (y, "new")],
            (x.store, y.store),
            work=[done] * (x.needs + y.needs),
            last=1,
        )

    def attention(
        self,
        q: Value,
        k: Value,
        v: Value,
        statistics: int,
        mask: int,
        flops: int,
        pairs: int,
        numel: int,
    ) -> Value:
        """Fused attention: saves queries, keys, values, its output (`numel`), one fp32 number a row
        and head, and the mask (`mask` numbers in the precision of the queries); `pairs` of
        exponentials. Its backward does five products where the forward does two (Dao, 2307.08691,
        section 2.3)."""
        if self.autocast:
            q, k, v = (self.cast(x, 2) for x in (q, k, v))
        self.read(q, k, v)
        touched = (q.numel + numel + k.numel + v.numel) * q.itemsize
        self.forward.transcendentals += pairs
        kind = MASKED if mask else CAUSAL
        self.count_product((flops, touched, 1.0, kind))
        out, rows = Store(self, numel * q.itemsize), Store(self, statistics * 4)
        extra = (Store(self, mask * q.itemsize),) if mask else ()
        self.select(out, rows)
        return self.result(
            numel,
            q.itemsize,
            [(q, "new"), (k, "new"), (v, "new")],
            (q.store, k.store, v.store, out, rows, *extra),
            work=[(5 * flops // 2, 2 * touched, 1.0, kind)],
            store=out,
            costs=(0, pairs, 0),
        )

    # --------------------------------------------------------------------------------- backward

    def undo(self, grad: Store) -> Store | None:
        """The backward pass from the gradient of the last value; → the gradient of the input."""
        nodes, last = self.nodes, None
        if nodes:
            nodes[-1].grad = grad
        del grad
        while nodes:
            node = nodes.pop()
            if node.grad is None and not node.parts:
                continue
            if not (node.inputs or node.weights or node.scratch):
                last = node.grad
                last = last and last.write(self.backward)
                continue
            self._undo_one(node)
        return last

    def _arriving(self, node: Node, g: Store | None, how: Way, size: int, kind: int) -> Store:
        """The gradient of one input of a node whose result has the gradient `g`."""
        if isinstance(how, Store):
            return how
        if how == "same" and g is not None:
            return g
        made_of = (*([g] if g else ()), *node.parts, *node.saved)
        return Fused(self, size, made_of, kind) if node.fused else Store(self, size, kind)

    def _undo_one(self, node: Node) -> None:
        g, node.grad = node.grad, None
        if g and not node.fused:
            g = g.write(self.backward)
        if node.work:
            self.backward.products += node.work
            self.backward.launched += len(node.work)
        if node.costs is not NOTHING:
            self.backward.spend(*node.costs)
        temporary = Store(self, node.scratch, node.kind) if node.scratch else None
        back = Store(self, node.away, node.kind) if node.away else None
        for size in node.weights:
            self.kept_gradients.append(Store(self, size, GRADIENT))
        gradients = [
            (t, size, self._arriving(node, g, how, size, t.kind)) for t, size, how in node.inputs
        ]
        if not (node.work or node.fused):
            sizes = node.away + sum(x.size for x in (*node.saved, *(x for *_, x in gradients)))
            self.backward.moved += 2 * sizes
            self.backward.launched += 1 + len(gradients)
        del temporary, back
        node.saved, node.parts = (), []
        del g
        for target, size, store in gradients:
            if target.joins:
                target.parts.append(store)
            elif target.grad is None:
                target.grad = store
            elif target.fused or isinstance(target.grad, Fused):
                target.grad = Fused(self, size, (target.grad, store), target.kind)
            else:
                if getrefcount(target.grad) > 2:  # somebody else holds it: a new tensor
                    target.grad = Store(self, target.grad.size, target.kind)
                self.backward.moved += 3 * store.size
                self.backward.launched += 1
