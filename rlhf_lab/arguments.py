"""Arguments of the public functions, checked by their annotations before anything is done: a wrong
type is one line, and no error from inside a library.

A union of which any part is not known here (a function's type, a setting) is not checked.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from numbers import Integral, Real
from os import PathLike
from types import NoneType
from typing import Any

from .display import did_you_mean, first_line

KINDS: dict[str, Any] = {
    **{"int": Integral, "float": Real, "str": str, "bool": bool, "None": NoneType, "tuple": tuple},
    **{"dict": Mapping, "Mapping": Mapping, "Sequence": Collection, "Iterable": Iterable},
    **{"Prompt": (str, list), "Path": PathLike, "Data": Iterable},  # a list of rows is data too
}
OURS = frozenset({"Run", "Model", "Data", "Plan", "Estimate", "Hardware"})
"""Classes by name: most are not imported before somebody makes one. A name of one may be a path."""


class WrongType(TypeError, ValueError):
    """An argument of a wrong type; a wrong value, too, for those who catch these."""


def _fits(value: object, kind: str) -> bool:
    if kind in OURS and any(base.__name__ == kind for base in type(value).__mro__):
        return True
    if kind in OURS and isinstance(value, PathLike):
        return True
    if isinstance(value, bool) and kind in ("int", "float"):
        return False
    if isinstance(value, str) and kind in ("Sequence", "Iterable", "Data"):
        return False
    return kind in KINDS and isinstance(value, KINDS[kind])


def _check(function: str, name: str, value: object, annotation: str) -> None:
    inner = re.search(r"Sequence\[(\w+)\]", annotation)
    if inner and _fits(value, "Sequence"):
        for one in value:  # type: ignore[attr-defined]  # a collection
            _check(function, f"{name}, each", one, inner[1])
    kinds = re.sub(r"\[.*?\](?= \||$)", "", annotation).split(" | ")
    if not set(kinds) <= OURS | KINDS.keys() or any(_fits(value, kind) for kind in kinds):
        return
    shown = first_line(f"{value!r:.60}")
    raise WrongType(f"lab.{function}: {name} must be {' or '.join(kinds)}, not {shown}")


def _check_names(function: str, given: Iterable[str], known: Collection[str]) -> None:
    for name in given:
        if name in known:
            continue
        hint = did_you_mean(name, known, near=0.75)
        if not hint and function == "train":
            hint = f"model, hardware and settings are the plan's: lab.plan(stage, {name}=…)"
        hint = hint or f"it has {', '.join(known)}"
        raise WrongType(f"lab.{function}: there is no argument {name}: {hint.strip()}")


@functools.cache
def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which first raises WrongType, one line, for an argument of a wrong type and for
    one that it does not have."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            _check_names(function.__name__, kwargs, signature.parameters)
            return function(*args, **kwargs)  # Python's own words for what is missing or too much
        for name, value in given.items():
            parameter = signature.parameters[name]
            values = [value]
            if parameter.kind is parameter.VAR_POSITIONAL:
                values = value
            elif parameter.kind is parameter.VAR_KEYWORD:
                values = value.values()
            for one in values:
                _check(function.__name__, name, one, str(parameter.annotation))
        return function(*args, **kwargs)

    return call
