"""The house's rules that no single module can hold: who may import whom, sizes, versions, hygiene.

Run: pytest tests/test_package.py
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import rlhf_lab

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rlhf_lab"
FILES = sorted(p for p in PACKAGE.rglob("*.py") if "small_models" not in p.parts)
LONGEST = 450  # lines; a longer file is two files
HEAVY = {"torch", "transformers", "pandas", "trl", "peft", "accelerate", "datasets", "plotly"}

# What stands where. A new top-level module gets its place here, so that it is a decision.
GROUND = {
    "world",
    "gold",
    "corpus",
    "models",
    "quantised",
    "data",
    "files",
    "shapes",
    "tokens",
    "lengths",
    "ledger",
    "runs",
    "annotations",
}
WINGS = {"stages", "cost", "widgets", "scale", "exercises"}
ROOF = {
    "lab",
    "training",
    "course",
    "doctor",
    "cli",
    "cli_cost",
    "budget",
    "baseline",
    "sources",
    "simulation",
    "rehearsal_models",
    "prepare",
    "stand_ins",
    "studio",
    "background",
}
COST_TORCH = {
    *("xray", "fake", "meter", "callback", "account", "flop_counter", "watched", "patch"),
    "calibrate",
}
COST_PURE = {
    *("architecture", "hardware", "setup", "tape", "layers", "heads", "memory", "states", "phases"),
    *("seconds", "plan", "remedies", "launch", "online"),
}


class Import(NamedTuple):
    """`name` is absolute and dotted; `late` means inside a function, so not paid at import."""

    name: str
    line: int
    late: bool

    @property
    def top(self) -> str:
        return self.name.split(".")[0]


def imports(source: str, module: str, is_package: bool = False) -> Iterator[Import]:
    """Every import in `source`, the text of `module`; type-checking-only imports cost nothing."""
    package = module.split(".") if is_package else module.split(".")[:-1]

    def walk(node: ast.AST, late: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        late = late or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, late)
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            parts = parts + (node.module.split(".") if node.module else [])
            for alias in node.names:  # a.b.C: whether C is a module or a name, its place is known
                yield Import(".".join([*parts, alias.name]), node.lineno, late)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, late)

    yield from walk(ast.parse(source), False)


def complaint(place: tuple[str, ...], item: Import) -> str | None:
    """Why the module at `place` (("cost", "plan"), say) may not have this import, or None."""
    here, target = place[0], item.name.split(".")
    if here in WINGS and item.top == "trl" and here != "stages":
        return "only stages/ knows the trainers of trl"
    if here == "cost" and place[1:2] and place[1] in COST_PURE:
        if item.top in HEAVY:
            return "the pure files of cost/ open anywhere, at once"
        if target[:2] == ["rlhf_lab", "cost"] and set(target[2:3]) & COST_TORCH:
            return "the pure files of cost/ know nothing of the ones that need torch"
    if here in GROUND | {"__init__"} and item.top in HEAVY and not item.late:
        return "the ground floor loads heavy libraries late, in the function that needs them"
    if target[0] != "rlhf_lab" or len(target) < 2:
        return None
    there = target[1]
    if there == "cli" or (there in ROOF and here not in ROOF | {"__init__"}):
        return "nobody imports the roof, and nothing at all the command line"
    if here in GROUND:
        if there in WINGS and not (there == "widgets" and item.late):
            return "the ground floor knows no wing (it may show itself with widgets/, late)"
    elif here == "stages":
        metering = target[1:2] == ["cost"] and target[2] in ("meter", "callback", "patch")
        allowed = there in GROUND | {"stages"} or metering
        if not allowed and there in WINGS:
            return "stages/ may use the ground floor, cost.meter, cost.callback and cost.patch"
    elif here == "cost" and there in WINGS - {"cost"}:
        return "cost/ is given the step to run: it imports no other wing"
    elif here == "widgets" and there in WINGS - {"widgets", "cost"}:
        return "widgets/ read plans, ledgers and runs, never trainers"
    elif here == "cli" and there in WINGS - {"widgets"}:
        return "the command line calls the roof and computes nothing of its own"
    return None


def place_of(path: Path) -> tuple[str, ...]:
    return path.relative_to(PACKAGE).with_suffix("").parts


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_what_its_place_allows(path: Path) -> None:
    place = place_of(path)
    known = GROUND | WINGS | ROOF | {"__init__"}
    assert place[0] in known, f"{path.name} has no place: add it to GROUND, WINGS or ROOF above"
    module = ".".join(("rlhf_lab", *(p for p in place if p != "__init__")))
    found = [
        f"{path.relative_to(ROOT)}:{item.line} imports {item.name}: {reason}"
        for item in imports(path.read_text("utf-8"), module, place[-1] == "__init__")
        if (reason := complaint(place, item))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("cost.xray", "from ..stages import ppo"),
        ("cost.xray", "from rlhf_lab.charts.chart import Chart"),
        ("cost.plan", "import torch"),
        ("cost.plan", "def f():\n    from transformers import AutoConfig"),
        ("cost.plan", "from .meter import Meter"),
        ("stages.ppo", "from rlhf_lab.cost.estimate import plan"),
        ("stages.ppo", "from ..widgets import live"),
        ("stages.ppo", "from .. import lab"),
        ("widgets.live", "from rlhf_lab.ppo.trainer import PPOTrainer"),
        ("widgets.live", "def f():\n    import trl"),
        ("ledger", "import pandas"),
        ("world", "from .stages import sft"),
        ("runs", "from rlhf_lab.display import table"),
        ("lab", "from .cli import main"),
        ("cli", "from .stages.sft import train"),
    ],
)
def test_a_broken_rule_is_noticed(place: str, line: str) -> None:
    found = [complaint(tuple(place.split(".")), i) for i in imports(line, f"rlhf_lab.{place}")]
    assert any(found), f"{line!r} in {place} went unnoticed"


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("cost.xray", "import torch"),
        ("cost.plan", "from .memory import states"),
        ("stages.ppo", "from rlhf_lab.metering.meter import Meter"),
        ("stages.ppo", "from ..runs import Run\nfrom .maths import gae"),
        ("widgets.live", "from rlhf_lab.runs.run import Run"),
        ("ledger", "def frame():\n    import pandas"),
        ("lab", "from .stages import ppo\nfrom .cost import plan\nfrom .widgets import live"),
        ("cli", "from . import lab\nfrom .runs import Run"),
    ],
)
def test_a_kept_rule_is_left_alone(place: str, line: str) -> None:
    for item in imports(line, f"rlhf_lab.{place}"):
        assert complaint(tuple(place.split(".")), item) is None


def test_import_rlhf_lab_loads_nothing_heavy() -> None:
    code = "import sys, rlhf_lab; print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "rlhf_lab" in loaded
    assert not loaded & HEAVY


def test_version_is_said_once() -> None:
    stated = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.M)
    assert stated and stated[1] == rlhf_lab.__version__
    assert f"## [{rlhf_lab.__version__}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_is_short_enough_to_read(path: Path) -> None:
    lines = len(path.read_text("utf-8").splitlines())
    assert lines <= LONGEST, f"{path.relative_to(ROOT)} has {lines} lines, more than {LONGEST}"


# --- nothing of the machine that wrote it ------------------------------------------------------

# Written in pieces, so that this file does not find itself.
REGISTRIES = re.compile(
    "|".join(
        re.escape(host)
        for host in (
            "py" + "pi.org",
            "python" + "hosted.org",
            "registry.npm" + "js",
            "conda." + "io",
        )
    )
)
MACHINE = re.compile(r"(?<![\w.~$}])/(?:work|root|opt|home/\w+|Users/\w+)/[\w.-]")


def project_files() -> list[Path]:
    """Tracked and about-to-be-tracked files; in an unpacked sdist, which has no git, every file."""
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return [p for name in done.stdout.split("\0") if name and (p := ROOT / name).is_file()]
    hidden = (".venv", "runs", "__pycache__")
    return [p for p in ROOT.rglob("*") if p.is_file() and not set(p.parts) & set(hidden)]


def text_of(path: Path) -> str:
    """A file's text; "" for a picture or weights."""
    raw = path.read_bytes()
    return "" if b"\0" in raw[:8192] else raw.decode("utf-8", errors="replace")


def test_no_registry_host_and_no_path_of_a_machine() -> None:
    files = project_files()
    assert PACKAGE / "__init__.py" in files
    found = [
        f"{path.relative_to(ROOT)}:{number}: {hit[0]}"
        for path in files
        for number, line in enumerate(text_of(path).splitlines(), 1)
        for hit in (REGISTRIES.search(line), MACHINE.search(line))
        if hit
    ]
    assert not found, "\n".join(found)


def test_the_patterns_find_what_they_are_for() -> None:
    assert REGISTRIES.search("https://py" + "pi.org/simple")
    assert MACHINE.search('open("/' + 'work/main/x")') and MACHINE.search("/" + "home/ada/x")
    assert not MACHINE.search("https://example.org/" + "home/page") and not MACHINE.search(
        "a/root/b"
    )
