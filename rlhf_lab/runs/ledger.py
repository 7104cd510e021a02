"""The table every cost number lives in.

A cost is a row: whose it is (stage, role, phase, component), what it is (quantity, value and a
band low..high, unit, rank) and where it comes from (source): **predicted** by a formula,
**simulated** by an x-ray, or **measured** by a run. One shape for all three makes a comparison
a join, a picture a pivot, and a claim without a source impossible.

    ledger = Ledger()
    ledger.add(stage="ppo", role="policy", phase="rollout", component="kv_cache",
               quantity="bytes", value=3 * 2**20, source="predicted")
    ledger.peak(rank=0)                            # bytes at the phase that needs the most
    ledger.pivot("phase", "role", quantity="bytes")

Bytes of a phase are the composition *at that phase's peak*: they add up over roles and
components, never over phases (hence `peak`, and an error from `total`). What lives through the
whole run, such as parameters, is written once per phase.
"""

from __future__ import annotations

import json
import math
import os
from collections import UserList
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

from ..display import format_number, html_table, table
from ..stages import STAGES
from .json_files import JsonObject, json_lines, replace_file

if TYPE_CHECKING:
    import pandas

ROLES = ("policy", "reference", "reward", "value", "student", "teacher", "draft")
PHASES = (
    *("rollout", "old_logprobs", "reference", "teacher", "score", "value", "advantage"),
    *("forward", "backward", "optimizer", "prefill", "decode", "sampling", "evaluation", "compile"),
)
AROUND = ("sampling", "evaluation", "compile")
"""Phases around training."""
COMPONENTS = (
    *("parameters", "gradients", "optimizer", "activations"),
    *("logits", "kv_cache", "communication", "workspace"),
)
UNITS = dict(bytes="B", flops="FLOP", seconds="s", tokens="tokens", money="USD", sent="B")
"""Of each quantity; `sent`: bytes that one process sends to the others."""
SOURCES = ("predicted", "simulated", "measured")

_VOCABULARY: dict[str, tuple[str, ...]] = {
    "stage": tuple(STAGES),
    "role": ROLES,
    "phase": PHASES,
    "component": COMPONENTS,
    "quantity": tuple(UNITS),
    "unit": tuple(dict.fromkeys(UNITS.values())),
    "source": SOURCES,
}
_MAY_BE_EMPTY = ("role", "phase", "component")
_LABELS = (*_VOCABULARY, "rank")
_WORDS = tuple(name for name in _VOCABULARY if name != "unit")
_SHOWN_ROWS = 60


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cost. `''` for a role, phase or component that does not apply."""

    stage: str
    role: str = ""
    phase: str = ""
    component: str = ""
    quantity: str
    value: float
    """in `unit`; not negative; infinity where the answer is not known"""
    low: float | None = None
    """lower end of the band, in `unit`; None where no band is claimed"""
    high: float | None = None
    """upper end of the band, in `unit`"""
    unit: str = ""
    """follows from `quantity` and may be left out"""
    rank: int = 0
    """the process (one per accelerator) this cost falls on; 0 for what all of them add up to"""
    source: str

    def __post_init__(self) -> None:
        for name in _WORDS:
            _check_word(name, getattr(self, name))
        unit = UNITS[self.quantity]
        if self.unit not in ("", unit):
            raise ValueError(f"unit={self.unit!r}: {self.quantity} are counted in {unit!r}")
        object.__setattr__(self, "unit", unit)
        for name in ("value", "low", "high"):
            amount = getattr(self, name)
            valid = type(amount) is float and amount >= 0  # nearly all of a plan's
            if not valid and (name == "value" or amount is not None):
                object.__setattr__(self, name, _check_amount(name, amount))
        low = self.value if self.low is None else self.low
        high = self.value if self.high is None else self.high
        if not low <= self.value <= high:
            band = f"low={self.low!r}, high={self.high!r}"
            raise ValueError(f"value={self.value!r} lies outside its band: {band}")
        _check_rank(self.rank)

    @property
    def band(self) -> str:
        """`low .. high` in words; "" where no band is claimed."""
        ends = ["" if x is None else format_number(x, self.unit) for x in (self.low, self.high)]
        return " .. ".join(ends) if any(ends) else ""


_FIELDS = tuple(f.name for f in fields(Row))
_KNOWN = {
    name: frozenset(words) | ({""} if name in _MAY_BE_EMPTY else frozenset())
    for name, words in _VOCABULARY.items()
}


def _check_word(name: str, word: object) -> None:
    if not isinstance(word, str) or word not in _KNOWN[name]:
        empty = " (or '' where it does not apply)" if name in _MAY_BE_EMPTY else ""
        raise ValueError(f"{name}={word!r}: choose from {', '.join(_VOCABULARY[name])}{empty}")


def _check_amount(name: str, value: object) -> float:
    # Real takes numpy's scalars in without importing numpy.
    amount = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not amount >= 0:
        raise ValueError(f"{name}={value!r}: a cost is a number, zero or more (never NaN)")
    return amount


def _check_rank(rank: object) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
        raise ValueError(f"rank={rank!r}: a process number, 0 or more")


class Ledger(UserList[Row]):
    """A list of rows with the few questions a cost table is asked.

    Every method that takes `**fields` keeps the rows whose labels match; a tuple, list or set
    names several allowed values: `ledger.filter(phase=("forward", "backward"), rank=0)`.
    """

    def add(self, **row_fields: object) -> Row:
        """Append one row, checked; the fields are those of `Row`."""
        _check_fields(row_fields, _FIELDS)
        missing = [n for n in ("stage", "quantity", "value", "source") if n not in row_fields]
        if missing:
            raise ValueError(f"a row needs {', '.join(missing)}")
        make_row: Callable[..., Row] = Row  # it checks the types itself
        row = make_row(**row_fields)
        self.append(row)
        return row

    # -- questions --------------------------------------------------------------------------
    def filter(self, **wanted: object) -> Ledger:
        """The rows whose labels match. A word that no row could hold is an error, not nothing."""
        _check_fields(wanted, _LABELS)
        allowed = {name: _as_choices(name, value) for name, value in wanted.items()}
        return Ledger(
            row
            for row in self.data
            if all(getattr(row, name) in choices for name, choices in allowed.items())
        )

    def training(self, **wanted: object) -> Ledger:
        """The matching rows of training itself, without what is around it (`AROUND`)."""
        return Ledger(row for row in self.filter(**wanted) if row.phase not in AROUND)

    def total(self, **wanted: object) -> float:
        """The sum of the matching values, in their one unit (0.0 where nothing matches)."""
        found = self.filter(**wanted)
        found._check_adds_up(apart=())
        return math.fsum(row.value for row in found)

    def at_peak(self, **wanted: object) -> Ledger:
        """The bytes rows of the phase that needs the most memory, on the rank that does."""
        wanted.setdefault("quantity", "bytes")
        found = self.filter(**wanted)
        found._check_adds_up(apart=("phase", "rank", "stage"))
        moments: dict[tuple[str, int, str], list[Row]] = {}
        for row in found:
            moments.setdefault((row.stage, row.rank, row.phase), []).append(row)
        return Ledger(max(moments.values(), key=lambda m: sum(r.value for r in m), default=[]))

    def peak(self, **wanted: object) -> float:
        """Bytes at the worst moment: summed over role and component in each phase, the largest
        phase of any one rank. `at_peak` says which phase that is and what it is made of."""
        return math.fsum(row.value for row in self.at_peak(**wanted))

    def pivot(self, rows: str, columns: str, **wanted: object) -> dict[str, dict[str, float]]:
        """Sums by two labels: `{row: {column: value}}`, both in the order of the vocabulary.

        A cell that no row is about is absent: unknown is not zero.
        """
        _check_fields((rows, columns), _LABELS)
        found = self.filter(**wanted)
        found._check_adds_up(apart=(rows, columns))
        cells: dict[str, dict[str, float]] = {}
        for row in sorted(found, key=_vocabulary_order(rows)):
            cells.setdefault(str(getattr(row, rows)), {})
        for row in sorted(found, key=_vocabulary_order(columns)):
            line = cells[str(getattr(row, rows))]
            column = str(getattr(row, columns))
            line[column] = line.get(column, 0.0) + row.value
        return cells

    def _check_adds_up(self, apart: Collection[str]) -> None:
        """Refuse a sum that means nothing, unless the label is kept `apart`."""
        for name in ("quantity", "source"):
            kinds = list(dict.fromkeys(getattr(row, name) for row in self.data))
            if len(kinds) > 1 and name not in apart:
                raise ValueError(f"adding up {' and '.join(kinds)} means nothing: give one {name}=")
        phases = dict.fromkeys(row.phase for row in self.data if row.quantity == "bytes")
        if len(phases) > 1 and "phase" not in apart:
            named = ", ".join(p or "''" for p in phases)
            raise ValueError(
                f"bytes do not add up over phases ({named}): give phase= or use peak()"
            )

    # -- in and out -------------------------------------------------------------------------
    def to_pandas(self) -> pandas.DataFrame:
        """The table as a `pandas.DataFrame`, one column per field."""
        import pandas  # late: a plan must open where pandas is slow to load or absent

        return pandas.DataFrame([asdict(row) for row in self.data], columns=list(_FIELDS))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one JSON object per line; the old file stays whole until the new one is."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, self.to_jsonl())
        return path

    def to_jsonl(self) -> str:
        """One JSON object per line. JSON has no infinity, so it travels as the word `inf`."""
        rows = ({k: "inf" if v == math.inf else v for k, v in asdict(r).items()} for r in self.data)
        return json_lines(rows)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ledger:
        """Read what `save` wrote; a line that is not a row is named with its number."""
        ledger = cls()
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                ledger.add(**_row_from_json(line))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is not a ledger row: {error}") from None
        return ledger

    # -- how it looks -----------------------------------------------------------------------
    def __repr__(self) -> str:
        count = f"{len(self)} row{'' if len(self) == 1 else 's'}"
        labels = [
            ", ".join(dict.fromkeys(getattr(row, name) for row in self.data))
            for name in ("stage", "quantity", "source")
        ]
        return f"Ledger({'; '.join([count, *filter(None, labels)])})"

    def __str__(self) -> str:
        return table(self._first_rows()) + self._rest() if self.data else "Ledger(0 rows)"

    def _repr_html_(self) -> str:
        return html_table(self._first_rows()) + (f"<p>{self._rest()}</p>" if self._rest() else "")

    def _first_rows(self) -> list[dict[str, str]]:
        """The first rows as text; columns that are empty in every row are left out."""

        lines = [
            {
                **{n: getattr(row, n) for n in ("stage", "role", "phase", "component", "quantity")},
                "value": format_number(row.value, row.unit),
                "band": row.band,
                "rank": str(row.rank),
                "source": row.source,
            }
            for row in self.data[:_SHOWN_ROWS]
        ]
        optional = (*_MAY_BE_EMPTY, "band")
        empty = [name for name in optional if not any(line[name] for line in lines)]
        return [{k: v for k, v in line.items() if k not in empty} for line in lines]

    def _rest(self) -> str:
        rest = len(self) - _SHOWN_ROWS
        return f"\n… and {rest} more rows" if rest > 0 else ""


def _check_fields(given: Iterable[str], allowed: Sequence[str]) -> None:
    for name in given:
        if name not in allowed:
            raise ValueError(f"field {name!r} is not one of {', '.join(allowed)}")


def _as_choices(name: str, value: object) -> Collection[object]:
    choices = value if isinstance(value, (tuple, list, set, frozenset)) else (value,)
    for choice in choices:
        _check_rank(choice) if name == "rank" else _check_word(name, choice)
    return choices


def _vocabulary_order(name: str) -> Callable[[Row], int]:
    """A sort key: the place of a row's label in its vocabulary ('' comes last)."""
    words = _VOCABULARY.get(name, ())
    places = {word: place for place, word in enumerate((*words, ""))}
    return lambda row: places.get(getattr(row, name), row.rank)


def _row_from_json(line: str) -> JsonObject:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return {
        k: math.inf if v == "inf" and k in ("value", "low", "high") else v for k, v in row.items()
    }
