"""What the live dashboard costs and how soon it is there, in a real JupyterLab and a real browser.

    python benchmarks/dashboard.py              # about a quarter of an hour on two quiet cores
    python benchmarks/dashboard.py --quick      # does it run?

    first paint   seconds from the start of a cell to its first chart on the page; the cell trains
    overhead      PPO of the bundled model with the dashboard against without, alternating, medians
    stop          seconds from the click to the run on disk saying that it was stopped, both modes
    wire          bytes a chart receives in the busiest minute of a training
    size          bytes of JavaScript, and of a saved notebook with every widget in it; beside it
                  two plotly figures, to which JupyterLab adds pictures of its own when it saves

Needs playwright and Chromium (see tests/browser). Results: benchmarks/results/dashboard.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kit")]

from browser_kit import FLAGS, NotebookPage, Server, chromium, write_notebook  # noqa: E402

from rlhf_lab.charts.views import charts_of  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "dashboard.json"
IMPORT = "import json, time, rlhf_lab as lab\nfrom pathlib import Path"
PAINTED = "() => !!document.querySelector('.lab-chart svg')"
LIMITS = {
    "first paint, s": 1.5,
    "overhead, ratio": 1.03,
    "stop synchronous, s": 0.5,
    "stop background, s": 0.5,
    "wire, MB a chart and minute": 1.0,
    "JavaScript, KB": 60.0,
    "saved notebook, KB": 300.0,
}


class Bench:
    """A server, a browser, and one notebook at a time."""

    def __init__(self, browser, folder: Path, quick: bool) -> None:
        self.browser, self.folder, self.quick = browser, folder, quick
        self.server, self.count = Server(folder / "lab"), 0

    def book(self, cells: list[str]) -> NotebookPage:
        self.count += 1
        path = write_notebook(self.server.root / f"book{self.count}.ipynb", cells)
        context = self.browser.new_context(viewport={"width": 1280, "height": 900})
        return NotebookPage(context, self.server, path, self.folder / "shots").open()

    def done(self, book: NotebookPage) -> None:
        book.page.close()
        book.context.close()
        self.server.kill_kernels()

    # ------------------------------------------------------------------------------- figures

    def first_paint(self) -> float:
        """From the press of Run, in a kernel that has done nothing: imports included."""
        book = self.book([f'{IMPORT}\nlab.train("ppo", out="paint", overwrite=True)'])
        start = time.monotonic()
        book.run_all(wait=False)
        book.page.wait_for_function(PAINTED, timeout=60_000, polling=20)
        seconds = time.monotonic() - start
        book.page.locator(".lab-stop").first.click()
        book.wait_idle()
        self.done(book)
        return seconds

    def overhead(self, pairs: int) -> dict:
        """Seconds of the training loop, as the runs themselves report them."""
        steps = 4 if self.quick else 24
        loop = f"""
plan = lab.plan("ppo", "tiny", max_steps={steps})
lab.train(plan, out="warm", overwrite=True, quiet=True)
found = {{"with": [], "without": []}}
for pair in range({pairs}):
    for side in ("with", "without") if pair % 2 else ("without", "with"):
        run = lab.train(plan, out=f"pair-{{side}}", overwrite=True, quiet=side == "without")
        found[side].append(run.summary["seconds"])
Path("overhead.json").write_text(json.dumps(found))
"""
        book = self.book([IMPORT, loop])
        book.run_all(wait=False)
        file = self.server.root / "overhead.json"
        book.wait_for(file.is_file, 3_000)
        found = json.loads(file.read_text())
        book.wait_idle()
        charts = len(charts_of("ppo")) + 2  # memory and time
        wire = {"MB a chart and minute": _busiest_minute(book.received) / 1e6 / charts}
        self.done(book)
        ratio = statistics.median(found["with"]) / statistics.median(found["without"])
        return {"ratio": ratio, "seconds": found, **wire}

    def notebook(self) -> dict[str, int]:
        """Bytes of a notebook that trained and shows every widget, and of two figures in it."""
        cells = [
            IMPORT,
            'plan = lab.plan("ppo", "tiny", max_steps=24)\nrun = lab.train(plan, out="whole")',
            "lab.dashboard(run)",
            "lab.planner()",
            "lab.inspect(run)",
            'lab.label(lab.load_data("stories"), n=5, out="mine.jsonl")',
            "lab.curves(run)",
            "lab.compare(plan, run).figure()",
        ]
        book = self.book(cells)
        book.run_all()
        book.page.wait_for_timeout(3_000)  # pictures follow their widgets
        assert book.saved()
        size, last = book.path.stat().st_size, json.loads(book.path.read_text())["cells"][-2:]
        self.done(book)
        figures = len(json.dumps(last, indent=1))
        return {"widgets": size - figures, "figures": figures}

    def stop(self, mode: str) -> float:
        more = ", background=True" if mode == "background" else ""
        cell = f'lab.train("ppo", out="{mode}", overwrite=True{more})'
        book = self.book([IMPORT, cell])
        book.run_all(wait=False)
        label = "document.querySelector('.lab-chart svg')?.getAttribute('aria-label') ?? ''"
        book.page.wait_for_function(f"() => /reward: last/.test({label})", timeout=120_000)
        book.page.wait_for_timeout(1500)
        file = self.server.root / mode / "run.json"
        start = time.monotonic()
        book.page.locator(".lab-stop").first.click()
        while json.loads(file.read_text())["status"] == "running":
            time.sleep(0.01)
        seconds = time.monotonic() - start
        assert json.loads(file.read_text())["status"] == "stopped"
        book.wait_idle()
        self.done(book)
        return seconds


def _busiest_minute(received: list[tuple[float, int]]) -> int:
    times = [t for t, _ in received]
    return max(sum(n for t, n in received if start <= t < start + 60) for start in times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=7, help="of trainings [7]")
    parser.add_argument("--repeats", type=int, default=3, help="of first paint and stop [3]")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.pairs = args.repeats = 1
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    from playwright.sync_api import sync_playwright

    script = sum(f.stat().st_size for f in (ROOT / "rlhf_lab" / "widgets").glob("*.js"))
    with sync_playwright() as play, tempfile.TemporaryDirectory() as folder:
        browser = play.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        bench = Bench(browser, Path(folder), args.quick)
        try:
            repeats = range(args.repeats)
            paint = [bench.first_paint() for _ in repeats]
            stops = {m: [bench.stop(m) for _ in repeats] for m in ("synchronous", "background")}
            notebook = bench.notebook()
            cost = bench.overhead(args.pairs)
        finally:
            bench.server.stop()
            browser.close()
    figures = {
        "first paint, s": statistics.median(paint),
        "overhead, ratio": cost["ratio"],
        **{f"stop {m}, s": statistics.median(s) for m, s in stops.items()},
        "wire, MB a chart and minute": cost["MB a chart and minute"],
        "JavaScript, KB": script / 1000,
        "saved notebook, KB": notebook["widgets"] / 1000,
    }
    for name, value in figures.items():
        print(f"{name:30} {value:8.3f}   asked: at most {LIMITS[name]:g}")
    RESULTS.write_text(
        json.dumps(
            {
                "figures": figures,
                "limits": LIMITS,
                "quick": args.quick,
                "first paint": paint,
                "stop": stops,
                "overhead": cost,
                "notebook": notebook,
            },
            indent=1,
        )
        + "\n"
    )
    return int(any(value > LIMITS[name] for name, value in figures.items()))


if __name__ == "__main__":
    sys.exit(main())
