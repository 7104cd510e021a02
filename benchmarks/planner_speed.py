"""How long from a slider to the new picture? `python benchmarks/planner_speed.py [--moves 40]`

In a real JupyterLab in headless Chromium, and in Python alone. Each move is a press of an arrow key
on a slider that leads to settings never shown before, so nothing is answered from memory. In the
browser the clock runs from the key press to the frame that shows the new picture, and to the one
that shows the new changes too ("everything": these wait until the slider rests). Needs playwright
and a Chromium. Writes benchmarks/results/planner_speed.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import rlhf_lab as lab
from rlhf_lab.display import table
from rlhf_lab.widgets.planner import Planner

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "planner_speed.json"
TARGET_MS = 100
CELL = """import rlhf_lab as lab
from rlhf_lab.widgets.planner import Planner
planner = Planner(lab.plan, model="Qwen/Qwen2.5-7B", gpus=8, prompt_length=16, response_length=16)
planner"""
SLIDERS = (("Prompt", "prompt_length"), ("Response", "response_length"))

# Notes when a key went down, and when the frame after each change of the answer was painted.
WATCH = """() => {
  const painted = () => new Promise((done) => requestAnimationFrame(() => {
    const channel = new MessageChannel();
    channel.port1.onmessage = () => done(performance.now());
    channel.port2.postMessage(0);
  }));
  const look = window.look = { down: 0, picture: 0, all: 0 };
  const start = () => Object.assign(look, { down: performance.now(), picture: 0, all: 0 });
  addEventListener("keydown", start, true);
  const watch = (selector, name) => {
    new MutationObserver(async () => { look[name] = await painted(); }).observe(
      document.querySelector(selector), { childList: true, subtree: true, characterData: true });
  };
  watch(".lab-chart", "picture");
  for (const button of document.querySelectorAll(".lab-remedy")) {
    new MutationObserver(async () => { look.all = await painted(); }).observe(
      button, { childList: true, characterData: true, subtree: true });
  }
}"""


def in_browser(moves: int) -> dict[str, list[float]]:
    """Milliseconds of each move: to the picture, and to everything; bytes received for each."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kit")]
    from browser_kit import FLAGS, NotebookPage, Server, chromium, write_notebook
    from playwright.sync_api import sync_playwright

    found: dict[str, list[float]] = {"picture": [], "all": [], "bytes": []}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        server = Server(Path(folder))
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        try:
            path = write_notebook(server.root / "planner.ipynb", [CELL])
            context = browser.new_context(viewport={"width": 1280, "height": 900})
            book = NotebookPage(context, server, path, Path(folder)).open()
            book.run_all()
            book.wait_svg(".lab-planner .lab-chart svg")
            page = book.page
            page.wait_for_timeout(1000)
            page.evaluate(WATCH)
            for turn in range(moves):
                name, _ = SLIDERS[turn % 2]
                label = page.get_by_text(name, exact=True)
                page.locator(".lab-controls > *").filter(has=label).locator(".noUi-handle").focus()
                before = len(book.received)
                page.keyboard.press("ArrowRight")
                page.wait_for_function("() => look.picture && look.all", timeout=10_000)
                look = page.evaluate("() => look")
                for part in ("picture", "all"):
                    found[part].append(look[part] - look["down"])
                page.wait_for_timeout(250)  # as a hand does; what is still on its way arrives
                found["bytes"].append(sum(size for _, size in book.received[before:]))
            if book.errors:
                raise RuntimeError(f"the page says: {book.errors}")
        finally:
            browser.close()
            server.stop()
    return found


def in_python(moves: int) -> list[float]:
    """Milliseconds of the same moves without a page."""
    planner = Planner(
        lab.plan, model="Qwen/Qwen2.5-7B", gpus=8, prompt_length=16, response_length=16
    )
    found = []
    for turn in range(moves):
        slider = planner.controls.widgets[SLIDERS[turn % 2][1]]
        start = time.perf_counter()
        slider.index += 1
        found.append(1e3 * (time.perf_counter() - start))
    return found


def summary(values: list[float]) -> dict[str, float]:
    """Median, 90th percentile and largest."""
    ordered = sorted(values)
    return {
        "median": statistics.median(ordered),
        "p90": ordered[int(0.9 * (len(ordered) - 1))],
        "largest": ordered[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moves", type=int, default=40, help="presses of a key [40, at most 42]")
    moves = min(parser.parse_args().moves, 42)  # two sliders of 22 places
    python, browser = in_python(moves), in_browser(moves)
    rows = {
        "Python alone": python,
        "browser: picture and verdict": browser["picture"],
        "browser: everything": browser["all"],
    }
    figures = {name: summary(values) for name, values in rows.items()}
    print(
        table(
            [
                {"slider to …": name, **{f"{k} (ms)": round(v, 1) for k, v in line.items()}}
                for name, line in figures.items()
            ]
        )
    )
    sent = statistics.median(browser["bytes"])
    print(f"{moves} moves; {sent:,.0f} bytes received for one (median)")
    met = figures["browser: picture and verdict"]["median"] <= TARGET_MS
    print(f"target: {TARGET_MS} ms median in the browser: {'met' if met else 'missed'}")
    rounded = {name: {k: round(v, 1) for k, v in line.items()} for name, line in figures.items()}
    RESULTS.write_text(
        json.dumps(
            {"moves": moves, "milliseconds": rounded, "bytes": sent, "target_ms": TARGET_MS},
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
