"""What runs wrote, in order: through training, and on the same held-out prompts.

A run records two kinds of samples. In training a few responses of a step, each time to other
prompts; and, marked with `when`, responses to held-out prompts: before training ("sft"), at an
evaluation ("held-out") and after training (the name of its stage). Reads files that may be old,
unfinished or being written at this moment. No widgets here; at the end, the HTML and the chart that
the inspector shows of the samples that stand side by side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from ..display import counted, escape, html_table, numbered
from ..runs.run import Run
from .chart import line_chart
from .frame import Picture
from .tokens_view import (
    FIGURE_NAMES,
    QUANTITIES,
    Scale,
    Tokens,
    facts,
    facts_html,
    marked,
    plain,
    real,
    token_rows,
    tokens_html,
)

TRAINING, HELD_OUT = "training", "held-out"
_NOT_FIGURES = ("step", "prompt", "response", "when", "tokens", "ended")

SampleKey: TypeAlias = tuple[str, int, str, int]
"""name, step, when and number of a sample"""
Choice: TypeAlias = int | str | None
"""which samples stand side by side: a number within the step, or a held-out prompt"""


@dataclass
class RunSample:
    """One response of one run. `name` is the run's, as shown."""

    run: Run
    name: str
    stage: str
    step: int
    when: str
    number: int  # among the samples of the same step and `when`, from 0
    prompt: str
    response: str
    figures: dict[str, float]  # reward, gold reward and its parts, …
    tokens: Tokens
    row: Mapping[str, object] = field(repr=False)

    @property
    def mode(self) -> str:
        return HELD_OUT if self.when else TRAINING

    @property
    def time(self) -> str:
        """before, at an evaluation, or after training."""
        if self.when in ("", HELD_OUT):
            return "at"
        return "after" if self.when == self.stage else "before"

    @property
    def title(self) -> str:
        if self.time == "at":
            return f"{self.name} · step {self.step}" + (", held-out" if self.when else "")
        return f"{self.name} · {self.time} training" + (
            f" ({self.when})" if self.when != self.name else ""
        )

    @property
    def key(self) -> SampleKey:
        """It stays the same for as long as the run's file only grows."""
        return self.name, self.step, self.when, self.number

    def has(self, text: str) -> bool:
        return text in self.prompt.casefold() or text in self.response.casefold()


class SampleSet:
    """The samples of several runs. `read` again to see what has come since."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = list(runs)
        self.scored: dict[SampleKey, Tokens] = {}  # figures that were computed afterwards
        self.read()

    def read(self) -> None:
        """Everything anew. What cannot be read is a line in `problems`, not an exception."""
        self.samples: list[RunSample] = []
        self.problems: list[str] = []
        self.statuses: list[str] = []
        self.names = numbered(run.name for run in self.runs)
        for run, name in zip(self.runs, self.names):
            try:
                mine = list(_samples(run, name))
                newest = max((s.step for s in mine if not s.when), default=0)
                self.statuses.append(
                    f"{name} ({run.stage}, {run.status}): {counted(len(mine), 'sample')}"
                    + (f", the newest of step {newest}" if newest else "")
                )
            except (OSError, ValueError) as error:
                self.problems.append(f"{name} cannot be read: {error}")
                continue
            self.samples += mine
        for sample in self.samples:
            sample.tokens = self.scored.get(sample.key, sample.tokens)

    def modes(self) -> list[str]:
        """The kinds of samples there are."""
        present = {s.mode for s in self.samples}
        return [mode for mode in (TRAINING, HELD_OUT) if mode in present]

    def first_mode(self) -> str:
        """What to look at first: training, unless that leaves out one of several runs."""
        trained = {s.name for s in self.samples if s.mode == TRAINING}
        return TRAINING if trained == {s.name for s in self.samples} else HELD_OUT

    def steps(self, mode: str, with_figures: bool = False) -> list[int]:
        """Steps at which there are samples, of all runs together; `with_figures`: those whose
        tokens have some, which runs keep at some of their steps."""
        there = [s for s in self.samples if s.mode == mode and s.time == "at"]
        return sorted({s.step for s in there if s.tokens.figures or not with_figures})

    def choices(self, mode: str, step: int) -> list[tuple[str, Choice]]:
        """What there is to choose from, as (label, key): samples of a step, or prompts."""
        if mode == HELD_OUT:
            runs_of: dict[str, set[str]] = {}
            for s in self.samples:
                if s.mode == HELD_OUT:
                    runs_of.setdefault(s.prompt, set()).add(s.name)
            # Those that every run answered come first: they are the ones to compare.
            order = sorted(runs_of, key=lambda prompt: -len(runs_of[prompt]))
            return [(_label(i, prompt), prompt) for i, prompt in enumerate(order)]
        first: dict[int, str] = {}
        for name in self.names:
            for s in self._training(name, step):
                first.setdefault(s.number, s.prompt)
        return [(_label(i, first[i]), i) for i in sorted(first)]

    def select(self, mode: str, step: int, choice: Choice) -> list[RunSample]:
        """What stands side by side: every run's sample of that step, or all answers to a prompt."""
        if mode == TRAINING:
            shown = (s for name in self.names for s in self._training(name, step))
            return [s for s in shown if s.number == choice]
        first: dict[tuple[str, str], RunSample] = {}
        for s in self.samples:
            if s.mode == HELD_OUT and s.prompt == choice and (s.time != "at" or s.step == step):
                first.setdefault((s.name, s.time), s)
        selected: list[RunSample] = []
        for name in self.names:
            for time in ("before", "at", "after"):
                answer = first.get((name, time))
                # What a run started from may be selected already, as what another run wrote.
                known = {(s.when, s.response) for s in selected if time == "before"}
                if answer and (answer.when, answer.response) not in known:
                    selected.append(answer)
        return selected

    def _training(self, name: str, step: int) -> list[RunSample]:
        """A run's samples of a step, or of the last one before it that has some."""
        mine = [s for s in self.samples if s.name == name and s.mode == TRAINING]
        last = max((s.step for s in mine if s.step <= step), default=None)
        return [s for s in mine if s.step == last]

    def locate(self, sample: RunSample, step: int) -> tuple[str, int, Choice]:
        """(mode, step, choice) that select this sample; `step` where any would do."""
        step = sample.step if sample.time == "at" else step
        return sample.mode, step, sample.prompt if sample.when else sample.number

    def find(self, text: str) -> list[RunSample]:
        """Samples whose prompt or response holds the text, upper and lower case alike."""
        folded = text.casefold()
        return [s for s in self.samples if s.has(folded)] if folded else []


def _label(number: int, prompt: str) -> str:
    text = " ".join(plain(prompt.strip()).split())
    return f"{number + 1}: {text[:90]}{'…' if len(text) > 90 else ''}"


def _held_out_key(row: Mapping[str, object]) -> str:
    """What a sample and its line of all evaluated responses share."""
    return repr([row.get(name) for name in ("when", "prompt_ids", "ids")])


def _samples(run: Run, name: str) -> Iterable[RunSample]:
    count: Counter[tuple[int, str]] = Counter()
    stage = run.stage
    # Figures of held-out responses before and after training stand with all of those.
    figures_of = {_held_out_key(row): row for row in run.evaluation}
    for row in run.samples:
        step = row["step"] if isinstance(row.get("step"), int) else 0
        whole = {**figures_of.get(_held_out_key(row), {}), **row} if row.get("when") else row
        numbers = {n: real(x) for n, x in whole.items() if n not in _NOT_FIGURES}
        figures = {n: x for n, x in numbers.items() if x is not None}
        texts = ("" if row.get(n) is None else str(row[n]) for n in ("when", "prompt", "response"))
        when, prompt, response = texts
        tokens = Tokens.of(row.get("tokens"), response)
        number = count[step, when]
        yield RunSample(
            run, name, stage, step, when, number, prompt, response, figures, tokens, row
        )
        count[step, when] += 1


# -- what is drawn of them ---------------------------------------------------------------------
class Highlight(NamedTuple):
    """Which tokens are coloured and marked."""

    key: str = ""  # the figure that colours tokens
    scale: Scale | None = None
    search: str = ""  # text that is looked for
    token: int = 0  # the selected one, from 1; 0 for none


def responses_html(samples: Sequence[RunSample], highlight: Highlight) -> str:
    """The samples side by side; a prompt that they share stands above them, once."""
    shared = len({s.prompt for s in samples}) == 1
    head = _prompt(samples[0], highlight) if shared else ""
    parts = "".join(_response(s, highlight, own_prompt=not shared) for s in samples)
    return f'<div class="lab-tk">{head}<div class="cards">{parts}</div></div>'


def token_tables_html(samples: Sequence[RunSample], highlight: Highlight) -> str:
    """Every token and its figures, a table for each sample."""
    parts = "".join(
        f'{_prompt(s, highlight)}<div class="scroll" tabindex="0">'
        f"{html_table(token_rows(s.tokens), caption=plain(s.title))}</div>"
        for s in samples
    )
    return f'<div class="lab-tk">{parts}</div>'


def note_html(lines: Iterable[str]) -> str:
    body = "<br>".join(escape(plain(line)) for line in lines)
    return f'<div class="lab-tk"><div class="note">{body}</div></div>'


def facts_text(sample: RunSample) -> str:
    """What is known of the whole response, in a line."""
    pairs = facts(sample.figures, sample.tokens)
    return " · ".join(f"{plain(name)} {number}".strip() for name, number in pairs)


def token_chart(samples: Sequence[RunSample], key: str, token: int = 0) -> Picture | None:
    """A figure over the response, a line for each sample; of one sample also the figures that
    belong to it. None where it is not known of any."""
    drawn = [s for s in samples if key in s.tokens.figures]
    if not drawn:
        return None
    names = QUANTITIES[key].drawn or (key,)
    series: dict[str, tuple[Sequence[int], Sequence[float | None]]] = {}
    for sample in drawn:
        for name in names if len(drawn) == 1 else names[:1]:
            if numbers := sample.tokens.figures.get(name):
                label = FIGURE_NAMES[name] if len(drawn) == 1 else plain(sample.title)
                series[label] = (range(1, len(numbers) + 1), numbers)
    numbers = drawn[0].tokens.figures[key]
    if len(drawn) == 1 and 0 < token <= len(numbers):
        series[f"token {token}"] = ([token], [numbers[token - 1]])
    return line_chart(
        series, x_label="token of the response", y_label=QUANTITIES[key].axis, width=760, height=190
    )


def _prompt(sample: RunSample, highlight: Highlight) -> str:
    text = sample.prompt.rstrip("\n")
    return f'<div class="prompt" dir="auto">{marked(text, highlight.search)}</div>' if text else ""


def _response(sample: RunSample, highlight: Highlight, own_prompt: bool) -> str:
    tokens, place = sample.tokens, highlight.token - 1
    title, strip = escape(plain(sample.title)), ""
    prompt = _prompt(sample, highlight) if own_prompt else ""
    text = tokens_html(tokens, highlight.key, highlight.scale, highlight.search, place)
    if tokens.figures:
        line = "Point at a token to read its figures."
        if place >= 0:
            line = tokens.words(place) if place < len(tokens.text) else ""
        strip = f'<div class="strip" aria-live="polite">{escape(line)}</div>'
    return (
        f'<section class="card" aria-label="{title}"><h4>{title}</h4>'
        f"{facts_html(facts(sample.figures, tokens))}{prompt}"
        f'<div class="text" dir="auto" tabindex="0" role="region" '
        f'aria-label="response of {title}">{text}</div>{strip}</section>'
    )
