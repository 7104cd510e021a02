"""What was found in a source, and what became of its rows and columns: counted, and in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..display import counted
from .beside import comes_later
from .contrary import Doubt, doubts
from .labels import Rows
from .mapping import mentions
from .messages import READ, TABLE, Dropped, Example, missing, structure
from .schema import ANSWERS, Shape, convert, grouped

MOST_REASONS = 40
"""Reasons that a report tells apart; what comes after them is counted together."""


@dataclass
class Report:
    """What was found in a source: rows read, kept, and dropped by reason.

    `missing`: rows that were kept without a field that others have, by field. `unused`: answers of
    rows that were kept. `tied`: ties that were kept as demonstrations. `parted`: pairs of
    conversations that are cut where they part. `contrary`: rows where `doubts` contradict which
    answer is the better one, by what they say. `columns`: what became of each column; `filled`:
    those with something in the first rows; `later`: rows with columns that the first rows lack.
    """

    name: str
    shape: Shape
    rows: int = 0
    kept: int = 0
    sampled: bool = False
    identical: int = 0
    unused: int = 0
    tied: int = 0
    parted: int = 0
    missing: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    later: dict[str, int] = field(default_factory=dict)
    doubts: Sequence[Doubt] = ()
    filled: frozenset[str] = frozenset()
    contrary: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, rows: int = 1) -> None:
        if reason not in self.dropped and len(self.dropped) >= MOST_REASONS:
            reason = "other reasons"
        self.dropped[reason] = self.dropped.get(reason, 0) + rows

    def count_missing(self, row: Example) -> None:
        """Count the fields that a converted row lacks."""
        for ours in ANSWERS:
            if ours in self.shape.get and ours not in row:
                self.missing[ours] = self.missing.get(ours, 0) + 1

    def notes(self) -> list[str]:
        """The report in lines for people."""
        lines = [f"{self.name}: {counted(self.rows, 'row')}, read as {self.shape}"]
        lines += [
            f"{self.name}: in {counted(n, 'row')} {says}: chosen and rejected are taken as they "
            f"are named{f' by {self.shape.fields.winner!r}' * bool(self.shape.fields.winner)}"
            for says, n in self.contrary.items()
        ]
        lines += [
            f"{self.name}: dropped {counted(n, 'row')}: {why}" for why, n in self.dropped.items()
        ]
        lines += [
            f"{self.name}: {counted(n, 'row')} without {f}" for f, n in sorted(self.missing.items())
        ]
        if self.unused:
            lines.append(f"{self.name}: not used, in no pair: {counted(self.unused, 'answer')}")
        if self.tied:
            lines.append(f"{self.name}: kept as demonstrations: {counted(self.tied, 'tie')}")
        if self.parted:
            cut = "cut where their conversations part, without the turns that follow"
            lines.append(f"{self.name}: {counted(self.parted, 'pair')} {cut}")
        if self.identical:
            lines.append(
                f"{self.name}: dropped {counted(self.identical, 'pair')} whose chosen and rejected "
                "are identical"
            )
        told = " ".join([*self.dropped, *self.contrary])  # names of columns that were heeded
        unused = [
            c or "''" for c, b in self.columns.items() if b == "not used" and repr(c) not in told
        ]
        unused += [f"{c} (in {counted(n, 'row')} further down)" for c, n in self.later.items()]
        unused += [f"{c} {b[b.index('(') :]}" for c, b in self.columns.items() if "(not used" in b]
        if unused:
            lines.append(f"{self.name}: columns not used: {', '.join(unused)}")
        if self.sampled:
            lines.append(f"{self.name}: a random sample of {counted(self.kept, 'row')} is used")
        return lines


def report_of(name: str, first: Sequence[object], shape: Shape) -> Report:
    """The report of a source whose rows are still to be read, by its first ones."""
    mappings = [r for r in first if isinstance(r, Mapping)]
    columns, against = columns_of(first, shape), doubts(mappings, shape.fields)
    filled = frozenset(str(k) for r in mappings for k, v in r.items() if not missing(v))
    return Report(name, shape, columns=columns, doubts=against, filled=filled)


def convert_all(rows: Iterable[object], report: Report) -> Iterator[Example]:
    """Every row of ours that can be made of these; `report` counts them and what is dropped."""
    known = report.columns.keys()
    ties = [d for d in report.doubts if d.tie]
    tie = ""  # what says so of the row that was read last

    def counted() -> Iterator[object]:
        nonlocal tie
        for row in rows:
            report.rows += 1
            tie = ""
            if isinstance(row, dict) and not row.keys() <= known:
                for column in row.keys() - known:
                    report.later[column] = report.later.get(column, 0) + 1
            if isinstance(row, Mapping) and report.doubts:
                tie = next((d.says for d in ties if d.said_by(row)), "")
                for says in [d.says for d in report.doubts if not d.tie and d.said_by(row)]:
                    report.contrary[says] = report.contrary.get(says, 0) + 1
            later = isinstance(row, dict) and comes_later(row, report.filled, report.shape.fields)
            yield Dropped(f"{later!r}, which the first rows leave empty") if later else row

    for row in grouped(counted(), report.shape):
        try:
            found = convert(row, report.shape, report)
        except Dropped as reason:
            report.drop(str(reason))
            continue
        if tie and report.shape.fields.ties == "drop":
            report.drop(f"a tie: {tie}")
            continue
        for example in (e for f in found for e in (_apart(f, report) if tie else [f])):
            report.count_missing(example)
            if "chosen" in example and example["chosen"] == example["rejected"]:
                report.identical += 1  # nothing to compare; still an answer to learn from
                example = {"completion": example["chosen"], **example}
                del example["chosen"], example["rejected"]
            yield example


def _apart(example: Example, report: Report) -> list[Example]:
    """The two answers of a pair, neither better than the other, as demonstrations."""
    if not {"chosen", "rejected"} <= example.keys():
        return [example]
    report.tied += 1
    rest = {k: v for k, v in example.items() if k not in ANSWERS}
    return [{**rest, "completion": example[k]} for k in ("chosen", "rejected")]


# -------------------------------------------------------------------------- what became of columns


def columns_of(rows: Sequence[object], shape: Shape) -> dict[str, str]:
    """Every column of some rows, and what became of it."""
    mappings = [r for r in rows if isinstance(r, Mapping)]
    of = shape.fields
    paths = {**of.paths(), "answers (a list)": of.each, "whose rows belong together": of.group}
    made = list(grouped(mappings[:100], shape)) if shape.read else []
    read = {column for r in made if isinstance(r, Mapping) for column in r["read"]}
    became: dict[str, str] = {}
    for column in dict.fromkeys(str(k) for r in mappings for k in r):
        uses = [w for w, p in paths.items() if p and mentions(p, column)]
        uses = ["decides" if u.split()[0] == of.decider else u for u in uses]
        if shape.read:
            uses = ["read"] if column in read else []
        uses += ["added to the prompt"] if shape.extra == column else []
        became[column] = ", ".join(["ignored"] if column in of.ignore else uses) or "not used"
        if became[column] not in ("not used", "ignored", "read", "tools"):
            became[column] += _unread(column, mappings[:100], [p for p in paths.values() if p])
    return became


def _unread(column: str, rows: Rows, paths: Sequence[str]) -> str:
    """Keys inside a column that are not read, in words; "" for none."""
    cells = [structure(r.get(column)) for r in rows]
    items = [
        i for c in cells for i in (c if isinstance(c, list) else [c]) if isinstance(i, Mapping)
    ]
    keys = dict.fromkeys(str(k) for i in items for k in i)
    read = [p.replace(f"{column}.", "") for p in paths]
    if len(keys) == 1 and keys.keys() & {*TABLE["conversations"]}:  # {"messages": […]}
        return ""
    if keys.keys() & {"role", "from"}:
        left = [k for k in keys if k not in READ]
    else:
        left = [k for k in keys if not any(mentions(p, k) for p in read)]
    return f" (not used in it: {', '.join(left)})" if left else ""
