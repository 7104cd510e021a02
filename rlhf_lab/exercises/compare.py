"""A student's function against the solution: the mistake by its name, or the place that differs.

Nothing of theirs is trusted: their function works on copies, what it raises is told in one line,
and its result may be of any type or shape.
"""

from __future__ import annotations

import inspect
import traceback
import warnings
from collections.abc import Iterator, Sequence
from itertools import chain, combinations
from typing import TypeAlias

import torch
from torch import Tensor

from .book import Exercise, Function
from .cases import Arguments, described

Outputs: TypeAlias = list[Tensor]
"""What was returned, and gradients, as fp64."""


class Fault(Exception):
    """What is wrong, in one line."""


class Unsolved(Exception):
    """There is no answer yet."""


def close(a: Tensor, b: Tensor) -> Tensor:
    """Where numbers are the same but for rounding. (…), (…) → (…) bool."""
    return torch.isclose(a, b, rtol=1e-5, atol=1e-7, equal_nan=True)


def same(a: Sequence[Outputs], b: Sequence[Outputs]) -> bool:
    """Whether all numbers of all cases are the same."""
    pairs = zip(chain(*a), chain(*b), strict=True)
    return all(x.shape == y.shape and bool(close(x, y).all()) for x, y in pairs)


# ------------------------------------------------------------------------------- calling a function


def outputs(exercise: Exercise, function: Function, case: Arguments) -> Outputs:
    """What a function gives in a case. Raises `Fault` where that cannot be compared."""
    given = {n: x.clone() if isinstance(x, Tensor) else x for n, x in case.items()}
    wanted = [given[name].requires_grad_() for name in exercise.gradient]
    result, names = _call(function, given), exercise.results
    for name, before in case.items():
        if isinstance(before, Tensor) and not torch.equal(before, given[name]):
            raise Fault(f"it changes its argument {name} in place: work on a copy ({name}.clone())")
    results = list(result) if len(names) > 1 and isinstance(result, (tuple, list)) else [result]
    if len(results) != len(names) or not all(isinstance(x, (Tensor, float, int)) for x in results):
        got = ", ".join(type(x).__name__ for x in results)
        raise Fault(f"it returns {got}: give a tensor or a number for each of {', '.join(names)}")
    found = [torch.as_tensor(x, dtype=torch.float64) for x in results]
    if wanted:  # of a weighted sum, so that no two positions count alike
        if not found[0].requires_grad:
            raise Fault("no gradient flows through the result: is there a detach, item or no_grad?")
        weights = torch.linspace(1, 2, found[0].numel()).view(found[0].shape)
        total = (found[0] * weights).sum()
        found += torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
    return [x.detach() for x in found]


def _call(function: Function, given: Arguments) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as torch's, of a variance of one number
            result = function(*given.values())
    except NotImplementedError:
        raise Unsolved from None
    except Exception as error:
        raise Fault(f"{_pointed(error, function)}; arguments: {described(given)}") from None
    if result is None or result is ...:
        raise Unsolved
    return result


def _pointed(error: Exception, function: Function) -> str:
    """What was raised, and in which line of theirs."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    function = inspect.unwrap(getattr(function, "func", function))  # what a partial is of
    code = getattr(function, "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)
    if not code or not (mine := [f for f in frames if f.filename == code.co_filename]):
        return text
    where, line = mine[-1].name, mine[-1].lineno or 0
    place = f"line {line} of its cell or file, in {where}"
    if where == code.co_name:
        place = f"line {line - code.co_firstlineno + 1} of {where}"
    return f"{text}; {place}{f': `{mine[-1].line}`' if mine[-1].line else ''}"


# ---------------------------------------------------------------------------- what is wrong with it


def examine(exercise: Exercise, function: Function) -> tuple[str, int | None]:
    """What is wrong, and a small case that shows it; "" where nothing is. Raises `Unsolved`."""
    if not callable(function):
        return "give the function itself, without calling it", None
    try:
        inspect.signature(function).bind(*exercise.arguments)
    except TypeError as error:
        return f"it is called as {exercise.signature}, and yours does not fit: {error}", None
    except ValueError:
        pass  # a function written in C may not say what it takes
    expected = [outputs(exercise, exercise.variant(), case) for case in exercise.cases]
    got, fault = list[Outputs](), ""
    for case in exercise.cases:
        try:
            got.append(outputs(exercise, function, case))
        except Fault as error:
            fault = str(error)
            break
    # What the cases before it say of the numbers helps more than an edge at which it stops.
    wrong = [i for i, (x, y) in enumerate(zip(got, expected)) if not same([x], [y])]
    if not wrong:
        return fault, len(got) if fault else None
    smallest = min(wrong, key=lambda i: sum(x.numel() for x in expected[i]))
    return _named(exercise, got) or _located(exercise, got, expected, wrong[0]), smallest


def _named(exercise: Exercise, got: list[Outputs]) -> str:
    """The name of the mistake, or of the two, that give the same numbers; "" for none."""
    known = exercise.mistakes
    for mistakes in chain(combinations(known, 1), combinations(known, 2)):
        try:
            wrong, pairs = exercise.variant(*mistakes), zip(got, exercise.cases)
            if all(same([mine], [outputs(exercise, wrong, case)]) for mine, case in pairs):
                return "; and ".join(mistakes)
        except (Fault, SyntaxError):
            continue  # two changes that do not go together
    return ""


def _located(exercise: Exercise, got: list[Outputs], expected: list[Outputs], number: int) -> str:
    """Which quantity differs first and where, and what all cases say of it."""
    names = exercise.results
    names = [*names, *(f"the gradient of {names[0]} by {name}" for name in exercise.gradient)]
    q = next(q for q in range(len(names)) if not same([[got[number][q]]], [[expected[number][q]]]))
    mine, right = got[number][q], expected[number][q]
    if mine.shape != right.shape:
        return f"{names[q]} has the shape {tuple(mine.shape)} and not {tuple(right.shape)}"
    place = (~close(mine, right)).nonzero()[0].tolist()
    axes = [f"{axis} {i}" for axis, i in zip(("row", "position", "entry"), place)]
    at = f" first at {', '.join(axes)} (counted from 0)" if axes else ""
    a, b = float(mine[tuple(place)]), float(right[tuple(place)])
    text = (
        f"{names[q]} differs{at}: {a:.6g} and not {b:.6g}, of {described(exercise.cases[number])}"
    )
    pairs = [(x[q], y[q], c) for x, y, c in zip(got, expected, exercise.cases)]
    return "; ".join([text, *_clues([p for p in pairs if p[0].shape == p[1].shape])])


def _clues(pairs: list[tuple[Tensor, Tensor, Arguments]]) -> Iterator[str]:
    """What all cases say of a quantity. pairs: got, expected and arguments of each."""
    got, expected, _ = zip(*pairs)
    mine, right = (torch.cat([x.flatten() for x in xs]) for xs in (got, expected))
    difference, ratio = mine - right, (mine / right)[right.abs() > 1e-12]
    if bool((mine.isnan() & ~right.isnan()).any()):
        yield "some are NaN, from 0/0, the log of a negative number or the variance of one number"
    elif len(ratio) and bool(close(mine, right * ratio[0]).all()):
        sign = " (the sign is wrong)" * bool(ratio[0] == -1)
        yield f"every number is {ratio[0]:.6g} times what it should be{sign}"
    elif bool(difference.isfinite().all() and close(difference, difference[:1]).all()):
        yield f"every number is {difference[0]:+.6g} off"
    off = [~close(a, b) for a, b, _ in pairs]
    for name in (n for n, x in pairs[0][2].items() if not isinstance(x, Tensor)):
        found = [(c[name], bool(o.any())) for o, (*_, c) in zip(off, pairs)]
        good = {value for value, _ in found} - {value for value, wrong in found if wrong}
        elsewhere = [wrong for value, wrong in found if value not in good]
        if good and sum(elsewhere) > len(elsewhere) / 2:
            yield f"it is right where {name} is {' or '.join(map(str, sorted(good)))}"
    masks = [(o, c["mask"]) for o, (*_, c) in zip(off, pairs) if "mask" in c]
    if not masks or masks[0][0].shape != masks[0][1].shape:
        return
    if not any(bool((o & m).any()) for o, m in masks):
        yield "it is right at every real position: only masked ones differ"
    elif not any(bool((o.any(1) & m.all(1)).any()) for o, m in masks):
        yield "it is right in rows without padding"
