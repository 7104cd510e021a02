"""The table of PPO's rules: `python .ci/rules.py [--check]` writes rlhf_lab/ppo/RULES.md.

Where a rule is kept is read off the code: the function that does it names it as "rule 9" or "rules
9 and 11". Its tests are those called `test_rule_09_…`. With --check nothing is written: exit status
1 means that the table is out of step, or that a rule has no function or no test.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator

from written_file import ROOT, write_or_check

PAGE = ROOT / "rlhf_lab" / "ppo" / "RULES.md"
RULES = (
    "Sampling uses the temperature only: neither top-k nor top-p.",
    "Policy and reference are scored at the sampling temperature.",
    "Before an iteration's first step the ratio is 1; before any update the KL is 0.",
    "No dropout in any of the four models.",
    "Prompts are padded on the left; positions are counted from the mask.",
    "Pad is not eos, and the last token is found under left padding too.",
    "A response ends after its first stop token, for the reward model too.",
    "A response that never stops loses a penalty, or gets a fixed score.",
    "The score lands on the last response token.",
    "A token's log-probability is read one position before it; masked alike in both models.",
    "The reward of a token is −β(log π − log π_ref); the score is added at the end.",
    "GAE runs over response tokens only; returns are made before whitening.",
    "Whitening is masked and over the whole batch; losses are token means of the whole minibatch.",
    "Policy and value loss are clipped.",
    "The value model starts as the reward model, or with a head of zeros.",
    "Demonstrations score 0 on average; scores may be normalised by the first rollout.",
    "Adam with ε = 1e-5, a rate that falls to 0, gradients clipped.",
    "β may adapt to a target KL.",
    "k1, k2 and k3 estimate KL(π‖π_ref), in that direction.",
    "Every statistic is masked, and averaged over what was really processed.",
    "Another engine's samples are weighted by min(π_train/π_rollout, C).",
    "Pairs that are too long or become identical are dropped and counted; score heads are saved.",
    "Policy and critic move, reference and reward model do not.",
    "No logits of a whole rollout are ever held.",
)
FIRST = ("ppo/trainer.py", "ppo/losses.py", "ppo/rollout.py", "ppo/layouts.py")
"""Where to look first; the trainer is where a reader begins."""
OTHERS = ("data/tokenize.py", "models/load.py", "models/tokenizer.py", "models/weights.py")
NAMED = re.compile(r"\brules? (\d{1,2}(?:(?:, then |, | and )\d{1,2})*)\b", re.IGNORECASE)


def functions(tree: ast.AST, name: str = "") -> Iterator[tuple[str, int, int]]:
    """(name, first line, last line) of every function, inner ones after those they are in."""
    for node in ast.iter_child_nodes(tree):
        inner = name
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            inner = f"{name}.{node.name}".strip(".")
            if isinstance(node, ast.FunctionDef):
                yield inner, node.lineno, node.end_lineno or node.lineno
        yield from functions(node, inner)


def places() -> dict[int, list[tuple[str, str]]]:
    """Rule -> (file in the package, function) of each place that names it, one of a file."""
    package = ROOT / "rlhf_lab"
    names = [str(p.relative_to(package)) for p in sorted(package.rglob("*.py"))]
    found: dict[int, list[tuple[str, str]]] = {n: [] for n in range(1, len(RULES) + 1)}
    for name in (*FIRST, *(n for n in names if n not in FIRST)):
        if not name.startswith(("ppo/", "trainers/")) and name not in OTHERS:
            continue
        source = (package / name).read_text("utf-8")
        known = list(functions(ast.parse(source)))
        for number, line in enumerate(source.splitlines(), 1):
            within = [f for f, first, last in known if first <= number <= last]
            for match in NAMED.finditer(line) if within else ():
                for rule in map(int, re.findall(r"\d+", match[1])):
                    if rule in found and name not in dict(found[rule]):
                        found[rule].append((name, within[-1]))
    return found


def tests() -> dict[int, list[tuple[str, str]]]:
    """Rule -> (file in tests/, name) of each of its tests."""
    found: dict[int, list[tuple[str, str]]] = {n: [] for n in range(1, len(RULES) + 1)}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for match in re.finditer(r"^def (test_rule_(\d\d)_\w+)", path.read_text("utf-8"), re.M):
            found[int(match[2])].append((str(path.relative_to(ROOT / "tests")), match[1]))
    return found


def page() -> str:
    """The table. Raises ValueError for a rule without a function or without a test."""
    lines = [
        "# The rules of PPO, and where they are kept",
        "",
        "Each has a test that fails when the rule is broken. Most are Huang et al., *The N+",
        "Implementation Details of RLHF with PPO* ([2403.17031](https://arxiv.org/abs/2403.17031)).",
        "Written by `python .ci/rules.py`.",
        "",
        "| | rule | where | test |",
        "| ---: | --- | --- | --- |",
    ]
    where, tested = places(), tests()
    for number, rule in enumerate(RULES, 1):
        if not where[number] or not tested[number]:
            raise ValueError(f"rule {number} has no {'test' if where[number] else 'function'}")
        at = ", ".join(f"[`{n}::{f}`]({_up(n)})" for n, f in where[number][:2])
        by = ", ".join(f"[`{f}`](../../tests/{n})" for n, f in tested[number][:2])
        lines.append(f"| {number} | {rule} | {at} | {by} |")
    return "\n".join(lines) + "\n"


def _up(name: str) -> str:
    return name.removeprefix("ppo/") if name.startswith("ppo/") else f"../{name}"


if __name__ == "__main__":
    sys.exit(write_or_check({PAGE: page()}))
