"""Does the test suite notice a wrong line? `python benchmarks/planted_faults.py [--only NAME …]`

Thirty faults of one line, over all folders, of the kind that a reviewer could overlook: they stand
in `planted_faults.yaml`, chosen from the source before any of them was measured. Each is planted
alone in a copy of the checkout; then the tests that are likeliest to fail run, up to the first
failure, and where they pass, a wider set. At the end the tests that failed run once without a
fault: one that fails then has caught nothing.

    python benchmarks/planted_faults.py                     # this checkout: "after"
    python benchmarks/planted_faults.py --checkout FOLDER   # an older one, flat modules: "before"
    python benchmarks/planted_faults.py --list              # can every line still be found?

`results/planted_faults.json` holds what was measured, fault by fault. It may be stopped at any
time: called again, it goes on with the faults that are not in there (--again: all of them). Browser
tests and notebooks are left out. A quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import yaml

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "planted_faults.json"
ENVIRONMENT = {
    "PYTHONDONTWRITEBYTECODE": "1",  # an edit within a second must not meet older bytecode
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
UNSTEADY = "tests/stages/test_checkpoints.py::test_too_high_a_learning_rate_by_itself"
"""Fails on some CPUs, whatever was planted."""
LONGEST = 900
"""Seconds after which tests that do not end are given up."""


def copy_of(checkout: Path, folder: Path) -> Path:
    """A copy without what git, Python and trainings leave there."""
    ours = {".git", "build", "runs"}  # only at the top: the package has a folder `runs`
    left = shutil.ignore_patterns(".venv*", "__pycache__", ".*_cache", "*.egg-info")

    def ignored(at: str, names: list[str]) -> set[str]:
        return left(at, names) | (ours if Path(at) == checkout else set())

    return Path(shutil.copytree(checkout, folder / "checkout", ignore=ignored))


class Where(TypedDict):
    """A fault in one layout: its file, the tests that should see it, and a wider set."""

    file: str
    tests: list[str]
    wider: list[str]


@dataclass(frozen=True)
class Fault:
    """A row of `planted_faults.yaml`."""

    name: str
    kind: str
    change: dict[str, str]
    before: Where
    after: Where

    def where(self, layout: str) -> Where:
        return self.before if layout == "before" else self.after

    @property
    def folder(self) -> str:
        return self.after["file"].split("/")[0].removesuffix(".py")


FAULTS = [Fault(**row) for row in yaml.safe_load((HERE / "planted_faults.yaml").read_text("utf-8"))]


class NotFound(ValueError):
    """The text of a fault is not (or more than once) where it was."""


def plant(fault: Fault, package: Path, layout: str) -> tuple[Path, str]:
    """→ the file that holds a fault's text, and what it reads with the fault.

    Looked for in the file that is named, then in the whole package; line breaks do not matter.
    Raises NotFound.
    """
    named = package / fault.where(layout)["file"]
    everywhere = sorted(package.rglob("*.py"))
    for files in ([named] if named.is_file() else [], everywhere):
        for text, planted in fault.change.items():
            pattern = re.compile(r"\s+".join(map(re.escape, text.split(" "))))
            hits = [(p, m) for p in files for m in pattern.finditer(p.read_text("utf-8"))]
            if len(hits) == 1:
                file, hit = hits[0]
                source = file.read_text("utf-8")
                return file, source[: hit.start()] + planted + source[hit.end() :]
    raise NotFound(
        f"{fault.name!r}: none of {list(fault.change)} stands once in {package.name}/; it was "
        f"in {fault.where(layout)['file']}: bring planted_faults.yaml up to date"
    )


def find_tests(names: Sequence[str], copy: Path) -> list[str]:
    """Tests as pytest takes them; one that moved is found by its name, else its whole file runs."""
    found = []
    for name in names:
        path, _, test = name.partition("::")
        file = copy / "tests" / f"{path}.py"
        if test:
            files = [file] if file.is_file() else []
            files += sorted((copy / "tests").rglob("test_*.py"))
            at = next((p for p in files if f"def {test}(" in p.read_text("utf-8")), None)
            if at is not None:
                found.append(f"{at.relative_to(copy)}::{test}")
                continue
        if file.is_file():
            found.append(str(file.relative_to(copy)))
        if test or not file.is_file():
            print(f"  there is no {name}: bring planted_faults.yaml up to date", flush=True)
    return found


def run_tests(copy: Path, tests: Sequence[str], *options: str) -> tuple[list[str], str]:
    """Run tests. → the names of those that fail, and the output."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rfE", *options]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(copy)}
    try:
        done = subprocess.run(
            [*command, "--tb=line", "--deselect", UNSTEADY, *tests],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LONGEST,
        )
    except subprocess.TimeoutExpired:
        return [], f"no end within {LONGEST} s"
    if done.returncode == 0:
        return [], done.stdout
    failed = re.findall(
        r"^(?:FAILED|ERROR) (tests/\S+?\.py(?:::.+?)?)(?: - .*)?$", done.stdout, re.M
    )
    if not failed:
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return failed, done.stdout


def measure(fault: Fault, copy: Path, layout: str) -> dict[str, object]:
    """Plant one fault in the copy, test, take it out again. → what is recorded of it."""
    record: dict[str, object] = {"folder": fault.folder, "kind": fault.kind, "caught": False}
    try:
        file, faulty = plant(fault, copy / "rlhf_lab", layout)
    except NotFound as problem:
        return record | {"problem": str(problem)}
    start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    clean = file.read_text("utf-8")
    record["file"] = str(file.relative_to(copy))
    where = fault.where(layout)
    for names in (where["tests"], where["wider"]):
        tests = find_tests(names, copy)
        if not tests:
            continue
        file.write_text(faulty, encoding="utf-8")
        try:
            failed, output = run_tests(copy, tests, "-x")
        finally:
            file.write_text(clean, encoding="utf-8")
        if "no end within" in output:
            record["problem"] = f"{' '.join(tests)}: {output}"
        if failed:
            record |= {"caught": True, "by": failed[0], "wider": names is where["wider"]}
            break
    record["seconds"] = round(time.perf_counter() - start)
    record["cpu_seconds"] = round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - used)
    return record


def confirm(copy: Path, layout: str) -> None:
    """Run what has caught a fault without any fault: what fails then has caught nothing."""
    records = load(layout)
    open_ones = {
        name: str(found["by"])
        for name, found in records.items()
        if found["caught"] and "passes_without" not in found
    }
    if not open_ones:
        return
    print(f"{len(open_ones)} tests without a fault", flush=True)
    failed = run_tests(copy, list(dict.fromkeys(open_ones.values())))[0]
    for name, test in open_ones.items():
        if test in failed:
            problem = {"caught": False, "problem": f"{test} fails without the fault as well"}
            print(f"{name}: {problem['problem']}", flush=True)
            save(layout, name, records[name] | problem)
        else:
            save(layout, name, records[name] | {"passes_without": True})


def load(layout: str) -> dict[str, dict[str, object]]:
    """The records of one layout, by fault."""
    every = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {}
    records: dict[str, dict[str, object]] = every.get(layout, {}).get("faults", {})
    return records


def save(layout: str, name: str, found: dict[str, object]) -> None:
    """Write one fault's record at once, among the others of its layout."""
    every = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {}
    records = {**load(layout), name: found}
    records = {f.name: records[f.name] for f in FAULTS if f.name in records}
    missed = [name for name, found in records.items() if not found["caught"]]
    summary = f"{len(records) - len(missed)} of {len(records)} caught"
    summary += f"; not: {', '.join(missed)}" if missed else ""
    every[layout] = {"summary": summary, "faults": records}
    every["caught_before_and_not_now"] = [
        n
        for n, now in every.get("after", {}).get("faults", {}).items()
        if not now["caught"] and every.get("before", {}).get("faults", {}).get(n, now)["caught"]
    ]
    draft = RESULTS.with_suffix(".tmp")
    draft.write_text(json.dumps(every, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(RESULTS)


def list_places(faults: Sequence[Fault], checkout: Path, layout: str) -> int:
    """Print where each fault would be planted. → exit status: 1 where one is not found."""
    lost = 0
    for fault in faults:
        try:
            file, _ = plant(fault, checkout / "rlhf_lab", layout)
            print(f"{fault.name}: {file.relative_to(checkout)}")
        except NotFound as problem:
            print(problem)
            lost += 1
        where = fault.where(layout)
        find_tests([*where["tests"], *where["wider"]], checkout)
    print(f"{layout}: {len(faults) - lost} of {len(faults)} found")
    return int(lost > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description="Plant faults one by one; do the tests see them?")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[f.name for f in FAULTS])
    parser.add_argument("--checkout", type=Path, default=HERE.parent, help="whose [this one's]")
    parser.add_argument("--list", action="store_true", help="look for every line, and run nothing")
    parser.add_argument("--again", action="store_true", help="also those measured already")
    args = parser.parse_args()
    checkout = args.checkout.resolve()
    layout = "before" if (checkout / "rlhf_lab" / "stages").is_dir() else "after"
    wanted = [f for f in FAULTS if not args.only or f.name in args.only]
    if args.list:
        return list_places(wanted, checkout, layout)
    known = () if args.again else load(layout)
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of(checkout, Path(folder))
        for number, fault in enumerate(wanted, 1):
            if fault.name in known:
                continue
            print(f"[{number}/{len(wanted)}] {fault.name}: {fault.kind}", flush=True)
            found = measure(fault, copy, layout)
            outcome = f"caught by {found['by']}" if found["caught"] else "NOT CAUGHT"
            outcome = str(found.get("problem", outcome))
            print(f"  {outcome} ({found.get('seconds', 0)} s)", flush=True)
            save(layout, fault.name, found)
        confirm(copy, layout)
    records = load(layout)
    print(f"{layout}: {json.loads(RESULTS.read_text('utf-8'))[layout]['summary']}")
    return int(any("problem" in records[f.name] for f in wanted))


if __name__ == "__main__":
    sys.exit(main())
