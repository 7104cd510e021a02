"""The course's notebooks for a class, cell by cell: for students, or for nbgrader to grade."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping
from textwrap import indent
from typing import Any, TypeAlias

from .book import find

Cell: TypeAlias = Mapping[str, Any]
"""A cell as a notebook's JSON has it."""

EXERCISE = re.compile(r'(def (my_\w+)\(.*\):)\n    \.\.\.(?:  #.*)?\n+(lab\.check\("(\w+)", \2\))')
"""An exercise's cell: an empty function, and its check."""


def solved(name: str) -> str:
    """The body of a function that solves an exercise: the library's source, and a call of it."""
    x = find(name)
    source = inspect.getsource(x.function)
    names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    imports = ", ".join(sorted(names & x.function.__globals__.keys()))
    header = f"from {x.function.__module__} import {imports}\n\n" if imports else ""
    given = [*(f"{n}={n}" for n in x.arguments), *(f"{n}={v!r}" for n, v in x.fixed.items())]
    call = f"return {x.function.__name__}({', '.join(given)})"
    return indent(f"{header}{source}\n{call}", "    ")


def in_form(cell: Cell, form: str) -> list[Cell]:
    """What stands instead of a cell. "students": the same without what was printed, which would
    answer questions before they are asked. "nbgrader": for an exercise a solution, which nbgrader
    takes out of the students' version, and a check whose result are the points. The check raises
    nothing, so that Run All goes on; what it prints is in the feedback."""
    if cell["cell_type"] != "code":
        return [cell]
    blank = {**cell, "execution_count": None, "outputs": []}
    if form == "students":
        return [blank]
    if not (found := EXERCISE.fullmatch("".join(cell["source"]))):
        return [cell]
    head, _, check, name = found.groups()
    points = find(name).points
    solution = f"{head}\n    ### BEGIN SOLUTION\n{solved(name)}\n    ### END SOLUTION"
    graded = f"checked = {check}\ndisplay(checked)\n{points} * checked.passed  # points"
    what = {"schema_version": 3, "grade": False, "solution": False, "locked": False, "task": False}
    own = what | {"grade_id": name, "solution": True}
    test = what | {"grade_id": f"{name}-check", "grade": True, "locked": True, "points": points}
    return [
        {**blank, "source": solution, "metadata": {"nbgrader": own}},
        {**blank, "id": f"{cell['id']}-check", "source": graded, "metadata": {"nbgrader": test}},
    ]
