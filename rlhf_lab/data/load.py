"""Data for the four stages: the bundled world, or a user's own file, through one door.

`load_data("stories")` is the world; `load_data("mine.json")` reads rows and guesses their
fields, which `notes` tell. Either way the result has these sets, each split into train and test:

    sft          {"prompt", "completion"}
    preferences  {"prompt", "chosen", "rejected"}
    prompts      {"prompt"}

and labelled answers, {"prompt", "completion", "label"}: those of a file that holds such rows, else
both answers of every preference.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from heapq import heappop, heappush
from itertools import chain, islice
from pathlib import Path
from typing import TypeAlias

from ..display import counted
from ..models.load import small_models_folder
from ..runs.progress import notebook_display, working
from ..world import corpus
from ..world.gold_reward import Annotator, accuracy_ceiling, gold_parts, gold_reward
from .files import left_out, open_rows, opened
from .late_columns import watched
from .mapping import Refused
from .recognise import recognise
from .report import Report, convert_all, report_of
from .schema import ANSWERS, Example
from .wrapped import ENOUGH, through, unwrapped

STORY_ROWS = {"sft": 2560, "preferences": 3072, "prompts": 8192, "test": 512, "test_pairs": 1024}
"""Rows of the bundled world's training sets, of each test set, and of held-out pairs."""
LIMIT, MEMORY = 100_000, 50_000_000
"""Rows, and bytes of them, that are kept in memory: of a larger source, a random sample."""


FieldsLike: TypeAlias = "Mapping[str, object] | Callable[..., object] | str | Path | None"
"""A mapping (`mapping.Fields`), a function from a row to rows of ours, or a YAML file."""


@dataclass(frozen=True)
class Split:
    """Rows to train on and rows held out."""

    train: list[Example] = field(default_factory=list)
    test: list[Example] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"Split(train={len(self.train)}, test={len(self.test)})"


class LaterSplit(Split):
    """A split that is made when its rows are asked for: a stage reads one set of three."""

    _make: Callable[[], Split] | None

    def __init__(self, make: Callable[[], Split] | None = None, **made: list[Example]):
        """`made`: its sides, as `dataclasses.replace` hands them over."""
        object.__setattr__(self, "_make", make)
        for side, rows in made.items():
            object.__setattr__(self, side, rows)

    def __getattr__(self, name: str) -> list[Example]:
        if name not in ("train", "test") or self._make is None:
            raise AttributeError(name)
        made = self._make()
        for side in ("train", "test"):
            object.__setattr__(self, side, getattr(made, side))
        rows: list[Example] = getattr(made, name)
        return rows


@dataclass(frozen=True)
class Data:
    """What the stages train on. `annotator` and `gold_reward` exist for the bundled world only."""

    name: str
    sft: Split
    preferences: Split
    prompts: Split
    annotator: Annotator | None = None
    notes: tuple[str, ...] = ()
    report: Report | None = field(default=None, repr=False)
    answers: Split = Split()
    """answers that somebody labelled one by one; good ones have label True"""

    @property
    def labelled(self) -> Split:
        """Labelled answers to learn from: `answers`, else both answers of every preference."""
        if self.answers.train or self.answers.test:
            return self.answers
        return Split(unpaired(self.preferences.train), unpaired(self.preferences.test))

    @property
    def has_gold(self) -> bool:
        """Whether the true reward is known."""
        return self.annotator is not None

    def gold_reward(self, prompt: str, response: str) -> float:
        """The gold reward of a response, 0 to 10 (bundled world only)."""
        self._check_gold()
        return gold_reward(prompt, response)

    def gold_parts(self, prompt: str, response: str) -> dict[str, float]:
        """Its parts, each 0 to 1 (bundled world only)."""
        self._check_gold()
        return gold_parts(prompt, response)

    def accuracy_ceiling(self, pairs: list[Example] | None = None) -> float | None:
        """Best accuracy a reward model can expect on the held-out pairs; None if unknowable."""
        if self.annotator is None:
            return None
        return accuracy_ceiling(pairs or self.preferences.test, self.annotator)

    def first(self, rows: int, test: int | None = None) -> Data:
        """The same data with the first `rows` of each set to train on, a batch to look at, and the
        first `test` to hold out (None: all of them)."""
        return replace(self._cut(rows, test), name=f"{self.name}, first {rows}")

    def with_preferences(self, rows: list[Example]) -> Data:
        """The same data with preferences of your own to train on; the held-out pairs stay, so that
        accuracy and its ceiling compare. Raises ValueError for none."""
        if not rows:
            raise ValueError("no preferences yet: label some pairs first")
        mine = Split(list(rows), self.preferences.test)
        return replace(self, name=f"{self.name}, your preferences", preferences=mine)

    def with_held_out(self, most: int) -> Data:
        """The same data with at most `most` held-out rows of each set: runs that measure cost need
        not judge long. Their held-out figures are as much rougher."""
        return self._cut(None, most)

    def _cut(self, train: int | None, test: int | None) -> Data:
        """At most so many rows of each set, to train on and held out; None: all."""

        def cut(split: Split) -> Split:
            return Split(split.train[:train], split.test[:test])

        return replace(
            self,
            sft=cut(self.sft),
            preferences=cut(self.preferences),
            prompts=cut(self.prompts),
            answers=cut(self.answers),
        )

    def _check_gold(self) -> None:
        if self.annotator is None:
            raise ValueError(f"{self.name} has no gold reward: only the bundled world knows it")


def unpaired(pairs: list[Example]) -> list[Example]:
    """Preferences as labelled answers: the chosen one is good, the rejected one is not."""
    return [
        {
            **{k: pair[k] for k in ("prompt", "tools") if k in pair},
            "completion": pair[name],
            "label": name == "chosen",
        }
        for pair in pairs
        for name in ("chosen", "rejected")
    ]


def annotate(pairs: list[Example], annotator: Annotator) -> list[Example]:
    """Preferences of the simulated annotator: pairs {"prompt", "first", "second"} →
    {"prompt", "chosen", "rejected"}."""
    texts = [(pair["prompt"], pair["first"], pair["second"]) for pair in pairs]
    return [{**annotator.label(i, *of_pair)} for i, of_pair in enumerate(texts)]


def load_data(
    source: object = "stories",
    *,
    seed: int = 0,
    fields: FieldsLike = None,
    split: str = "train",
    subset: str | None = None,
    limit: int | None = None,
    temperature: float = 0.6,
    length_bias: float = 0.0,
) -> Data:
    """The bundled world ("stories"), or your own data in any of the shapes of `shapes.yaml`.

    `source`: a JSON, JSONL, CSV, TSV, Parquet or Arrow file (also .gz, .bz2, .xz, .zst), a folder
    that `datasets` saved or that holds the files of a data set, a hub id, a
    `datasets.Dataset`, or a list of dicts. `fields` maps our names to your columns
    ({"prompt": "question", "chosen": "better", "rejected": "worse"}; `mapping.Fields` lists them);
    what it leaves out is guessed, and `notes` tell how. It may be a YAML file that says the same,
    or a function from a row of yours to one of ours, to several, or to None. `split` and `subset`
    choose part of a hub data set. Of more than `limit` rows a random sample is kept; without it, of
    more than 100,000 rows or 50 MB of them.
    `temperature` and `length_bias` belong to the world's simulated annotator. Raises ValueError
    with one line (what, where, what to do) for what cannot be read.
    """
    if isinstance(source, Data):
        return source
    if isinstance(source, str) and source == "stories":
        stories = _stories(Annotator(temperature, length_bias, seed), seed)
        if notebook_display():  # or a later cell would say among its outputs that it waits
            with working("writing the bundled stories and labelling their pairs (some seconds)"):
                for rows_of in (stories.sft, stories.preferences, stories.prompts):
                    _ = rows_of.train
        return stories
    name = Path(source).name if isinstance(source, (str, Path)) else "your data"
    source = opened(source, subset)
    rows = open_rows(source, split, subset)
    others = ", ".join(left_out(source, split))
    try:
        data = from_rows(rows, name, seed, fields=fields, limit=limit)
        more = (
            (f"{name}: split {split!r} is read, and not {others} (split=NAME)",) if others else ()
        )
        return replace(data, notes=data.notes + more)
    except Refused as error:
        if not isinstance(fields, (str, Path)):
            raise
        raise ValueError(f"{error.shown('yaml')} (in {fields})") from None


# ------------------------------------------------------------------------------- the bundled world


def _stories(annotator: Annotator, seed: int) -> Data:
    return Data(
        "stories",
        LaterSplit(partial(_demonstrations, seed)),
        LaterSplit(partial(_preferences, annotator)),
        LaterSplit(partial(_prompts, seed)),
        annotator,
    )


def _demonstrations(seed: int) -> Split:
    def some(split: str, count: int) -> list[Example]:
        return [{**row} for row in corpus.demonstrations(split, count, seed)]

    return Split(some("train", STORY_ROWS["sft"]), some("test", STORY_ROWS["test"]))


def _preferences(annotator: Annotator) -> Split:
    return story_preferences(bundled_pairs(), annotator)


def _prompts(seed: int) -> Split:
    def some(split: str, count: int) -> list[Example]:
        requests = islice(corpus.requests(split, seed), count)
        return [{"prompt": request.prompt} for request in requests]

    return Split(some("train", STORY_ROWS["prompts"]), some("test", STORY_ROWS["test"]))


def story_preferences(pairs: dict[str, list[Example]], annotator: Annotator) -> Split:
    """As many pairs of a split as the world uses (`STORY_ROWS`), labelled by the annotator."""
    return Split(
        annotate(pairs["train"][: STORY_ROWS["preferences"]], annotator),
        annotate(pairs["test"][: STORY_ROWS["test_pairs"]], annotator),
    )


def bundled_pairs() -> dict[str, list[Example]]:
    """Pairs of responses that the bundled SFT model wrote, without preferences, by split."""
    path = small_models_folder() / "pairs.jsonl.gz"
    if not path.is_file():  # while the checkpoints are being rebuilt there are none yet
        return {"train": [], "test": []}
    return read_pairs(path)


def read_pairs(path: Path) -> dict[str, list[Example]]:
    """Pairs {"prompt", "first", "second"} of a file, by split."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return {s: [r for r in rows if r["split"] == s] for s in ("train", "test")}


# ------------------------------------------------------------------------- a user's own rows


def from_rows(
    rows: Iterable[object],
    name: str = "rows",
    seed: int = 0,
    held_out: float = 0.1,
    fields: FieldsLike = None,
    limit: int | None = None,
) -> Data:
    """Turn rows into the three sets: fields guessed, drops counted, a tenth held out.

    A prompt stands on one side only, however many rows it has. Rows come in a random order.
    """
    given: Mapping[str, object] | None = None
    if isinstance(fields, (str, Path)):
        from ..runs.yaml_files import read_names  # a web page has no YAML

        given = read_names(fields)
    elif callable(fields):
        rows = through(fields, rows)
    elif fields is not None and not isinstance(fields, Mapping):
        raise ValueError(f"fields={fields!r}: give a dict, a YAML file or a function")
    else:
        given = fields
    first, rows = unwrapped(iter(rows), given, name)
    if not first:
        raise ValueError(f"{name} has no rows")
    shape = recognise(first, given, name)
    report = report_of(name, first, shape)
    sample = Reservoir(seed, LIMIT if limit is None else limit, MEMORY if limit is None else None)
    for example in convert_all(watched(chain(first, rows), len(first), report), report):
        sample.add(example)
    kept = sample.rows()
    report.kept, report.sampled = len(kept), sample.seen > len(kept)
    if len(kept) < ENOUGH:
        why = "; ".join(report.notes()[1:])
        raise ValueError(
            f"{name}: {counted(len(kept), 'usable row')}; at least {ENOUGH} are needed"
            + f" ({why})" * bool(why)
        )
    if shape.has_answers and not any(r.keys() & set(ANSWERS) for r in kept):
        raise ValueError(
            f"{name}: only prompts could be read, although there are answers "
            f"({'; '.join(report.notes()[1:])})"
        )
    if not shape.fields.completion:  # nobody wrote answers: the preferred ones are demonstrations
        kept = [{"completion": r["chosen"], **r} if "chosen" in r else r for r in kept]
    train, test = hold_out(kept, held_out)

    def split(*keys: str) -> Split:
        return Split(select(train, *keys), select(test, *keys))

    return Data(
        name,
        sft=split("prompt", "completion"),
        preferences=split("prompt", "chosen", "rejected"),
        prompts=split("prompt"),
        answers=split("prompt", "completion", "label"),
        notes=tuple(report.notes()),
        report=report,
    )


def select(rows: list[Example], *keys: str) -> list[Example]:
    """Rows that have these fields, and these only; a prompt alone is kept once.

    An answer with a label is no demonstration: it may be a bad one.
    """
    if "completion" in keys and "label" not in keys:
        rows = [r for r in rows if "label" not in r]
    also = [*keys, "tools"]  # what a row's model may call goes with it
    found = [{k: r[k] for k in also if k in r} for r in rows if all(k in r for k in keys)]
    return list({repr(r): r for r in found}.values()) if len(keys) == 1 else found


def hold_out(rows: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Rows to train on and rows held out, no prompt in both. → train, test."""
    prompts = list(dict.fromkeys(repr(r["prompt"]) for r in rows))
    if len(prompts) == 1:  # all ask the same thing: the rows are what differs
        count = max(1, round(len(rows) * share))
        return rows[count:], rows[:count]
    held_out = set(prompts[: max(1, round(len(prompts) * share))])
    return (
        [r for r in rows if repr(r["prompt"]) not in held_out],
        [r for r in rows if repr(r["prompt"]) in held_out],
    )


class Reservoir:
    """A uniform random sample of a stream, within a number of rows and of bytes in memory.

    Every row draws a number; those with the smallest are kept. Their order is a random one.
    """

    def __init__(self, seed: int, limit: int, memory: int | None) -> None:
        self.random, self.limit, self.memory = random.Random(seed), limit, memory or float("inf")
        self.heap: list[tuple[float, int, Example, int]] = []
        self.seen = self.held = 0

    def add(self, row: Example) -> None:
        size = footprint(row)
        # The counter parts ties, and keeps the heap from comparing rows.
        heappush(self.heap, (-self.random.random(), self.seen, row, size))
        self.seen, self.held = self.seen + 1, self.held + size
        while len(self.heap) > self.limit or (self.held > self.memory and len(self.heap) > 1):
            self.held -= heappop(self.heap)[3]

    def rows(self) -> list[Example]:
        return [row for _, _, row, _ in sorted(self.heap, key=lambda e: (-e[0], e[1]))]


def footprint(value: object) -> int:
    """Bytes that a row takes in memory: text, lists and dicts."""
    inside: Iterable[object] = value if isinstance(value, list) else ()
    if isinstance(value, dict):
        inside = value.values()
    return sys.getsizeof(value) + sum(map(footprint, inside))
