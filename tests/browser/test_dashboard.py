"""The live dashboard in a real JupyterLab: seen while it trains, stopped, kept, replayed."""

from __future__ import annotations

import json
import time

import pytest

PLAN = """
import rlhf_lab as lab
plan = lab.plan("ppo", "tiny", per_device_train_batch_size=16, max_steps=500, response_length=16)
"""
TRAIN = 'run = lab.train(plan, out="run-{name}", overwrite=True{more})'
SAY = 'print("status:", run.status, run.last_step, run.model_path.is_dir())'


def stop(book, by_key: bool = False) -> float:
    """Wait for the first iteration and press Stop, by mouse or keyboard; → when."""
    book.page.wait_for_function(
        "() => /reward: last/.test(document.querySelector('.lab-chart svg')"
        "?.getAttribute('aria-label') ?? '')",
        timeout=120_000,
    )
    # Exactly: the list of files shows this test's notebook as a button whose name holds "stop".
    button = book.page.get_by_role("button", name="Stop", exact=True)
    if by_key:
        button.focus()
        book.page.keyboard.press("Enter")
    else:
        button.click()
    return time.monotonic()


def ended(book, name: str) -> dict:
    file = book.path.parent / f"run-{name}" / "run.json"
    book.wait_for(lambda: json.loads(file.read_text())["status"] != "running", 20)
    return json.loads(file.read_text())


@pytest.mark.parametrize("mode", ["synchronous", "background"])
def test_seen_while_it_trains_stopped_and_kept(notebook, mode):
    more = ", background=True" if mode == "background" else ""
    last = ["run = run.wait()"] if mode == "background" else []
    cells = [PLAN, TRAIN.format(name=mode, more=more), *last, SAY]
    book = notebook(cells).run_all(wait=False)
    pressed = stop(book, by_key=mode == "background")
    config = ended(book, mode)
    seconds = time.monotonic() - pressed
    assert config["status"] == "stopped"
    assert seconds < 5, "a loose bound: benchmarks/dashboard.py has the figure"
    book.wait_idle()
    # The widget has made room for a picture, which is there without a kernel too.
    book.page.wait_for_selector(".jp-OutputArea img.lab-picture", timeout=20_000)
    assert book.page.locator(".lab-stop").count() == 0
    output = book.page.locator(".jp-OutputArea").last.inner_text()
    assert output.startswith("status: stopped") and output.strip().endswith("True")
    book.shot(f"dashboard-{mode}-end")
    assert not book.errors
    book.reopen_without_kernel()
    book.page.wait_for_selector("img.lab-picture", timeout=20_000)
    book.errors.clear()  # JupyterLab's own, about the kernel that is not there
    assert book.path.stat().st_size < 300_000


def test_a_reload_in_the_middle_loses_nothing(notebook):
    cells = [PLAN, TRAIN.format(name="reload", more=", background=True")]
    book = notebook(cells, fresh=True).run_all()
    label = "document.querySelector('.lab-chart svg')?.getAttribute('aria-label') ?? ''"
    book.page.wait_for_function(f"() => /reward: last/.test({label})", timeout=120_000)
    book.theme("dark")
    book.shot("dashboard-dark")
    book.reload()
    book.page.wait_for_function(f"() => /reward: last/.test({label})", timeout=60_000)
    readings = ".lab-chart svg .curve[data-name=reward]"
    xs = book.page.locator(readings).first.get_attribute("data-x").split()
    assert xs[0] == "1", "the curve begins where it began"
    book.theme("light")
    stop(book)
    assert ended(book, "reload")["status"] == "stopped"


def test_a_run_on_disk_is_replayed_by_keyboard(notebook):
    make = """
import rlhf_lab as lab
from rlhf_lab.runs.run import Run
run = Run.create("on-disk", stage="ppo", model="<img src=x onerror=hacked=1>", settings={},
                 data="stories", seed=0)
for step in range(1, 41):
    run.log(step, reward=step / 10, gold_reward=8 + step / 40, kl=step / 20, entropy=1 / step)
run.finish()
lab.dashboard("on-disk")
"""
    book = notebook([make]).run_all()
    chart = book.wait_svg()
    book.wait_for(lambda: "reward: last 4" in chart.get_attribute("aria-label"))
    slider = book.page.locator(".widget-slider [role=slider], .noUi-handle").first
    slider.focus()
    for _ in range(10):
        book.page.keyboard.press("ArrowLeft")
    book.wait_for(
        lambda: (
            "reward: last 3;" in chart.get_attribute("aria-label") + ";"
            or "reward: last 3" in chart.get_attribute("aria-label")
        )
    )
    book.page.get_by_text("More:").click()
    book.page.wait_for_timeout(300)
    book.shot("dashboard-replay")
    assert "onerror" in book.text(0) and book.page.evaluate("() => window.hacked") is None
