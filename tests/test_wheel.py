"""The wheel is whole: installed somewhere else, it trains from the checkpoints that it carries.

Builds the sdist and, from it, the wheel; installs that into an empty folder; trains two steps of
each stage outside the repository. Needs no network.

Run: pytest tests/test_wheel.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Runs `python -m rlhf_lab.cli …`, and writes down where the package and its checkpoints came from.
WITNESS = """
import atexit, json, os, runpy, sys
opened = set()
def note(event, args):
    if event == "open" and isinstance(args[0], str) and "small_models" in args[0]:
        opened.add(os.path.realpath(args[0]))
sys.addaudithook(note)
import rlhf_lab
from rlhf_lab import pipeline
from rlhf_lab.data import load
from rlhf_lab.trainers import prepare
# Two steps of few rows; what the x-ray finds is the same wherever the package lies.
load.STORY_ROWS.update(sft=256, preferences=256, prompts=512, test=32, test_pairs=32)
prepare.HELD_OUT = 16
pipeline._simulate = lambda *_: None
seen = lambda: {"package": os.path.realpath(rlhf_lab.__file__), "opened": sorted(opened)}
atexit.register(lambda: json.dump(seen(), open(os.environ["WITNESS"], "w")))
runpy.run_module("rlhf_lab.cli", run_name="__main__", alter_sys=True)
"""


def check_call(command: list[str], **kwargs) -> None:
    done = subprocess.run(command, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)]
    check_call([*build, str(ROOT)])
    return folder


def test_sdist_carries_tests_notebooks_benchmarks_and_docs(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [name.split("/", 1)[1] for name in archive.getnames() if "/" in name]
    folders = {name.split("/")[0] for name in names}
    assert {"rlhf_lab", "small_models", "tests", "notebooks", "benchmarks", "docs"} <= folders
    assert {"pyproject.toml", "constraints.txt", "Makefile", "LICENSE", "README.md"} <= folders
    assert {"CONTRIBUTING.md", "AGENTS.md", "CITATION.cff", "SECURITY.md"} <= folders
    assert not {".venv", "runs", ".git"} & folders
    assert not [name for name in names if name.startswith(("docs/reference", "docs/notebooks"))]


def test_wheel_carries_the_models_and_every_module(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {n.split("/")[0] for n in names} == {
        "rlhf_lab",
        next(n for n in names if ".dist-info" in n).split("/")[0],
    }
    modules = {str(p.relative_to(ROOT).as_posix()) for p in (ROOT / "rlhf_lab").rglob("*.py")}
    assert modules <= names
    assert any(n.startswith("rlhf_lab/small_models/") and n.endswith(".safetensors") for n in names)
    course = {f"rlhf_lab/notebooks/{p.name}" for p in (ROOT / "notebooks").glob("*.ipynb")}
    assert course and course <= names and "rlhf_lab/notebooks/images/ppo.svg" in names
    assert not [n for n in names if "/runs/" in n and "notebooks" in n or ".ipynb_checkpoints" in n]
    assert {
        "rlhf_lab/notebooks/course_runs/ppo/run.json",
        "rlhf_lab/notebooks/sanitize.cfg",
    } <= names


@pytest.mark.slow
def test_the_installed_wheel_trains_outside_the_repository(dist: Path, tmp_path: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    target, out, witness = tmp_path / "site", tmp_path / "run", tmp_path / "witness.json"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    check_call([*pip, "--no-deps", "--no-index", "--target", str(target), str(wheel)])

    # PYTHONPATH comes before site-packages, so before an editable install of the repository.
    env = {**os.environ, "PYTHONPATH": str(target), "WITNESS": str(witness), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WITNESS, "train", "all", "--steps", "2", "--out", str(out)]
    check_call(command, cwd=tmp_path, env=env)

    for stage in ("sft", "reward", "ppo", "dpo"):
        record = json.loads((out / stage / "run.json").read_text("utf-8"))
        assert record["status"] == "finished"
    assert (out / "report.html").is_file()

    copy = [sys.executable, "-m", "rlhf_lab.cli", "notebooks", "course"]
    check_call(copy, cwd=tmp_path, env=env)
    copied = {p.name for p in (tmp_path / "course").glob("*.ipynb")}
    assert copied == {p.name for p in (ROOT / "notebooks").glob("*.ipynb")}

    seen = json.loads(witness.read_text("utf-8"))
    inside = os.path.realpath(target / "rlhf_lab")
    assert os.path.dirname(seen["package"]) == inside
    assert seen["opened"], "no file of small_models was opened"
    assert all(name.startswith(inside) for name in seen["opened"]), seen["opened"]
