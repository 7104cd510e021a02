"""What runs wrote, in order: through training, and on the same held-out prompts.

A run records two kinds of samples. In training a few responses of a step, each time to other
prompts; and, marked with `when`, responses to held-out prompts: before training ("sft"), at an
evaluation ("held-out") and after training (the name of its stage). Reads files that may be old,
unfinished or being written at this moment; no widgets here, and nothing is drawn.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from ..charts.tokens_view import Tokens, plain
from ..runs.run import Run

TRAINING, HELD_OUT = "training", "held-out"
_NOT_FIGURES = ("step", "prompt", "response", "when", "tokens")

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
        self.names = _names(self.runs)
        for run, name in zip(self.runs, self.names):
            try:
                mine = list(_samples(run, name))
                newest = max((s.step for s in mine if not s.when), default=0)
                self.statuses.append(
                    f"{name} ({run.stage}, {run.status}): {len(mine)} samples"
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

    def steps(self, mode: str) -> list[int]:
        """Steps at which there are samples, of all runs together."""
        return sorted({s.step for s in self.samples if s.mode == mode and s.time == "at"})

    def steps_with_figures(self, mode: str) -> set[int]:
        """The steps whose tokens have figures: runs keep them at some of their steps."""
        return {
            s.step for s in self.samples if s.mode == mode and s.time == "at" and s.tokens.figures
        }

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
            return [
                s for name in self.names for s in self._training(name, step) if s.number == choice
            ]
        answers = [s for s in self.samples if s.mode == HELD_OUT and s.prompt == choice]
        selected: list[RunSample] = []
        for name in self.names:
            for time in ("before", "at", "after"):
                moment = [
                    s
                    for s in answers
                    if s.name == name and s.time == time and (time != "at" or s.step == step)
                ]
                # What a run started from may be selected already, as what another run wrote.
                known = {(s.when, s.response) for s in selected}
                selected += [
                    s for s in moment[:1] if time != "before" or (s.when, s.response) not in known
                ]
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


def _names(runs: Iterable[Run]) -> list[str]:
    """The runs' names, numbered where two are called alike."""
    seen: Counter[str] = Counter()
    names = []
    for run in runs:
        seen[run.name] += 1
        names.append(run.name if seen[run.name] == 1 else f"{run.name} ({seen[run.name]})")
    return names


def _label(number: int, prompt: str) -> str:
    text = " ".join(plain(prompt.strip()).split())
    return f"{number + 1}: {text[:90]}{'…' if len(text) > 90 else ''}"


def _samples(run: Run, name: str) -> Iterable[RunSample]:
    count: Counter[tuple[int, str]] = Counter()
    stage = run.stage
    for row in run.samples:
        step, when = row.get("step"), row.get("when")
        step = step if isinstance(step, int) else 0
        when = "" if when is None else str(when)
        figures = {
            n: float(x)
            for n, x in row.items()
            if n not in _NOT_FIGURES and _is_number(x) and math.isfinite(x)
        }
        prompt, response = (_text(row.get(n)) for n in ("prompt", "response"))
        tokens = Tokens.of(row.get("tokens"), response)
        number = count[step, when]
        yield RunSample(
            run, name, stage, step, when, number, prompt, response, figures, tokens, row
        )
        count[step, when] += 1


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
