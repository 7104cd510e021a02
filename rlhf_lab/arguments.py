"""Arguments of the public functions, checked by their annotations before anything is done: a wrong
type is one line, and no error from inside a library.

A union of which any part is not known here (a function's type, a setting) is not checked.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from types import NoneType
from typing import Any

KINDS: dict[str, Any] = {
    **{"int": Integral, "float": Real, "str": str, "bool": bool, "None": NoneType},
    **{"tuple": tuple, "dict": dict, "Mapping": Mapping, "Prompt": (str, list)},
    **{"Sequence": Sequence, "Iterable": Iterable},
}
OURS = frozenset({"Run", "Model", "Data", "Plan", "Estimate", "Hardware", "Path"})
"""Classes by name: most are not imported before somebody makes one."""


def _fits(value: object, kind: str) -> bool:
    if kind in OURS:
        return any(base.__name__ == kind for base in type(value).__mro__)
    if kind in ("int", "float") and isinstance(value, bool):
        return False
    if kind in ("Sequence", "Iterable") and isinstance(value, str):
        return False
    return isinstance(value, KINDS[kind])


def _check(function: str, name: str, value: object, annotation: str) -> None:
    kinds = re.sub(r"\[.*?\](?= \||$)", "", annotation).split(" | ")
    if not set(kinds) <= OURS | KINDS.keys() or any(_fits(value, kind) for kind in kinds):
        return
    shown = f"{value!r:.60}".splitlines()[0]
    raise TypeError(f"lab.{function}: {name} must be {' or '.join(kinds)}, not {shown}")


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which first raises TypeError, one line, for an argument of a wrong type."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return function(*args, **kwargs)  # Python's own words for it
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
