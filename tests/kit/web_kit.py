"""The planner's web page, built once and served from a sub-path of a plain static file server."""

from __future__ import annotations

import functools
import http.server
import json
import random
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

from rlhf_lab.planning import plan
from rlhf_lab.widgets.planner_answers import Calculator
from rlhf_lab.widgets.planner_controls import ALL
from rlhf_lab.widgets.planner_link import fragment_of

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "web"))

import build_lite as build_lite  # noqa: E402
import build_web as build_web  # noqa: E402
from planner_page import Page as Page  # noqa: E402
from planner_page import PageControls  # noqa: E402

SUB_PATH = "/somebody/lab/planner/"
SETTLED = "html[data-settled]:not([data-settled=''])"
STARTS_WITHIN = 180_000  # ms, on a machine with other things to do


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(folder: Path):
    """Serve a folder on loopback; → the address of its sub-path."""
    handler = functools.partial(_Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}{SUB_PATH}"
    server.shutdown()
    server.server_close()


def random_fragments(n: int, seed: int) -> list[str]:
    """Addresses of plans whose every control stands anywhere."""
    chance, fragments = random.Random(seed), []
    calculator = Calculator(plan)
    while len(fragments) < n:
        controls = PageControls({}, lambda _: None)
        names = chance.sample([k for k in ALL if controls.options[k]], chance.randint(2, 12))
        for name in names:
            controls.move(name, chance.choice(controls.options[name])[1])
        calculator.controls = controls
        if not calculator.error:
            fragments.append(fragment_of(controls.settings()))
    return fragments


def show(page, fragment: str) -> None:
    """Go to an address by its part behind `#`, and wait until everything is worked out."""
    page.evaluate(
        "([f]) => { document.documentElement.dataset.settled = ''; location.hash = f; }", [fragment]
    )
    page.wait_for_selector(SETTLED, state="attached", timeout=STARTS_WITHIN)


def ledger_of(page) -> str:
    """Every figure of the page's plan, as it is downloaded."""
    with page.expect_download() as started:
        page.locator("#ledger").click()
    return Path(started.value.path()).read_text("utf-8")


def first_of(index: Path) -> dict:
    """What the page paints before Python."""
    text = index.read_text("utf-8").partition('id="first">')[2].partition("</script>")[0]
    return json.loads(text)
