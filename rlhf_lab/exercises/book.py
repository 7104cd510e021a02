"""An exercise: what is asked, its solution, and the mistakes that are known by name.

`exercises.yaml` lists them. A solution is a function of `ppo/losses.py` or of `formulas.py`; its
docstring is what is asked. A mistake is a change of the solution's source.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial, wraps
from typing import Any, TypeAlias

from ..display import did_you_mean
from ..ppo import losses
from . import formulas
from .cases import DRAWS, TABLE, Arguments, draw_cases

Function: TypeAlias = Callable[..., Any]


@dataclass(frozen=True)
class Exercise:
    """One entry of `exercises.yaml`."""

    name: str
    notebook: int
    hint: str
    mistakes: Mapping[str, tuple[str, str]]
    """what is said of each: what stands in the solution, and what stands there instead"""
    solution: str = ""
    """the solution's name; "": the exercise's own"""
    returns: Sequence[str] = ()
    """names of what is returned, where it is more than one value"""
    gradient: Sequence[str] = ()
    """arguments by which the gradient of the (first) result has to be right, too"""
    draw: Mapping[str, str] = field(default_factory=dict)
    """arguments that are not drawn as their names say (`cases.DRAWS`)"""
    fixed: Mapping[str, object] = field(default_factory=dict)
    """arguments of the solution that the exercise has decided"""

    @property
    def points(self) -> int:
        """What it counts for in a class."""
        return int(TABLE["points"].get(self.name, 1))

    @cached_property
    def function(self) -> Function:
        """The library's own function."""
        name = self.solution or self.name
        found: Function = getattr(formulas, name, None) or getattr(losses, name)
        return found

    @cached_property
    def arguments(self) -> dict[str, str]:
        """Its arguments, and how they are drawn. Options that no exercise asks for are left out."""
        names = inspect.signature(self.function).parameters
        drawn = {name: self.draw.get(name, name) for name in names if name not in self.fixed}
        return {name: how for name, how in drawn.items() if how in DRAWS}

    @cached_property
    def cases(self) -> list[Arguments]:
        """Seeded arguments: ordinary ones first, then the edges."""
        return draw_cases(self.arguments)

    @property
    def results(self) -> list[str]:
        """Names of what is returned."""
        return list(self.returns or [self.name])

    @property
    def signature(self) -> str:
        """How the function is called, and what it gives."""
        return f"{self.name}({', '.join(self.arguments)}) -> {', '.join(self.results)}"

    @property
    def asks(self) -> str:
        """What is asked, in words, with shapes; the numbers of the trainer's rules left out."""
        return re.sub(r"[Rr]ule \d+(:|,) ", "", inspect.getdoc(self.function) or "")

    @cached_property
    def source(self) -> tuple[str, str]:
        """The solution's own lines: up to its docstring, and after it."""
        source = inspect.getsource(self.function)
        body = ast.parse(source).body[0].body[1].lineno - 1  # type: ignore[attr-defined]
        lines = source.splitlines(keepends=True)
        return "".join(lines[:body]), "".join(lines[body:])

    def variant(self, *mistakes: str) -> Function:
        """The solution, or what it would be with these mistakes."""
        head, code = self.source
        for says in mistakes:
            code = code.replace(*self.mistakes[says])
        space = dict(self.function.__globals__)
        exec("from __future__ import annotations\n" + head + code, space)
        return partial(space[self.function.__name__], **self.fixed)

    def called_alike(self, function: Function) -> Function:
        """A function that takes the exercise's arguments in their order, to be called as the
        solution is: by position or by name, with its defaults."""
        signature = inspect.signature(self.function)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return function(*(bound.arguments[name] for name in self.arguments))

        return call


EXERCISES = {
    name: Exercise(name, notebook, entry.pop("hint"), **entry.pop("is", {}), mistakes=entry)
    for notebook, entries in TABLE["notebooks"].items()
    for name, entry in entries.items()
}
"""Every exercise by name, in the order of the notebooks."""


def find(name: str) -> Exercise:
    """The exercise of a name. Raises ValueError where there is none."""
    if name not in EXERCISES:
        hint = did_you_mean(name, EXERCISES)
        raise ValueError(f"no exercise {name!r}: {hint}lab.exercises() lists them")
    return EXERCISES[name]
