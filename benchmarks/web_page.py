"""The planner's web page against its figures: the same numbers as `lab.plan`, and how soon.

    python benchmarks/web_page.py --settings 500      # writes results/web_page.json

Each of so many random settings is opened by its address, and every row of the page's ledger is
compared with that of `lab.plan`, as text: to the last digit. Times are of headless Chromium on
loopback: the first paint, the first answer of Python, with an empty cache and with a full one, the
same for a bare page that starts Pyodide and adds 1 and 1, in turn, and a slider's key to the new
picture. axe-core, from npm, looks at the page in both themes, wide and 400 px.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kit")]

from browser_kit import FLAGS, chromium  # noqa: E402
from web_kit import (  # noqa: E402
    SETTLED,
    STARTS_WITHIN,
    SUB_PATH,
    build_web,
    ledger_of,
    random_fragments,
    served,
    show,
)

import rlhf_lab as lab  # noqa: E402
from rlhf_lab.widgets.planner_link import settings_of  # noqa: E402

RESULT = Path(__file__).with_name("results") / "web_page.json"
BARE = """<!DOCTYPE html><meta charset="utf-8"><title>bare</title><script type="module">
import { loadPyodide } from "./pyodide/pyodide.mjs";
const python = await loadPyodide();
document.documentElement.dataset.answered = python.runPython("1 + 1");
</script>"""
KEYS = 40
AXE = ("axe-core", "4.14.1", "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745")
READY = "html[data-answered]"
"""Python has answered once."""


def start_seconds(browser: Browser, pages: dict[str, str], again: int) -> dict[str, dict]:
    """{page: {"cold": seconds, "warm": …}} to Python's first answer, in a new profile and in the
    same one. Pages take turns, so that what else the machine does meets all of them."""
    found = {name: {"cold": [], "warm": []} for name in pages}
    for _ in range(again):
        for name, address in pages.items():
            context = browser.new_context()
            for kind in ("cold", "warm"):
                page = context.new_page()
                begin = time.perf_counter()
                page.goto(address)
                page.wait_for_selector(READY, state="attached", timeout=STARTS_WITHIN)
                found[name][kind].append(round(time.perf_counter() - begin, 2))
                page.close()
            context.close()
    return found


def faults(page: Page, address: str) -> list[str]:
    """What axe-core calls serious or critical, in both themes and at both widths."""
    found = set()
    page.goto(address)
    page.wait_for_selector(SETTLED, state="attached", timeout=STARTS_WITHIN)
    page.add_script_tag(url="axe.min.js")
    for scheme in ("light", "dark"):
        for width in (1100, 400):
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": 900})
            for fault in page.evaluate("async () => (await axe.run()).violations"):
                if fault["impact"] in ("serious", "critical"):
                    where = ", ".join(str(node["target"]) for node in fault["nodes"][:3])
                    found.add(f"{scheme} {width}: {fault['id']} ({fault['impact']}) {where}")
    return sorted(found)


def first_paint(browser: Browser, address: str) -> float:
    """Milliseconds to the first paint, which has the default plan's answer in it."""
    page = browser.new_page()
    page.goto(address)
    page.wait_for_selector("#chart svg")
    mark = page.evaluate("() => performance.getEntriesByName('first')[0].startTime")
    page.close()
    return round(mark, 1)


def redraws(page: Page) -> list[float]:
    """Milliseconds from a slider's event to the new picture in the document."""
    show(page, "")
    slider = "#control-per_device_train_batch_size"
    page.evaluate(
        """([slider]) => {
          window.times = [];
          let begin = 0;
          const input = () => { begin = performance.now(); };
          const drawn = () => {
            if (begin) times.push(performance.now() - begin);
            begin = 0;
          };
          document.querySelector(slider).addEventListener("input", input, true);
          const canvas = document.querySelector("#chart .lab-chart > div");
          new MutationObserver(drawn).observe(canvas, { childList: true });
        }""",
        [slider],
    )
    page.locator(slider).focus()
    for at in range(KEYS):
        page.keyboard.press("ArrowLeft" if at % 8 < 4 else "ArrowRight")
        page.wait_for_timeout(400)
    return [round(t, 1) for t in page.evaluate("() => window.times")]


def compare(page: Page, fragments: list[str]) -> list[str]:
    """The addresses whose ledger is not `lab.plan`'s, to the last digit."""
    wrong = []
    for number, fragment in enumerate(fragments, 1):
        show(page, fragment)
        if ledger_of(page) != lab.plan(**settings_of(fragment)).ledger.to_jsonl():
            wrong.append(fragment)
        if number % 50 == 0:
            print(f"{number} compared, {len(wrong)} differ", flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", type=int, default=500, help="random settings [500]")
    parser.add_argument("--starts", type=int, default=3, help="starts of each kind [3]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as top, sync_playwright() as playwright:
        folder = Path(top) / SUB_PATH.strip("/")
        build_web.build(folder, ROOT / "build" / "cache")
        (folder / "bare.html").write_text(BARE)
        with tarfile.open(build_web.fetch_npm(*AXE, ROOT / "build" / "cache")) as package:
            axe = package.extractfile("package/axe.min.js").read()
        (folder / "axe.min.js").write_bytes(axe)
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        with served(Path(top)) as address:
            load = os.getloadavg()[0]
            page = browser.new_page(accept_downloads=True)
            page.goto(address)
            page.wait_for_selector(SETTLED, state="attached", timeout=STARTS_WITHIN)
            serious = faults(page, address)
            times = redraws(page)
            starts = start_seconds(
                browser, {"bare": f"{address}bare.html", "ours": address}, args.starts
            )
            paints = [first_paint(browser, address) for _ in range(args.starts)]
            print(f"axe {serious}, redraw {statistics.median(times)} ms, {starts}, {paints}")
            wrong = compare(page, random_fragments(args.settings, seed=500))
            page.close()
        version = browser.version
        browser.close()
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f} at the start",
        "chromium": version,
        "pyodide": build_web.PYODIDE,
        "settings_compared": args.settings,
        "settings_that_differ": wrong,
        "first_paint_ms": paints,
        "first_answer_s": starts["ours"],
        "bare_pyodide_s": starts["bare"],
        "times_bare": {
            kind: round(statistics.median(seconds) / statistics.median(starts["bare"][kind]), 2)
            for kind, seconds in starts["ours"].items()
        },
        "axe_serious": serious,
        "redraws": len(times),
        "redraw_ms_median": statistics.median(times),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return int(bool(wrong or serious))


if __name__ == "__main__":
    sys.exit(main())
