"""Notebooks in a browser against CPython: the plans of every cell, to the last digit.

    make lite && python benchmarks/lite.py        # writes results/lite.json

Each notebook of `make lite` is run in JupyterLite by headless Chromium, served from a sub-path on
loopback, and once more by this Python. A cell computes a plan where it makes an estimate; both
write down each cell's ledgers, and those have to be the same text. The output of cells that nbval
checks has to be the stored one, every other cell has to run, and no other host may be asked.
A benchmark and no test: Python's start, its packages and two notebooks take a minute or more.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kit")]

from browser_kit import FLAGS, chromium  # noqa: E402
from web_kit import SUB_PATH, served  # noqa: E402

SITE = ROOT / "build" / "lite"
RESULT = Path(__file__).with_name("results") / "lite.json"
MINUTES = 10
CHECKED = "nbval-check-output"
RECORD = """\
import hashlib
import json

from rlhf_lab.cost.estimate import Estimate

made, found, init = [], {}, Estimate.__init__


def recorded(self, *args, **kwargs):
    init(self, *args, **kwargs)
    made.append(self)


def after(result):
    text = "".join(estimate.ledger.to_jsonl() for estimate in made)
    if made:
        cell = hashlib.sha256(result.info.raw_cell.strip().encode()).hexdigest()
        found[cell] = [len(made), hashlib.sha256(text.encode()).hexdigest()]
    made.clear()


Estimate.__init__ = recorded
get_ipython().events.register("post_run_cell", after)"""
SHOW = "print(json.dumps(found))"
CPYTHON = """\
import json, sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
sys.stdout, out = sys.stderr, sys.stdout
for source in json.load(sys.stdin):
    shell.run_cell(source).raise_error()
print(json.dumps(shell.user_ns["found"]), file=out)
"""
IDLE = """() => {
  const panel = window.jupyterapp?.shell.currentWidget;
  const kernel = panel?.sessionContext?.session?.kernel;
  return kernel && kernel.status === "idle" && panel.content?.model?.cells.length > 0;
}"""
DONE = """() => {
  const { model } = window.jupyterapp.shell.currentWidget.content;
  const cells = model.toJSON().cells.filter((cell) => cell.cell_type === "code");
  const failed = cells.some((cell) => cell.outputs.some((o) => o.output_type === "error"));
  return failed || cells.every((cell) => cell.execution_count);
}"""


def cell(source: str, name: str) -> dict:
    lines = source.splitlines(keepends=True)
    rest = {"execution_count": None, "metadata": {}, "outputs": []}
    return {"cell_type": "code", "id": name, "source": lines, **rest}


def source_of(cell: dict) -> str:
    return "".join(cell["source"])


def code(notebook: dict) -> list[dict]:
    return [c for c in notebook["cells"] if c["cell_type"] == "code"]


def with_record(notebook: dict) -> dict:
    """The notebook with a cell after the one that installs, and one at its end."""
    cells = list(notebook["cells"])
    first = cells.index(code(notebook)[0])
    cells.insert(first + 1, cell(RECORD, "record"))
    return {**notebook, "cells": [*cells, cell(SHOW, "show")]}


def in_cpython(notebook: dict) -> dict[str, list]:
    """{a cell's source, hashed: [estimates made, the hash of their ledgers]} of this Python."""
    sources = [source_of(c) for c in code(notebook)[1:]]  # nothing has to be installed
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "IPYTHONDIR": folder}
        done = subprocess.run(
            [sys.executable, "-c", CPYTHON],
            input=json.dumps(sources),
            capture_output=True,
            text=True,
            cwd=folder,
            env=env,
        )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout)


def in_browser(page: Page, address: str, name: str) -> tuple[dict, float, float]:
    """→ the notebook as the page has run it, seconds to a kernel, seconds of all cells."""
    begin = time.perf_counter()
    page.goto(f"{address}lab/index.html?path={name}.ipynb")
    page.wait_for_function(IDLE, timeout=MINUTES * 60_000)
    ready = time.perf_counter()
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
    page.wait_for_function(DONE, timeout=MINUTES * 60_000, polling=500)
    page.wait_for_function(IDLE, timeout=MINUTES * 60_000)
    end = time.perf_counter()
    ran = page.evaluate("() => window.jupyterapp.shell.currentWidget.content.model.toJSON()")
    return ran, ready - begin, end - ready


def printed(cell: dict) -> str:
    return "".join("".join(o.get("text", "")) for o in cell["outputs"])


def compare(name: str, ran: dict, notebook: dict) -> dict[str, object]:
    """What of a notebook is not as in CPython."""
    cells = {c["id"]: c for c in code(ran)}
    errors = {
        c["id"]: f"{o['ename']}: {o['evalue']}"
        for c in cells.values()
        for o in c["outputs"]
        if o["output_type"] == "error"
    }
    if errors:
        return {"errors": errors}
    theirs, ours = json.loads(printed(cells["show"])), in_cpython(notebook)
    names = {hashlib.sha256(source_of(c).strip().encode()).hexdigest(): i for i, c in cells.items()}
    stored = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text("utf-8"))
    checked = [c for c in code(stored) if CHECKED in c["metadata"].get("tags", [])]
    checked = [c for c in checked if c["id"] in cells]
    wrong = [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]
    return {
        "errors": {},
        "cells_that_plan": len(ours),
        "plans": sum(n for n, _ in ours.values()),
        "cells_whose_plans_differ": [names.get(key, key) for key in wrong],
        "checked_outputs": len(checked),
        "outputs_that_differ": [
            c["id"] for c in checked if printed(c).strip() != printed(cells[c["id"]]).strip()
        ],
    }


def main() -> int:
    if not (SITE / "lab" / "index.html").is_file():
        print("make lite first", file=sys.stderr)
        return 1
    found, asked = {}, []
    with tempfile.TemporaryDirectory() as top, sync_playwright() as playwright:
        folder = Path(top) / SUB_PATH.strip("/")
        shutil.copytree(SITE, folder)
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        with served(Path(top)) as address:
            for path in sorted((folder / "files").glob("*.ipynb")):
                load = os.getloadavg()[0]
                notebook = with_record(json.loads(path.read_text("utf-8")))
                path.write_text(json.dumps(notebook), encoding="utf-8")
                context = browser.new_context(viewport={"width": 1100, "height": 900})
                context.on("request", lambda request: asked.append(request.url))
                page = context.new_page()
                ran, ready, cells = in_browser(page, address, path.stem)
                context.close()
                found[path.stem] = {
                    **compare(path.stem, ran, notebook),
                    "kernel_s": round(ready, 1),
                    "cells_s": round(cells, 1),
                    "load": round(load, 1),
                }
                print(path.stem, json.dumps(found[path.stem], indent=1), flush=True)
        version = browser.version
        browser.close()
    hosts = {urlsplit(url).hostname for url in asked} - {"127.0.0.1", None}
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "chromium": version,
        "cpython": platform.python_version(),
        "other_hosts": sorted(hosts),
        "notebooks": found,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    keys = ("errors", "cells_whose_plans_differ", "outputs_that_differ")
    return int(bool(hosts or any(n[key] for n in found.values() for key in keys if key in n)))


if __name__ == "__main__":
    sys.exit(main())
