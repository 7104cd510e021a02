"""Arguments to try a function on: drawn from a seed, as their names say.

b rows of t positions, from ordinary ones to a row of one token and a mask without any; numbers such
as γ and β go through values (`numbers` in `exercises.yaml`) of which 1 hides a mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Generator, Tensor

from ..stages import read_table

Arguments: TypeAlias = dict[str, Any]
Draw: TypeAlias = Callable[[Generator, int, int, int], object]
"""(generator, number of the case, b, t) → an argument"""

TABLE = read_table(__file__, "exercises.yaml")
SHAPES = ((2, 3), (3, 5), (1, 1), (4, 4), (2, 1), (3, 7))
CASES = 12
VOCABULARY = 7


def _normal(*sizes: int, g: Generator) -> Tensor:
    return torch.randn(sizes, generator=g, dtype=torch.float64)


def _response_mask(g: Generator, case: int, b: int, t: int) -> Tensor:
    """True up to a row's length: one row is full, one empty in some cases, the rest in between."""
    lengths = torch.randint(1, t + 1, (b,), generator=g)
    lengths[0] = t
    lengths[-1] *= case % 6 != 5
    return torch.arange(t) < lengths.unsqueeze(1)


def _any_mask(g: Generator, case: int, b: int, t: int) -> Tensor:
    """A mask with holes; in one case nothing is real."""
    return (torch.rand(b, t, generator=g) > 0.35) & (case != 4)


def _groups(g: Generator, case: int, b: int, t: int) -> Tensor:
    """Scores of b prompts' responses, two at least; in some cases those to a prompt are equal."""
    scores = _normal(b, t + 1, g=g)
    scores[0] *= case % 3 != 1
    return scores


def _number(values: list[object]) -> Draw:
    return lambda g, case, b, t: values[case % len(values)]


DRAWS: dict[str, Draw] = {
    **{name: lambda g, case, b, t: _normal(b, t, g=g) for name in TABLE["by_token"]},
    **{name: lambda g, case, b, t: _normal(b, g=g) for name in TABLE["by_row"]},
    **{name: _number(values) for name, values in TABLE["numbers"].items()},
    "mask": _any_mask,
    "completion_mask": _any_mask,
    "response_mask": _response_mask,
    "group_scores": _groups,
    "curve": lambda g, case, b, t: _normal(b + t, g=g),
    "logits": lambda g, case, b, t: 2 * _normal(b, t, VOCABULARY, g=g),
    "tokens": lambda g, case, b, t: torch.randint(VOCABULARY, (b, t), generator=g),
    "desirable": lambda g, case, b, t: torch.rand(b, generator=g) > 0.5,
    "lengths": lambda g, case, b, t: torch.randint(1, 40, (b * t + 1,), generator=g),
    "p_first": lambda g, case, b, t: torch.rand(b, generator=g, dtype=torch.float64),
    "whole": lambda g, case, b, t: torch.randint(3, (b + 3,), generator=g).double(),
}
"""How an argument of each name is drawn; floats are fp64."""


def draw_cases(arguments: Mapping[str, str]) -> list[Arguments]:
    """`CASES` times the arguments, the same ones every time. arguments: name → name in `DRAWS`."""
    cases = []
    for case in range(CASES):
        g, (b, t) = torch.Generator().manual_seed(1_000 + case), SHAPES[case % len(SHAPES)]
        cases.append({name: DRAWS[how](g, case, b, t) for name, how in arguments.items()})
    return cases


def described(case: Arguments) -> str:
    """Shapes of tensors, and the other arguments: `rewards (2, 3), gamma=0.9`."""
    shapes = {n: f" {tuple(x.shape)}" for n, x in case.items() if isinstance(x, Tensor)}
    return ", ".join(f"{name}{shapes.get(name, f'={x}')}" for name, x in case.items())


def written(case: Arguments) -> str:
    """The numbers themselves, of tensors with three decimals."""

    def number(x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        return (x.mul(1e3).round().div(1e3) + 0 if x.is_floating_point() else x.int()).tolist()

    return ", ".join(f"{name}={number(x)}" for name, x in case.items())
