"""Is a run healthy? Named checks of what it logged, against limits learned from healthy runs.

    lab.health(run)            what each check saw, which specimens look like this, what to try

`health.yaml` says what each check looks at; `health_limits.json` holds the limits, where each comes
from, and which checks each specimen of the bug zoo fails (`benchmarks/bug_zoo.py --learn`). A check
of a metric that was not logged says nothing. Shares, ratios and correlations are compared, and not
rewards themselves, which have another unit in every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ..display import Display, counted, escape, format_number, html_table, table
from ..stages import read_table
from .run import Run

NGRAM = 3
LEAST, MOST = {"largest": 1, "smallest": 1, "magnitude": 1}, 6
"""Values that a figure is made from, at the least; `MOST` of others."""
THINNED = 100
"""Values that a trend is made from, at most."""
LIKE, MANY = 3, 10
"""Look-alikes that are named, at most; specimens that are counted and not named."""
CORE = ("loss", "pg_loss", "vf_loss", "objective", "kl", "grad_norm")
"""Figures that are numbers in every step, or the training has broken."""
Lines = Sequence[Mapping[str, float]]


# ------------------------------------------------------------------------ a series as one figure


def recent(values: Sequence[float]) -> float:
    """Mean of the last quarter."""
    return fmean(values[-max(1, len(values) // 4) :])


def change(values: Sequence[float]) -> float:
    """Of the last quarter against the first value."""
    return recent(values) - values[0]


def growth(values: Sequence[float]) -> float:
    """log(last quarter / first value); NaN where either is not above 0."""
    last, first = recent(values), values[0]
    return math.log(last / first) if min(last, first) > 0 else math.nan


def trend(values: Sequence[float]) -> float:
    """Kendall's τ with time: 1 always rises, −1 always falls."""
    values = values[:: 1 + len(values) // THINNED]
    pairs = [(a, b) for i, a in enumerate(values) for b in values[i + 1 :]]
    return sum((b > a) - (b < a) for a, b in pairs) / len(pairs) if pairs else math.nan


def magnitude(values: Sequence[float]) -> float:
    """log10 of the largest, of 1e-9 at the least."""
    return math.log10(max(1e-9, *values))


def usual(values: Sequence[float]) -> float:
    """log10 of the median, of 1e-9 at the least: one jump is none."""
    return math.log10(max(1e-9, median(values)))


FIGURES: Mapping[str, Callable[[Sequence[float]], float]] = {
    **{figure.__name__: figure for figure in (recent, change, growth, trend, magnitude, usual)},
    **{"largest": max, "smallest": min, "average": fmean},
}


def repeated_ngrams(texts: Iterable[str]) -> float:
    """Share of the runs of three words that stood in the same text before; NaN without any."""
    seen = total = 0
    for text in texts:
        words = text.split()
        grams = [tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)]
        total, seen = total + len(grams), seen + len(grams) - len(set(grams))
    return seen / total if total else math.nan


# ------------------------------------------------------------------------------------ the checks


@dataclass(frozen=True, kw_only=True)
class Check:
    """One entry of `health.yaml`."""

    name: str
    metric: str
    """or `a / b`: the figure of one over that of another"""
    figure: str
    """of `FIGURES`"""
    side: str
    """`high` or `low`: where sickness is"""
    sees: str
    tries: str
    against: str = ""
    """a metric whose figure is taken off"""
    least: int = 0
    """values that it needs; 0: as many as the figure"""
    unless: Sequence[str] = ()
    """metrics beside which this one means something else"""

    @property
    def needs(self) -> int:
        return self.least or LEAST.get(self.figure, MOST)

    def value(self, lines: Lines) -> float:
        """The figure of all lines; NaN where they do not hold it."""
        if any(name in line for name in self.unless for line in lines):
            return math.nan
        return self._of(lines, self.metric) - (self._of(lines, self.against) if self.against else 0)

    def _of(self, lines: Lines, metric: str) -> float:
        first, *below = (self._figure(lines, name) for name in metric.split(" / "))
        divisor = math.prod(below)
        return first / divisor if divisor else math.nan

    def _figure(self, lines: Lines, name: str) -> float:
        values = [line[name] for line in lines if name in line and math.isfinite(line[name])]
        return FIGURES[self.figure](values) if len(values) >= self.needs else math.nan


CHECKS = {n: Check(name=n, **entry) for n, entry in read_table(__file__, "health.yaml").items()}


@cache
def limits() -> dict[str, Any]:
    """`health_limits.json`: `limits` (warn, critical, origin) by check, and by name in `specimens`
    the share of its runs that `fails` each check, and by which step four in five are `shown`."""
    return dict(read_table(__file__, "health_limits.json"))


@dataclass(frozen=True)
class Finding:
    """A check that a run fails; `critical`: far beyond what healthy runs show."""

    check: Check
    value: float
    limit: float
    critical: bool

    @property
    def saw(self) -> str:
        beyond = "above" if self.check.side == "high" else "below"
        return f"{format_number(self.value)}, {beyond} {format_number(self.limit)}"

    def __str__(self) -> str:
        level = "critical" if self.critical else "warning"
        check = self.check
        return f"{level}: {check.name}: {self.saw} ({check.sees}). Try: {check.tries}"


def examine(lines: Lines) -> list[Finding]:
    """The checks that these logged lines fail, critical ones first."""
    found = []
    for name, limit in limits()["limits"].items():
        value, sign = CHECKS[name].value(lines), 1 if CHECKS[name].side == "high" else -1
        if sign * value > sign * limit["warn"]:  # not so for NaN
            critical = sign * value > sign * limit["critical"]
            found.append(Finding(CHECKS[name], value, limit["warn"], critical))
    return sorted(found, key=lambda f: not f.critical)


def known(lines: Lines) -> list[str]:
    """The checks that these lines say something of."""
    return [name for name in limits()["limits"] if math.isfinite(CHECKS[name].value(lines))]


def look_alikes(failed: Iterable[str]) -> list[str]:
    """Specimens that fail the checks of these names, the most alike first: by what both fail over
    what either does, a check counting by the share of the specimen's runs that fails it."""
    names, likeness = set(failed), dict[str, float]()
    for specimen, one in limits()["specimens"].items():
        shares = one["fails"]
        both = sum(shares.get(name, 0.0) for name in names)
        either = len(names) + sum(x for name, x in shares.items() if name not in names)
        likeness[specimen] = both / either if either else 0.0
    alike = [s for s in likeness if likeness[s] > 0]
    return sorted(alike, key=lambda s: -likeness[s])[:LIKE]


# -------------------------------------------------------------------------------------- a verdict


class Health(Display):
    """What the checks say of logged lines (`ppo`: PPO's); true where they pass all of them."""

    def __init__(self, lines: Lines, ppo: bool | None = None) -> None:
        self.findings = examine(lines)
        self.steps, self.known = len(lines), known(lines)
        self.early = [n for n in known([*lines] * MOST) if n not in self.known]
        self.blind = len(limits()["limits"]) - len(self.known) - len(self.early)
        self.broken = no_numbers(lines)
        if ppo is None:
            ppo = any("explained_variance" in line for line in lines)
        # Specimens of which more than one run in five, after so many steps, still passed too, and
        # those that show where nothing could be looked at.
        self.hidden = [
            name
            for name, one in limits()["specimens"].items()
            if ppo and ((one["shown"] or math.inf) > self.steps or not self._looked_for(one))
        ]
        self.look_alikes = look_alikes(f.check.name for f in self.findings)
        rows = [
            {
                "check": f.check.name + ("!" if f.critical else ""),
                "saw": f.saw,
                "of": f.check.sees,
                "try": f.check.tries,
            }
            for f in self.findings
        ]
        verdict = self.headline
        if self.hidden and not rows:
            which = f"{len(self.hidden)} of {len(limits()['specimens'])} specimens"
            if len(self.hidden) < MANY:
                which = ", ".join(self.hidden)
            verdict += f"\nnot to be ruled out by this: {which}"
        text, page = (f"\n{table(rows)}", html_table(rows)) if rows else ("", "")
        heading = escape(verdict).replace("\n", "<br>")
        super().__init__(verdict + text, f"<p>{heading}</p>{page}")

    def _looked_for(self, specimen: Mapping[str, Any]) -> bool:
        """Whether checks could look that four in five of its runs may fail."""
        return bool(sum(specimen["fails"].get(name, 0.0) for name in self.known) >= 0.8)

    @property
    def headline(self) -> str:
        """The verdict in a line; a check with a `!` is critical."""
        if self.broken:
            return f"critical: {self.broken}: no number"
        if not self.known:
            return "no check: nothing was logged that one knows"
        if not self.findings:
            more = f"; {len(self.early)} more need further steps" if self.early else ""
            more += f"; {self.blind} look at what was not logged" if self.blind else ""
            passed, steps = len(self.known), self.steps
            checks = f"{counted(passed, 'check')} passed"
            return f"{checks} over {counted(steps, 'logged step')}{more}"
        names = ", ".join(f.check.name + ("!" if f.critical else "") for f in self.findings)
        like = f"; looks like {', '.join(self.look_alikes)}" if self.look_alikes else ""
        return f"{len(self.findings)} of {len(self.known)} checks failed: {names}{like}"

    def __bool__(self) -> bool:
        return bool(self.known) and not self.findings and not self.broken


def no_numbers(lines: Lines) -> str:
    """The first of `CORE` that was a number and is none any more, and where; "" for none."""
    for at, (before, line) in enumerate(zip(lines, lines[1:]), 2):
        for name in CORE:
            if math.isfinite(before.get(name, math.nan)) and not math.isfinite(line.get(name, 0.0)):
                return f"{name}={line[name]} in logged step {at}"
    return ""


def logged_lines(run: Run, upto: float = math.inf) -> list[dict[str, float]]:
    """What each training step up to one logged, PPO's KL coefficient where a line lacks it, and
    what its samples repeat."""
    texts: dict[int, list[str]] = {}
    for row in run.samples:
        if "when" not in row:
            texts.setdefault(int(row["step"]), []).append(str(row["response"]))
    settings = run.config.get("settings") or {}
    fixed = {k: float(settings[k]) for k in ("kl_coef",) if k in settings and run.stage == "ppo"}
    return [
        {**fixed, **line, "repeated_ngrams": repeated_ngrams(texts.get(int(line["step"]), []))}
        for line in run.metrics
        if line["step"] <= upto and not any(name.startswith("eval_") for name in line)
    ]


def health(run: Run | str | Path, upto: float = math.inf) -> Health:
    """Named checks of what a run (or its folder) has logged, up to a step: what each saw that
    healthy runs do not show, which specimens of the bug zoo look like this, and what to try. The
    limits come from healthy runs of bundled models; `health_limits.json` says from which."""
    run = run if isinstance(run, Run) else Run.load(run)
    return Health(logged_lines(run, upto), run.stage == "ppo")
