"""What a decoder is made of: linear maps, layers, widths, and from them parameters and LoRA's.

`architecture.py` reads it off a config; `layers.py` runs it on a tape. Pure arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from ..display import check_choice
from .families import FAMILIES, UNDESCRIBED, Family, Norms

PARTS = ("embedding", "attention", "mlp", "norms", "head")


@dataclass(frozen=True)
class Linear:
    """A linear map: `part` as in `PARTS`; `copies` counts experts.

    `lora`: what peft calls it, where that is not its name: fused maps have several names, each of
    which brings a rank of its own; () where peft does not reach it.
    """

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    part: str = "mlp"
    copies: int = 1
    lora: tuple[str, ...] | None = None

    @property
    def parameters(self) -> int:
        return self.copies * (self.inputs + self.bias) * self.outputs

    @property
    def targets(self) -> tuple[str, ...]:
        """The names by which peft adapts it."""
        return (self.name,) if self.lora is None else self.lora

    def rank(self, r: int, targets: tuple[str, ...]) -> int:
        """Rank of each copy's adapter under these `lora_targets`; 0 without one."""
        return r * sum(name in targets for name in self.targets)

    def lora_parameters(self, r: int, targets: tuple[str, ...], dora: bool = False) -> int:
        """r · (inputs + outputs) for each copy (Hu et al. 2106.09685, section 4.1); with DoRA a
        magnitude of each output too (Liu et al. 2402.09353, section 4.1)."""
        rank = self.rank(r, targets)
        magnitudes = self.outputs if dora and rank else 0
        return self.copies * (rank * (self.inputs + self.outputs) + magnitudes)


@dataclass(frozen=True)
class Layer:
    """`count` equal layers: their linear maps, and the numbers one of them learns in norms and
    other vectors. `cached`: numbers that a token leaves in its cache of keys and values. `windows`:
    (tokens, layers), of the layers that attend to so many tokens only, themselves included.
    `state`: numbers that it keeps of a sequence of any length, as wide as weights and in fp32."""

    count: int
    linears: tuple[Linear, ...]
    norms: int
    cached: int
    windows: tuple[tuple[int, int], ...] = ()
    state: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Architecture:
    """A decoder: widths, and what its layers are made of.

    `embedding` counts token and position tables and the maps of `outer`; `final_norm` the norm
    before the head; `head_width` what the head reads. `experts`, `active`: of a mixture, else 1.
    `norm_first`: layers norm what they read, else what they hand on. `outer`: linear maps outside
    the layers, applied once to each token (OPT's to and from narrower embeddings). `value_width`:
    of a head, 0: as wide as its queries. `remarks`: what a plan of it has to say first.
    `windows_unknown`: which layers attend within a window is not known: none is taken to.
    `reward_head`: transformers has a class of it with a score head.
    `cache_unknown`: it keeps something else of a sequence than what is planned.
    """

    family: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    tied: bool
    layers: tuple[Layer, ...]
    embedding: int
    final_norm: int
    head_width: int
    experts: int = 1
    active: int = 1
    norm_first: bool = True
    outer: tuple[Linear, ...] = ()
    head_bias: bool = False
    norms: Norms = "before"
    value_width: int = 0
    remarks: tuple[str, ...] = ()
    windows_unknown: bool = False
    reward_head: bool = True
    cache_unknown: bool = False

    @property
    def facts(self) -> Family:
        """What its family does differently from others."""
        return FAMILIES.get(self.family, UNDESCRIBED)

    @property
    def value_dim(self) -> int:
        """Width of a head's values."""
        return self.value_width or self.head_dim

    @property
    def cached(self) -> int:
        """Numbers that a token leaves in the cache of keys and values."""
        return sum(layer.count * layer.cached for layer in self.layers)

    def kept(self, tokens: int) -> int:
        """Numbers in the cache of so many tokens, of which a layer with a window keeps the last."""
        beyond = (n * y.cached * max(0, tokens - w) for y in self.layers for w, n in y.windows)
        return self.cached * tokens - sum(beyond)

    def state_bytes(self, itemsize: int) -> int:
        """Of the states that its layers keep of a sequence of any length, with such weights."""
        return sum(y.count * (y.state[0] * itemsize + y.state[1] * 4) for y in self.layers)

    def beyond(self, first: float, last: float) -> float:
        """Tokens of a context outside the windows, as an average over the layers' caches and over
        all contexts between these two lengths: those that decoding does not read."""
        over = (
            n * y.cached * (max(0.0, last - w) ** 2 - max(0.0, first - w) ** 2)
            for y in self.layers
            for w, n in y.windows
        )
        return sum(over) / (2 * max(1.0, last - first) * max(1, self.cached))

    def __hash__(self) -> int:
        return self._hash  # segments of a model are looked up by it (`memory.py`)

    @cached_property
    def _hash(self) -> int:
        return hash((self.family, self.hidden, self.vocabulary, self.layers))

    @property
    def lm_head(self) -> Linear:
        """The map to the vocabulary; its weight is the embedding's where they are tied."""
        return Linear("lm_head", self.head_width, self.vocabulary, self.head_bias, part="head")

    @property
    def narrowest(self) -> int:
        """The shortest side of a matrix; routers and gates, which are as wide as there are experts
        or heads, set aside."""
        sides = {min(x.inputs, x.outputs) for y in self.layers for x in y.linears}
        aside = {1, self.experts, self.heads if self.facts.rough else 1}
        return min(sides - aside, default=self.hidden)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return sum(layer.count for layer in self.layers)

    def by_part(self, head: str = "lm") -> dict[str, int]:
        """Parameters by part. `head`: "lm" (a tied one is counted with the embedding), "score" (a
        reward or value model: one output, no bias), or "none" (the trunk alone)."""
        parts = dict.fromkeys(PARTS, 0)
        parts["embedding"] = self.embedding
        parts["norms"] = self.final_norm
        for layer in self.layers:
            parts["norms"] += layer.count * layer.norms
            for linear in layer.linears:
                parts[linear.part] += layer.count * linear.parameters
        check_choice("head", head, ("lm", "score", "none"))
        if head == "score":
            parts["head"] = self.head_width
        elif head == "lm":
            matrix = 0 if self.tied else self.head_width
            parts["head"] = (matrix + self.head_bias) * self.vocabulary
        return parts

    def parameters(self, head: str = "lm") -> int:
        """All parameters, a tied head counted once."""
        return sum(self.by_part(head).values())

    def lora_targets(
        self, targets: str | Iterable[str] | None = None, head: str = "lm"
    ) -> tuple[str, ...]:
        """The names that LoRA adapts, as peft 0.21 takes them: its default of the family,
        "all-linear" (every map but the head), or those you name.

        transformers fuses a mixture's experts into bare parameters. peft adapts them, and the
        router, under their names in the checkpoint: gate and up proj (w1 and w3) only together.
        Where the family is a mixture it reaches no dense MLP by a name that experts have too.

        Raises ValueError for names that are not there (peft passes over them as long as one is).
        """
        there = dict.fromkeys(name for _, linear in self._linears() for name in linear.targets)
        if targets is None:
            if not self.facts.lora_defaults:
                raise ValueError(
                    f'peft has no default targets for {self.family}: name them, or "all-linear"'
                )
            return tuple(self.facts.lora_defaults.split())
        if isinstance(targets, str):
            if targets.lower() == "all-linear":
                return tuple(there)
            raise ValueError(
                f'targets={targets!r}: choose "all-linear" or a list of names '
                "(peft reads another string as a pattern)"
            )
        wanted = tuple(dict.fromkeys(targets))
        if head == "lm":
            there |= dict.fromkeys(self.lm_head.targets)
        for name in wanted:
            if name not in there:
                raise ValueError(
                    f"no linear layer {name!r} in {self.family}: choose from {', '.join(there)}"
                )
        for _, linear in self._linears():
            lacking = [name for name in linear.targets if name not in wanted]
            if 0 < len(lacking) < len(linear.targets):
                raise ValueError(
                    f"{self.family} fuses {' and '.join(linear.targets)} into "
                    f"{linear.name}: name {lacking[0]} too, or neither"
                )
        return wanted

    def lora_parameters(
        self,
        r: int,
        targets: str | Iterable[str] | None = None,
        head: str = "lm",
        dora: bool = False,
    ) -> int:
        """Parameters trained with LoRA, or with `dora`: the adapters; with head="score" (a reward
        model) also the score head, which is trained whole (peft's modules_to_save); "none":
        adapters alone."""
        names = self.lora_targets(targets, head)
        adapters = sum(n * linear.lora_parameters(r, names, dora) for n, linear in self._linears())
        if head == "lm":
            return adapters + self.lm_head.lora_parameters(r, names, dora)
        return adapters + self.by_part(head)["head"]

    def _linears(self) -> Iterator[tuple[int, Linear]]:
        """→ (how many of them, linear map): everything but the head."""
        yield from ((1, linear) for linear in self.outer)
        yield from ((layer.count, linear) for layer in self.layers for linear in layer.linears)
