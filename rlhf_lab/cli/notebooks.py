"""`rlhf-lab notebooks DIR`: the course in a folder of one's own. `test-notebooks DIR` runs it."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from ..runs.run import notebooks_folder
from .cost import Commands, positive

NBGRADER_CONFIG = """\
# nbgrader's settings for this folder; `nbgrader --help-all` lists all of them.
c = get_config()
c.CourseDirectory.course_id = "rlhf_lab"
c.Execute.timeout = 600  # seconds for a cell, in which a model may be trained
"""


def add_commands(commands: Commands) -> None:
    """Add the commands to the parser's."""
    copy = commands.add_parser(
        "notebooks",
        help="copy the course's notebooks into a folder",
        description="Copy the course's notebooks, and the pictures and stored runs that they show.",
    )
    copy.add_argument("folder", type=Path, help="where they go; it may be there already")
    forms = "students: without outputs; nbgrader: a course folder in which exercises are graded"
    copy.add_argument("--for", dest="form", choices=["students", "nbgrader"], help=forms)
    copy.add_argument("--overwrite", action="store_true", help="replace notebooks that are there")
    test = commands.add_parser(
        "test-notebooks",
        help="run the notebooks of a folder and compare what they print",
        description="Run the notebooks of a folder. Cells tagged nbval-check-output have to give "
        "what is stored, times and addresses aside; the others have to run.",
    )
    test.add_argument("folder", type=Path, nargs="?", default=Path(), help="their folder [.]")
    test.add_argument("--workers", type=positive, default=1, help="how many run at once [1]")


def _needs(package: str, what: str) -> None:
    if not find_spec(package):
        raise ValueError(f"{what} needs {package}: pip install 'rlhf-lab[teach]'")


def run_notebooks(args: argparse.Namespace) -> int:
    """Copy them; nothing of the reader's is replaced without being asked."""
    source, target, graded = notebooks_folder(), args.folder.expanduser(), args.form == "nbgrader"
    if graded:
        _needs("nbgrader", "--for nbgrader")
    notebooks = sorted(source.glob("[0-9]*.ipynb"))
    copies = [(target / "source" / n.stem if graded else target) / n.name for n in notebooks]
    there = [n.name for n in copies if n.exists()]
    if there and not args.overwrite:
        raise ValueError(f"{target} has {', '.join(there)}: another folder, or --overwrite")
    for notebook, copy in zip(notebooks, copies):
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(_text(notebook, args.form), encoding="utf-8")
    for folder in {copy.parent for copy in copies}:
        for shown in ("images",) if graded else ("images", "course_runs"):
            shutil.copytree(source / shown, folder / shown, dirs_exist_ok=True)
    print(f"{len(notebooks)} notebooks in {target}; open them with: jupyter lab {target}")
    if graded:
        if args.overwrite or not (target / "nbgrader_config.py").exists():
            (target / "nbgrader_config.py").write_text(NBGRADER_CONFIG, encoding="utf-8")
        print(f"for students, in {target}: nbgrader generate_assignment {notebooks[0].stem}")
    return 0


def _text(notebook: Path, form: str | None) -> str:
    """A notebook's text in a form of `exercises.classroom`; as it is where there is none."""
    text = notebook.read_text(encoding="utf-8")
    if form:
        from ..exercises.classroom import in_form

        whole = json.loads(text)
        whole["cells"] = [new for cell in whole["cells"] for new in in_form(cell, form)]
        text = json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
    if form == "nbgrader":  # there each notebook has a folder of its own
        text = re.sub(r"\]\((\w+)\.ipynb", r"](../\1/\1.ipynb", text)
    return text


def run_test_notebooks(args: argparse.Namespace) -> int:
    """Run a folder's notebooks, with a line for each; → 1 where one does not pass."""
    _needs("nbval", "test-notebooks")
    folder = args.folder.expanduser()
    names = sorted(p.relative_to(folder) for p in folder.rglob("*.ipynb"))
    names = [n for n in names if not any(part.startswith(".") for part in n.parts)]
    if not names:
        raise ValueError(f"no notebooks in {folder}: rlhf-lab notebooks {folder} copies the course")
    failed = 0
    with ThreadPoolExecutor(args.workers) as pool:
        test = partial(_test, workers=args.workers)
        for name, (passed, says) in zip(names, pool.map(test, map(folder.joinpath, names))):
            print(f"{'passed' if passed else 'FAILED'}  {name}: {says}", flush=True)
            failed += not passed
    print(f"{len(names) - failed} of {len(names)} notebooks passed")
    return int(failed > 0)


def _test(notebook: Path, workers: int) -> tuple[bool, str]:
    """Run one with nbval → whether it passed; what was compared, or else what went wrong."""
    options = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=600"]
    options += [f"--nbval-sanitize-with={notebooks_folder() / 'sanitize.cfg'}", "-q", "--color=no"]
    # Without the settings that a project around the folder has for tests of its own.
    options += ["-c", os.devnull, f"--rootdir={notebook.parent}", "--noconftest"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, str(notebook)]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
    done = subprocess.run(command, capture_output=True, text=True, env=threads | dict(os.environ))
    printed = f"\n{done.stdout}{done.stderr}".rstrip()
    ran = printed.rpartition("\n")[2]
    if done.returncode not in (0, 5):  # 5: there is no code in it
        return False, ran + printed.replace("\n", "\n    ")
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    marked = [c for c in cells if "nbval-check-output" in c["metadata"].get("tags", [])]
    stored = sum(bool(cell["outputs"]) for cell in marked)
    return True, f"{ran}; outputs of {stored} of {len(marked)} marked cells compared"


RUN = {"notebooks": run_notebooks, "test-notebooks": run_test_notebooks}
