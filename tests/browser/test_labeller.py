"""The labeller in a real JupyterLab: clicks, keys, undo, reload, a killed kernel, hostile text.

Run: pytest tests/browser/test_labeller.py        (RLHF_LAB_SHOTS=folder keeps the screenshots)
"""

import json
import re

import pytest

ROOT = ".rlhf-labeller"
EVIL = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"


CELL = """
import rlhf_lab as lab
from rlhf_lab.widgets.labeller import Labeller
pairs = [dict(prompt=f"Which one, {i}?", chosen=f"good {i} and long", rejected=f"bad {i}")
         for i in range(6)]
"""


def cell(file: str, pairs: str = "pairs", compared: str = "lambda p, r: float(len(r))") -> str:
    return f"{CELL}\nlabeller = Labeller({pairs}, {file!r}, {compared})\nlabeller"


def lines(book, file):
    path = book.path.parent / file
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_pair(book, number, of=6):
    book.page.wait_for_selector(f"{ROOT} .place:text-is('Pair {number} of {of}')", timeout=30_000)


def text(book, part):
    return book.page.locator(f"{ROOT} {part}").inner_text()


@pytest.fixture
def open_labeller(notebook, request):
    def start(*how, after=(), **window):
        file = f"{request.node.name}.jsonl"
        book = notebook([cell(file, *how), *after], **window)
        book.run_all()
        book.page.wait_for_selector(f"{ROOT} .place", timeout=30_000)
        return book, file

    return start


def test_clicks_and_keys_label_pairs_and_each_is_on_disk(open_labeller):
    book, file = open_labeller()
    page = book.page
    assert "Click here to use the keys" in text(book, ".hint")
    page.keyboard.press("ArrowLeft")  # without focus a key is the notebook's
    page.wait_for_timeout(300)
    assert lines(book, file) == []
    left = text(book, ".left .text")
    page.get_by_role("button", name="Left is better (←)").click()
    wait_for_pair(book, 2)
    (line,) = lines(book, file)
    assert line["annotation"] == "left" and line["chosen"] == left and 0 < line["seconds"] < 60
    page.locator(f"{ROOT} .prompt").click()
    assert "The keys are on" in text(book, ".hint")
    for number, (key, answer) in enumerate(
        [("ArrowRight", "right"), ("t", "tie"), ("ArrowUp", "skip")], start=3
    ):
        page.keyboard.press(key)
        wait_for_pair(book, number)
        assert lines(book, file)[-1]["annotation"] == answer
    page.keyboard.press("z")
    wait_for_pair(book, 4)
    page.keyboard.press("Backspace")
    wait_for_pair(book, 3)
    assert [line["annotation"] for line in lines(book, file)][-2:] == ["undo", "undo"]
    assert text(book, ".counts").startswith("2 preferences, 0 ties, 0 skips")
    assert text(book, ".note") == "Taken back: label this pair again."


def test_the_notebook_and_the_labeller_leave_each_others_keys_alone(open_labeller):
    book, file = open_labeller(after=["1 + 1", "2 + 2"])
    page = book.page
    page.locator(f"{ROOT} .prompt").click()
    cells = page.locator(".jp-CodeCell").count()
    for key in ("x", "d", "d", "a", "b", "c", "m"):  # cut, delete, insert, copy, Markdown
        page.keyboard.press(key)
    page.keyboard.press("ArrowDown")
    wait_for_pair(book, 2)
    active = "() => window.jupyterapp.shell.currentWidget.content.activeCellIndex"
    assert page.locator(".jp-CodeCell").count() == cells and page.evaluate(active) == 0
    assert page.locator(f"{ROOT}").evaluate("e => e.contains(document.activeElement)")
    page.keyboard.press("Control+s")  # and this one is the notebook's, with focus or without
    book.wait_for(lambda: "Labeller(" in book.path.read_text())
    # Out of the labeller, its keys are the notebook's again.
    page.locator(".jp-CodeCell").nth(1).locator(".jp-InputPrompt").click()
    page.keyboard.press("ArrowDown")
    book.wait_for(lambda: page.evaluate(active) == 2)
    assert len(lines(book, file)) == 1


def test_with_the_keyboard_alone(open_labeller):
    book, file = open_labeller()
    page = book.page
    page.locator(ROOT).focus()
    names = []
    for _ in range(6):
        page.keyboard.press("Tab")
        names.append(page.evaluate("() => document.activeElement.textContent"))
    assert names == [
        "Left is better (←)",
        "Right is better (→)",
        "Tie (t or ↓)",
        "Skip (s or ↑)",
        "Show it now",
        names[-1],
    ]
    page.locator(f"{ROOT} button.tie").focus()
    page.keyboard.press("Enter")
    wait_for_pair(book, 2)
    page.keyboard.press("Space")
    wait_for_pair(book, 3)
    page.keyboard.press("ArrowRight")  # a key acts wherever inside the focus is
    wait_for_pair(book, 4)
    assert [line["annotation"] for line in lines(book, file)] == ["tie", "tie", "right"]


def test_a_reload_shows_where_one_was(open_labeller):
    book, file = open_labeller(fresh=True)
    for number in (2, 3):
        book.page.locator(f"{ROOT} button.right").click()
        wait_for_pair(book, number)
    before = {part: text(book, part) for part in (".left .text", ".right .text", ".counts")}
    book.save()
    book.reload()
    wait_for_pair(book, 3)
    assert {part: text(book, part) for part in before} == before
    book.page.locator(f"{ROOT} button.tie").click()
    wait_for_pair(book, 4)
    assert len(lines(book, file)) == 3


def test_a_kernel_killed_in_the_middle_loses_no_answer(open_labeller):
    book, file = open_labeller(after=["import os, signal"], fresh=True)
    page = book.page
    page.locator(f"{ROOT} .prompt").click()
    for number in (2, 3, 4):
        page.keyboard.press("ArrowLeft")
        wait_for_pair(book, number)
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    page.evaluate(
        "code => { window.jupyterapp.shell.currentWidget.sessionContext.session.kernel"
        ".requestExecute({ code }); }",
        kill,
    )
    page.locator(".jp-Dialog button").first.click(timeout=30_000)  # "the kernel has died"
    page.locator(f"{ROOT} button.left").click()
    page.wait_for_selector(f"{ROOT}.lost .note:has-text('Not saved')", timeout=10_000)
    saved = lines(book, file)
    assert [line["annotation"] for line in saved] == ["left"] * 3
    book.errors.clear()  # a dead kernel is worth a complaint of JupyterLab's
    page.close()
    book.server.kill_kernels()
    book.open().run_all()
    wait_for_pair(book, 4)
    book.page.locator(f"{ROOT} button.right").click()
    wait_for_pair(book, 5)
    assert lines(book, file)[:3] == saved and len(lines(book, file)) == 4


def test_a_busy_kernel_is_said_and_the_answer_comes_through(open_labeller):
    book, file = open_labeller(after=["import time; time.sleep(0)"])
    page = book.page
    page.evaluate(
        "() => { window.jupyterapp.shell.currentWidget.sessionContext.session.kernel"
        ".requestExecute({ code: 'time.sleep(4)' }); }"
    )
    page.locator(f"{ROOT} .prompt").click()
    for _ in range(3):  # impatience answers one pair, not three
        page.keyboard.press("ArrowLeft")
    page.wait_for_selector(f"{ROOT}.lost .note:has-text('Not saved yet')", timeout=4_000)
    wait_for_pair(book, 2)
    assert len(lines(book, file)) == 1 and not page.locator(f"{ROOT}.lost").count()


def test_hostile_text_is_text(open_labeller):
    evil = json.dumps(EVIL)
    rows = f'[{{"prompt": {evil}, "chosen": {evil} + "1", "rejected": ""}}, *pairs]'
    book, file = open_labeller(rows)
    page = book.page
    assert text(book, ".prompt") == EVIL
    texts = [text(book, f".{side} .text") for side in ("left", "right")]
    assert sorted(texts) == sorted([EVIL + "1", "(empty)"])
    assert page.locator(f"{ROOT} img, {ROOT} script").count() == 0
    page.locator(f"{ROOT} button.left").click()
    wait_for_pair(book, 2, of=7)
    assert page.title() != "taken"


def test_agreement_is_hidden_then_shown_in_both_themes(open_labeller):
    """Look at the screenshots: labeller-light, -dark, -done-light, -done-dark, -narrow."""
    stories = "lab.load_data('stories')"
    book, file = open_labeller(
        f"{stories}.preferences.train[:8]", f"{stories}.gold_reward, {stories}.annotator"
    )
    page = book.page
    page.locator(f"{ROOT} .prompt").click()
    page.keyboard.press("ArrowLeft")
    wait_for_pair(book, 2, of=8)
    assert text(book, ".tally").startswith("How well you agree is hidden until the end.")
    book.shot("labeller-light", ROOT)
    book.theme("dark")
    page.wait_for_selector("#jupyterlab-splash", state="detached")
    book.shot("labeller-dark", ROOT)
    for number in range(3, 9):
        page.locator(ROOT).focus()
        page.keyboard.press("ArrowRight" if number % 2 else "ArrowLeft")
        wait_for_pair(book, number, of=8)
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(f"{ROOT} .place:text-is('All 8 pairs are labelled')")
    assert not page.locator(f"{ROOT} .sides").is_visible()
    names = page.locator(f"{ROOT} .name").all_inner_texts()
    assert names[:2] == ["You agree with the gold reward", "The annotator agrees with it"]
    figures = page.locator(f"{ROOT} .figure").all_inner_texts()
    assert re.match(r"\d+% of \d, 95% interval \d+% to \d+%", figures[0])
    book.shot("labeller-done-dark", ROOT)
    book.theme("light")
    page.wait_for_selector("#jupyterlab-splash", state="detached")
    book.shot("labeller-done-light", ROOT)
    page.locator(f"{ROOT} button.undo").click()
    wait_for_pair(book, 8, of=8)
    assert page.locator(f"{ROOT} .name").count() == 0


def test_without_a_kernel_the_saved_notebook_shows_the_tally(open_labeller):
    book, file = open_labeller()

    def still(number):  # JupyterLab shows a saved SVG as an image
        return f'.jp-OutputArea img[alt*="Your labels: {number} of 6"]'

    for number in range(1, 7):
        book.page.locator(f"{ROOT} button.left").click()
        book.page.wait_for_selector(still(number), state="attached")
        book.page.wait_for_selector(still(number), state="hidden")  # the widget itself is there
    book.reopen_without_kernel()
    book.page.wait_for_selector(still(6), state="visible")
    words = book.page.locator(still(6)).get_attribute("alt")
    assert "You agree with the gold reward" in words
    book.shot("labeller-reopened", ".jp-OutputArea")


def test_a_narrow_window_stacks_the_responses(open_labeller):
    book, file = open_labeller(width=560)
    boxes = [
        book.page.locator(f"{ROOT} .{side}.panel").bounding_box() for side in ("left", "right")
    ]
    assert boxes[1]["y"] >= boxes[0]["y"] + boxes[0]["height"]
    book.shot("labeller-narrow", ROOT)
