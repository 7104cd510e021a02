"""Mistakes that nobody thought of: made by machine in the solutions' syntax trees. Each is located:
the quantity and the place that are wrong, or the line that raises, or it happens to be a known one.

pytest tests/exercises/test_mutations.py
"""

from __future__ import annotations

import ast
import copy
import linecache
import random
import re
from functools import partial

import pytest

import rlhf_lab as lab
from rlhf_lab.exercises.book import EXERCISES
from rlhf_lab.exercises.compare import Fault, close, outputs

SEED = 20
WANTED, LOCATED = 40, 32
SWAPS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
}


def variants(node):
    """What may stand in a node's place."""
    if isinstance(node, ast.BinOp):
        yield node.left  # a factor, a term or a mask is dropped
        if swap := SWAPS.get(type(node.op)):
            yield ast.BinOp(node.left, swap(), node.right)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield node.operand
    elif isinstance(node, ast.Compare) and (swap := SWAPS.get(type(node.ops[0]))):
        yield ast.Compare(node.left, [swap()], node.comparators)
    elif isinstance(node, ast.Slice):  # off by one
        for name in ("lower", "upper"):
            if bound := getattr(node, name):
                moved = ast.BinOp(bound, ast.Add(), ast.Constant(1))
                yield ast.Slice(**{"lower": node.lower, "upper": node.upper, name: moved})
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in ("clamp", "exp", "abs", "detach"):
            yield node.func.value


def body_of(exercise):
    """The syntax tree of a solution, without its docstring."""
    tree = ast.parse("".join(exercise.source))
    del tree.body[0].body[0]
    return tree


def all_mutations():
    """(exercise, number of the node, number of the variant), of all there are."""
    for name, exercise in EXERCISES.items():
        for place, node in enumerate(ast.walk(body_of(exercise))):
            yield from ((name, place, which) for which, _ in enumerate(variants(node)))


class Put(ast.NodeTransformer):
    def __init__(self, old, new):
        self.old, self.new = old, new

    def visit(self, node):
        return self.new if node is self.old else super().generic_visit(node)


def mutant(name, place, which):
    """The mutated function, with a source that tracebacks find; and the source."""
    exercise = EXERCISES[name]
    tree = body_of(exercise)
    node = list(ast.walk(tree))[place]
    new = copy.deepcopy(list(variants(node))[which])
    code = ast.unparse(ast.fix_missing_locations(Put(node, new).visit(tree)))
    source = f"from __future__ import annotations\n{code}"
    file = f"<{name} {place} {which}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    space = dict(exercise.function.__globals__)
    exec(compile(source, file, "exec"), space)
    return partial(space[exercise.function.__name__], **exercise.fixed), source


def wrong_in(exercise, function):
    """In the first case that shows a difference: names of the quantities that differ; None where
    there is no such case, "raises" where the function breaks off."""
    for case in exercise.cases:
        try:
            got = outputs(exercise, function, case)
        except Fault:
            return "raises"
        right = outputs(exercise, exercise.variant(), case)
        names = [*exercise.results, *(["gradient"] * len(exercise.gradient))]
        if bad := {
            n for n, a, b in zip(names, got, right) if a.shape != b.shape or not close(a, b).all()
        }:
            return bad
    return None


@pytest.fixture(scope="module")
def mutants():
    """The first ones of a seeded order that change what is returned."""
    order = list(all_mutations())
    random.Random(SEED).shuffle(order)
    assert len(order) > 3 * WANTED
    found = []
    for mutation in order:
        function, source = mutant(*mutation)
        if (wrong := wrong_in(EXERCISES[mutation[0]], function)) is not None:
            found.append((mutation[0], function, source, wrong))
        if len(found) == WANTED:
            break
    return found


def located(name, text, wrong):
    """Whether a message says which quantity is wrong, and where, and rightly so."""
    if all(part in EXERCISES[name].mistakes for part in text.split("; and ")):
        return True
    if wrong == "raises":
        return bool(re.search(r"line \d+ of \w+: `.+`", text)) or "no gradient flows" in text
    found = re.match(
        r"(?:the )?(\w+)[\w ]* (differs first at row \d|differs: |has the shape)", text
    )
    return bool(found) and found[1] in wrong


def test_mutations_are_located(mutants):
    assert len(mutants) == WANTED and len({name for name, *_ in mutants}) >= 12
    missed = []
    for name, function, source, wrong in mutants:
        found = lab.check(name, function)
        assert not found, source
        text = repr(found).splitlines()[0].removeprefix(f"✗ {name}: ")
        if not located(name, text, wrong):
            missed.append(f"{text}\n{source}")
    print(f"{WANTED - len(missed)} of {WANTED} mutations are located")
    assert WANTED - len(missed) >= LOCATED, "\n\n".join(missed)
