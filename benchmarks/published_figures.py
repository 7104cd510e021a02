"""Published, measured figures of training and running language models, and their two halves.

    python benchmarks/published_figures.py           # checks the list, prints counts
    python benchmarks/published_figures.py --list    # one line a figure

`published_figures.json` holds three tables: `sources`, `models` (dimensions of models that are no
presets), and `groups`: what a source's runs have in common, and its rows. A row overrides what its
group says (`model`, `stage`, `hardware`), adds to `config` and `assumed`, and carries one to three
numbers, each of which is a figure of its own: `memory`, `throughput` (a rate, or the seconds of a
step) and `hours` (of a whole run).

| field | what it holds |
| --- | --- |
| `config` | what the source states, in the words of `WORDS` |
| `assumed` | values in the same words that the source leaves open, and a plan needs |
| `open` | what else is not stated, in words |
| `units`, `printed` | units as printed; the number as printed, where its unit is another here |
| `bytes_per_unit` | what the tool behind the source means by its GB |
| `meter` | which memory the tool measures: allocated, active, reserved, or the whole process |

The halves: a figure is `open`, to develop a cost model against, or `locked`, to check one with. The
parity of a sha256 over the source's address and the configuration as stated decides, so that nobody
chooses, all numbers of one run are in one half, and new figures move no old ones. Values,
assumptions and remarks are not part of it. No figure is dropped: one that turns out wrong stays,
with its reason.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("published_figures.json")
KINDS = ("memory", "throughput", "hours")
HALVES = ("open", "locked")
STAGES = (
    *("pretraining", "sft", "lora sft", "qlora sft", "reward", "dpo", "kto", "ppo", "grpo"),
    *("prefill", "decode", "serving"),
)
UNITS = {
    "memory": ("GiB", "GB", "MiB", "bytes", "blocks"),
    "throughput": ("tokens/s/GPU", "tokens/s", "samples/s", "s"),
    "hours": ("h", "min", "s", "GPU h"),
}
HOURS = {"h": 1.0, "GPU h": 1.0, "min": 1 / 60, "s": 1 / 3600}
"""Hours in a unit; GPU hours are hours of one GPU."""

_NUMBERS = (
    "micro_batch accumulation local_batch batch global_batch minibatch generation_batch sequence "
    "longest prompt response requests rows steps iterations tensor_parallel pipeline_parallel "
    "virtual_pipeline context_parallel expert_parallel generation_tensor_parallel ppo_epochs "
    "mini_batches num_generations block_tokens longest_batch_tokens"
)
_RATES = "mean_tokens epochs tokens global_tokens memory_fraction"
_SWITCHES = (
    "packed compile fused_kernels optimizer_in_backward offload_activations double_quantisation "
    "kbit_upcasts async_tensor_parallel fp8_all_gather ema on_policy distilled_from_logits "
    "chunked_loss fused_step"
)
_TEXTS = (
    "critic reward generator engine kernel kv_cache kv_precision kv_memory_fraction load autocast "
    "batch_rule"
)
WORDS: Mapping[str, type | tuple[type, ...] | tuple[str, ...]] = {
    **dict.fromkeys(_NUMBERS.split(), int),
    **dict.fromkeys(_RATES.split(), (int, float)),
    **dict.fromkeys(_SWITCHES.split(), bool),
    **dict.fromkeys(_TEXTS.split(), str),
    "lora": dict,
    "lora_dtype": ("bf16", "fp32"),
    "method": ("full", "lora", "qlora"),
    "precision": (
        *("bf16", "bf16-amp", "fp8-amp", "fp16", "fp32"),
        *("fp16-deepspeed", "bf16-deepspeed"),
    ),
    "fsdp_mixed_precision": ("DEFAULT", "PURE"),
    "optimizer": ("adamw", "adamw_fused", "adamw_8bit", "paged_adamw_8bit", "lion"),
    "checkpointing": ("none", "full", "selective", "every second layer", "selective by operation"),
    "offload": ("none", "optimizer", "all"),
    "attention": ("flash", "sdpa", "eager"),
    "sharding": ("none", "ddp", "fsdp", "hsdp", "zero0", "zero1", "zero2", "zero3"),
    "quantisation": (
        *("nf4", "nf4-dq", "int8", "int4-g32", "int4-g64", "gptq-int4", "awq-int4-g128", "fp8"),
    ),
    "loss": ("plain", "fused"),
    "part": ("generation", "training", "iteration"),
}
"""Words of a configuration: the type of the value, or its choices.

`sequence`: tokens of every row; `longest`: of the longest, where rows differ; `mean_tokens`: of a
row on average. `precision`: "bf16" holds weights in bf16, "bf16-amp" in fp32 beside bf16 products,
"fp16-deepspeed" in fp16 beside fp32 master weights. `optimizer`: "adamw" is torch's default form.
`loss` "fused": the logits are never all there in fp32; `chunked_loss`: they are in 16 bits
(torchtune's). `fused_step`: AdamW in one kernel. `tokens`: of the whole run.
`part`: what of an iteration is timed.
"""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number of a source, and the run that it was measured on."""

    id: str
    kind: str
    stage: str
    model: str
    hardware: Mapping[str, object]
    config: Mapping[str, object]
    assumed: Mapping[str, object]
    open: Mapping[str, str]
    value: float
    unit: str
    printed: str | None
    bytes_per_unit: int | None
    meter: str | None
    software: str
    source: Mapping[str, str]
    note: str | None

    @property
    def canonical(self) -> str:
        """The configuration as stated, as one string: keys in order, no spaces."""
        stated = {k: getattr(self, k) for k in ("model", "stage", "hardware", "config")}
        return json.dumps(stated, sort_keys=True, ensure_ascii=False, separators=(",", ":"))

    @cached_property
    def digest(self) -> str:
        """sha256 of the source's address and the canonical configuration, in hex."""
        text = f"{self.source['address']}\n{self.canonical}"
        return hashlib.sha256(text.encode("utf-8")).hexdigest()

    @property
    def half(self) -> str:
        """ "open" where the digest is even, else "locked"."""
        return HALVES[int(self.digest, 16) % 2]

    @property
    def complete(self) -> dict[str, object]:
        """Stated and assumed values together; what is stated wins."""
        merged = {**self.assumed, **self.config}
        lora = {**_table(self.assumed.get("lora")), **_table(self.config.get("lora"))}
        return {**merged, "lora": lora} if lora else merged

    @property
    def in_bytes(self) -> float | None:
        """A memory figure in bytes; None for other kinds and for blocks."""
        return None if self.bytes_per_unit is None else self.value * self.bytes_per_unit

    @property
    def in_hours(self) -> float | None:
        """A time in hours (or GPU hours); None for other kinds."""
        return self.value * HOURS[self.unit] if self.kind == "hours" else None


def _table(value: object) -> dict[str, object]:
    return dict(value) if isinstance(value, Mapping) else {}


@lru_cache(1)
def tables() -> dict[str, Any]:
    """The file as it is: `sources`, `models`, `groups`."""
    read: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return read


@lru_cache(1)
def load() -> tuple[Figure, ...]:
    """All figures, in the file's order."""
    return tuple(f for group in tables()["groups"] for f in _expand(group))


def _expand(group: dict[str, Any]) -> Iterator[Figure]:
    for row in group["rows"]:
        merged = {k: {**group.get(k, {}), **row.get(k, {})} for k in ("config", "assumed", "open")}
        common: dict[str, Any] = {k: row.get(k, group[k]) for k in ("model", "stage", "hardware")}
        common |= merged
        for kind in (k for k in KINDS if k in row):
            yield Figure(
                id=f"{group['group']}/{row['id']}/{kind}",
                kind=kind,
                value=row[kind],
                unit=group["units"][kind],
                printed=row.get("printed"),
                bytes_per_unit=group.get("bytes_per_unit") if kind == "memory" else None,
                meter=group.get("meter", {}).get("memory") if kind == "memory" else None,
                software=group["software"],
                source=tables()["sources"][group["source"]],
                note=group.get("note"),
                **common,
            )


def faults(figure: Figure) -> Iterator[str]:
    """→ what is wrong with a figure's entry, a line each; nothing where all is well."""
    if figure.stage not in STAGES:
        yield f"stage {figure.stage!r}"
    if figure.unit not in UNITS[figure.kind]:
        yield f"unit {figure.unit!r} of {figure.kind}"
    if not isinstance(figure.value, (int, float)) or figure.value <= 0:
        yield f"value {figure.value!r}"
    if figure.kind == "memory":
        if figure.unit != "blocks" and figure.bytes_per_unit not in (1, 10**9, 2**20, 2**30):
            yield f"bytes_per_unit {figure.bytes_per_unit!r}"
        if not figure.meter:
            yield "no meter"
    for name, known in (("hardware", ("name", "gpus", "nodes")), ("source", SOURCE_FIELDS)):
        absent = [k for k in known if not getattr(figure, name).get(k)]
        if absent:
            yield f"{name} without {', '.join(absent)}"
    if not figure.software:
        yield "no software"
    for part in ("config", "assumed"):
        for word, value in getattr(figure, part).items():
            if not _allowed(word, value):
                yield f"{part}: {word}={value!r}"


SOURCE_FIELDS = ("title", "address", "date", "says")


def _allowed(word: str, value: object) -> bool:
    kind = WORDS.get(word)
    if kind is None:
        return False
    if isinstance(kind, tuple) and isinstance(kind[0], str):
        return value in kind
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def counts(figures: tuple[Figure, ...]) -> Counter[tuple[str, str]]:
    """→ how many figures by (kind, half)."""
    return Counter((f.kind, f.half) for f in figures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--list", action="store_true", help="one line a figure")
    args = parser.parse_args()
    figures = load()
    if args.list:
        for f in figures:
            print(f"{f.half:6} {f.digest[:12]} {f.id:60} {f.value:>14,g} {f.unit}")
    wrong = [(f.id, line) for f in figures for line in faults(f)]
    for name, line in wrong:
        print(f"{name}: {line}")
    by = counts(figures)
    print(f"{'':12}{'open':>8}{'locked':>8}{'all':>8}")
    for kind in (*KINDS, "all"):
        row = [
            sum(n for (k, h), n in by.items() if kind in (k, "all") and h == half)
            for half in HALVES
        ]
        print(f"{kind:12}{row[0]:8}{row[1]:8}{sum(row):8}")
    stages = Counter(f.stage for f in figures)
    print("stages: " + ", ".join(f"{k} {stages[k]}" for k in STAGES if stages[k]))
    print(f"{len({f.source['address'] for f in figures})} sources, {len(wrong)} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
