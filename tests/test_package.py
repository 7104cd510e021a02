"""Rules of the whole repository: who may import whom, sizes, versions, hygiene.

Run: pytest tests/test_package.py
"""

from __future__ import annotations

import graphlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest
from importlinter.cli import lint_imports

import rlhf_lab

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rlhf_lab"
FILES = sorted(p for p in PACKAGE.rglob("*.py") if "small_models" not in p.parts)
LONGEST = 450  # lines; a longer file is two files
HEAVY = {"torch", "transformers", "pandas", "trl", "peft", "accelerate", "datasets", "plotly"}


# ------------------------------------------------------------------------------- who imports whom

PROGRAM = "import sys; from importlinter.cli import lint_imports_command as run; run()"
BROKEN = {
    # module that imports: what it may not import
    "rlhf_lab.simulate.xray": "rlhf_lab.widgets.live",
    "rlhf_lab.simulate.step": "rlhf_lab.cost.estimate",
    "rlhf_lab.cost.estimate": "torch",
    "rlhf_lab.cost.memory": "transformers",
    "rlhf_lab.cost.layers": "rlhf_lab.metering.meter",
    "rlhf_lab.ppo.trainer": "rlhf_lab.cost.estimate",
    "rlhf_lab.ppo.rollout": "rlhf_lab.widgets.live",
    "rlhf_lab.trainers.evaluate": "rlhf_lab.training",
    "rlhf_lab.widgets.live": "rlhf_lab.ppo.trainer",
    "rlhf_lab.widgets.dashboard": "trl",
    "rlhf_lab.world.generator": "rlhf_lab.trainers.kto",
    "rlhf_lab.runs.run": "rlhf_lab.charts.chart",
    "rlhf_lab.planning": "rlhf_lab.cli.main",
    "rlhf_lab.cli.main": "rlhf_lab.trainers.kto",
    "rlhf_lab.stages": "rlhf_lab.display",
}
KEPT = {
    "rlhf_lab.simulate.models": "torch",
    "rlhf_lab.cost.phases": "rlhf_lab.cost.memory",
    "rlhf_lab.ppo.losses": "rlhf_lab.metering.meter",
    "rlhf_lab.ppo.rewards": "rlhf_lab.runs.run",
    "rlhf_lab.charts.samples": "rlhf_lab.runs.run",
    "rlhf_lab.runs.ledger": "pandas",
    "rlhf_lab.studies": "rlhf_lab.trainers.kto",
    "rlhf_lab.cli.cost": "rlhf_lab.runs.run",
}


def test_imports_keep_the_contracts() -> None:
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


def test_a_broken_contract_is_noticed_and_a_kept_one_is_not(tmp_path: Path) -> None:
    """A copy of the package in which modules import what they may, and what they may not."""
    shutil.copytree(PACKAGE, tmp_path / "rlhf_lab", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for module, imported in [*BROKEN.items(), *KEPT.items()]:
        path = tmp_path / (module.replace(".", "/") + ".py")
        assert path.is_file(), f"{module} has moved: name its new place here"
        with path.open("a", encoding="utf-8") as file:
            file.write(f"\n\ndef planted():\n    import {imported}\n")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--no-cache"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "300"},
    )
    assert done.returncode == 1, done.stdout + done.stderr
    for module, imported in BROKEN.items():
        assert re.search(rf"\b{module} -> {imported} \(l\.", done.stdout), (module, imported)
    for module, imported in KEPT.items():
        assert f"{module} -> {imported} (l." not in done.stdout, (module, imported)


def test_no_two_files_import_each_other_however_late() -> None:
    graph = grimp.build_graph("rlhf_lab", exclude_type_checking_imports=True, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) > 80
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


LIGHT = ("cli.main", "cli.cost", "cost", "data", "display", "models", "notebook", "pipeline")
LIGHT += ("planning", "runs", "stages", "studies", "training", "world")


def test_heavy_libraries_are_imported_late() -> None:
    """Importing the lab, and what stands below the trainers, imports none of them."""
    modules = ["rlhf_lab"]
    for name in LIGHT:
        folder = PACKAGE / name
        stems = sorted(p.stem for p in folder.glob("*.py")) if folder.is_dir() else []
        modules += [f"rlhf_lab.{name}", *(f"rlhf_lab.{name}.{s}" for s in stems if s[0] != "_")]
    code = (
        "import importlib, sys\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(name)\n"
        f"    print(name, *{{m.split('.')[0] for m in sys.modules}} & {HEAVY})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    loaded = dict(line.partition(" ")[::2] for line in done.stdout.splitlines())
    assert loaded.keys() == set(modules) and "rlhf_lab.planning" in loaded
    assert not any(loaded.values()), next((k, v) for k, v in loaded.items() if v)


def test_the_version_is_stated_once() -> None:
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
