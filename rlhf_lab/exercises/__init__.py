"""Exercises of the course: what is asked, a check that names mistakes, and the library's solution.

lab.exercises()                  all of them; lab.exercises("gae") says what is asked
lab.check("gae", my_gae)         what is right, or which mistake it is
lab.solution("gae")              the library's own source
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Mapping
from textwrap import shorten
from types import ModuleType

from ..display import Display, did_you_mean, escape, html_table, table
from ..ppo.losses import REPLACEABLE
from .book import EXERCISES, Function, find
from .cases import described, written
from .compare import Unsolved, examine, outputs

_TRIES: Counter[str] = Counter()
"""Wrong answers to each exercise since the last right one: every one gets a further hint."""


def _parts(text: str) -> tuple[str, str]:
    """The same as text and as HTML."""
    return text, f'<pre style="white-space:pre-wrap">{escape(text)}</pre>'


class Check(Display):
    """What a check found; true where the answer is right, so that graders can assert it."""

    def __init__(self, name: str, passed: bool, *lines: str) -> None:
        self.name, self.passed = name, passed
        text = "\n    ".join([f"{'✓' if passed else '✗'} {name}: {lines[0]}", *lines[1:]])
        super().__init__(*_parts(text))

    def __bool__(self) -> bool:
        return self.passed


def exercises(name: str | None = None) -> Display:
    """All exercises as a table; with a name, what is asked there: in words, with shapes."""
    if name is None:
        asks = {
            n: shorten(x.asks.split("\n\n")[0], 90, placeholder=" …") for n, x in EXERCISES.items()
        }
        rows = [
            {"exercise": n, "notebook": f"{x.notebook:02}", "asks for": asks[n]}
            for n, x in EXERCISES.items()
        ]
        return Display(table(rows), html_table(rows))
    x = find(name)
    text = f"{x.signature}\n\n{x.asks}\n\nFor instance: {described(x.cases[0])}"
    return Display(*_parts(text))


def check(name: str, function: Function) -> Check:
    """Try a function on the cases of an exercise: what is wrong with it, by name where the mistake
    is known. Every further wrong answer gets a further hint. Raises ValueError for no such name."""
    exercise = find(name)
    try:
        wrong, case = examine(exercise, function)
    except Unsolved:
        return Check(name, False, f'not solved yet: lab.exercises("{name}") says what is asked')
    if not wrong:
        _TRIES[name] = 0
        return Check(name, True, f"right in all {len(exercise.cases)} cases")
    if case is None:  # it was not even called
        return Check(name, False, wrong)
    given = exercise.cases[case]
    right = dict(zip(exercise.results, outputs(exercise, exercise.variant(), given)))
    example = f"{written(given)} should give {written(right)}"
    hints = [exercise.hint, example, f'lab.solution("{name}") shows how the library does it']
    _TRIES[name] += 1
    number = min(_TRIES[name], len(hints))
    return Check(name, False, wrong, f"hint {number} of {len(hints)}: {hints[number - 1]}")


def solution(name: str) -> Display:
    """The library's own source of an exercise. Raises ValueError for a name that there is not."""
    x = find(name)
    fixed = "".join(f", {k}={v!r}" for k, v in x.fixed.items())
    text = f"# {x.function.__module__}{fixed}\n{inspect.getsource(x.function)}"
    return Display(*_parts(text))


def own_losses(stage: str, given: Mapping[str, Function]) -> dict[str, Function]:
    """A student's functions, under the names by which PPO's trainer takes them. Raises ValueError,
    one line, for a stage or name without such a loss, or one that `check` does not find right."""
    known = {n: x for n, x in EXERCISES.items() if (x.solution or n) in REPLACEABLE}
    known |= {x.solution or n: x for n, x in known.items()}
    for name, function in given.items():
        if stage != "ppo" or name not in known:
            takes = f"{did_you_mean(name, known)}ppo takes {', '.join(known)}"
            raise ValueError(f"losses: {stage} takes no {name!r} of yours: {takes}")
        try:
            wrong, _ = examine(known[name], function)
        except Unsolved:
            wrong = "it is not solved yet"
        if wrong:
            raise ValueError(f"losses: {name} would leave the rules: {wrong}")
    return {known[n].solution or n: known[n].called_alike(f) for n, f in given.items()}


class _Callable(ModuleType):
    """`lab.exercises` is this module once it is imported: it is called like the function."""

    def __call__(self, name: str | None = None) -> Display:
        return exercises(name)


sys.modules[__name__].__class__ = _Callable
