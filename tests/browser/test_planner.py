"""The planner in a real JupyterLab: keys move it, buttons change it, text copies, themes hold."""

from __future__ import annotations

import re

import pytest

OPEN = """import rlhf_lab as lab
from rlhf_lab.widgets.planner import Planner
planner = Planner(lab.plan{})
planner"""


def opened(notebook, state: str = "", **window):
    book = notebook([OPEN.format(state), "print(repr(planner)); print(planner.code)"], **window)
    book.run_all()
    book.wait_svg(".lab-planner .lab-chart svg")
    return book


def control(book, name: str):
    """The control whose description is `name`."""
    label = book.page.get_by_text(name, exact=True)
    return book.page.locator(".lab-controls > *").filter(has=label)


def chosen(book, name: str) -> str:
    """What a list shows; ipywidgets writes its spaces unbreakable."""
    shown = control(book, name).locator("select").evaluate("n => n.selectedOptions[0].text")
    return shown.replace("\xa0", " ")


def verdict(book) -> str:
    return book.page.locator(".lab-verdict").inner_text()


def press(book, name: str, key: str, times: int = 1) -> None:
    control(book, name).locator(".noUi-handle").focus()
    for _ in range(times):
        book.page.keyboard.press(key)


def printed(book) -> str:
    """What the kernel prints of the planner now."""
    book.page.locator(".jp-CodeCell").nth(1).click()
    book.command("notebook:run-cell")
    book.wait_idle()
    return book.text(1)


def test_keys_move_a_slider_and_the_verdict_follows(notebook):
    book = opened(notebook)
    assert verdict(book).startswith("✗ Does not fit: ")
    picture = book.wait_svg().inner_html()
    press(book, "Batch", "ArrowLeft", 3)  # 8 → 1
    book.wait_for(lambda: verdict(book).startswith("✓ Fits: "))
    assert book.wait_svg().inner_html() != picture
    assert "per_device_train_batch_size=1," in printed(book)
    assert "To make it cheaper:" in book.page.locator(".lab-planner").inner_text()


def test_it_fits_the_page_and_both_themes(notebook):
    book = opened(notebook, height=1250)
    box = book.page.locator(".lab-planner").bounding_box()
    controls = book.page.locator(".lab-controls").bounding_box()
    chart = book.page.locator(".lab-chart").bounding_box()
    assert chart["x"] >= controls["x"] + controls["width"]  # two columns, side by side
    assert abs(chart["y"] - controls["y"]) < 120
    assert chart["x"] + chart["width"] <= box["x"] + box["width"] <= 1280
    assert box["height"] < 1000
    for theme in ("light", "dark"):
        book.theme(theme)
        book.page.wait_for_timeout(300)
        book.shot(f"planner_{theme}", ".lab-planner")
        seen = book.page.locator(".lab-verdict").evaluate(
            "n => [getComputedStyle(n).color, getComputedStyle(n).backgroundColor]"
        )
        light, dark = sorted(_lightness(c) for c in seen)
        assert dark - light > 0.5, f"{theme}: verdict is hard to read"


def _lightness(colour: str) -> float:
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 765


def test_a_change_applies_itself_and_the_controls_follow(notebook):
    book = opened(notebook)
    first = book.page.locator(".lab-remedy:visible").first
    assert chosen(book, "Layout") == "four models"
    assert first.inner_text().startswith("policy and value share a trunk → ")
    first.focus()
    book.page.keyboard.press("Enter")
    book.wait_for(lambda: verdict(book).startswith("✓ Fits: "))
    assert chosen(book, "Layout") == "shared trunk"
    assert 'layout="shared"' in printed(book)


def test_what_cannot_be_is_said_and_the_last_picture_stays(notebook):
    book = opened(notebook)
    press(book, "Minibatches", "ArrowRight", 4)  # 16 of a rollout of 8
    book.wait_for(lambda: "does not split" in verdict(book))
    book.wait_for(lambda: book.page.locator(".lab-stale .lab-chart").count() == 1)
    book.shot("planner_impossible", ".lab-planner")
    press(book, "Minibatches", "ArrowLeft", 4)
    book.wait_for(lambda: verdict(book).startswith("✗ Does not fit: "))
    book.wait_for(lambda: book.page.locator(".lab-stale").count() == 0)


def test_another_model_and_a_hostile_name(notebook):
    book = opened(notebook, ', stage="sft"')
    control(book, "Model").locator("select").select_option(label="another…")
    field = control(book, "Its name").locator("input")
    field.fill('"><img src=x onerror="document.title=1">')
    field.press("Enter")
    book.wait_for(lambda: "no model" in verdict(book))
    assert "<img src=x" in verdict(book)
    assert book.page.locator(".lab-planner img").count() == 0
    assert book.page.title() != "1"
    book.shot("planner_hostile", ".lab-planner")


def test_copy_buttons_copy_what_the_planner_says(notebook):
    book = opened(notebook)
    book.context.grant_permissions(["clipboard-read", "clipboard-write"])
    book.page.get_by_role("button", name="Copy the call that makes this plan").click()
    book.wait_for(lambda: _clipboard(book).startswith('lab.plan("ppo", "Qwen/Qwen2.5-1.5B"'))
    book.page.locator(".lab-copy summary").focus()
    book.page.keyboard.press("Enter")  # unfold
    book.page.get_by_role("button", name="Copy accelerate config").click()
    book.wait_for(lambda: "mixed_precision: bf16" in _clipboard(book))


def _clipboard(book) -> str:
    return book.page.evaluate("() => navigator.clipboard.readText()")


def test_without_a_clipboard_the_text_is_selected(notebook):
    book = opened(notebook)
    book.page.evaluate("""() => {
        Object.defineProperty(navigator, "clipboard", { value: undefined });
        document.execCommand = () => false;
    }""")
    book.page.get_by_role("button", name="Copy the call that makes this plan").click()
    book.wait_for(lambda: book.page.evaluate("() => `${getSelection()}`").startswith("lab.plan("))
    assert "Ctrl+C" in book.page.locator(".lab-copy").first.inner_text()


def test_every_control_is_reached_by_tab_and_has_a_name(notebook):
    book = opened(notebook, ", gpus=8, sharding='zero3', lora_r=16", height=1250)
    control(book, "Stage").locator("select").focus()
    reached = []
    for _ in range(60):
        reached.append(book.page.evaluate(_FOCUSED))
        if reached[-1].startswith("summary"):
            break
        book.page.keyboard.press("Tab")
    wanted = book.page.locator(".lab-controls > *:visible .widget-label:visible")
    names = {n.strip() for n in wanted.all_inner_texts() if n.strip()}
    text = "\n".join(reached)
    missing = [name for name in names if name not in text]
    assert not missing, text
    assert text.count("button: ") >= 4 and "Chart" in text
    assert not [line for line in reached if line.endswith(": ")], text


_FOCUSED = """() => {
  const node = document.activeElement;
  const box = node.closest(".lab-controls > *") || node.closest(".jupyter-widgets");
  const label = node.getAttribute("aria-label") || box?.querySelector(".widget-label")?.innerText
    || node.innerText || box?.innerText || "";
  return `${node.localName}: ${label.trim()}`;
}"""


def test_a_reload_keeps_it_and_a_notebook_without_a_kernel_shows_it(notebook):
    book = opened(notebook, fresh=True)
    press(book, "Batch", "ArrowLeft")
    book.wait_for(lambda: "per_device_train_batch_size=4," in printed(book))
    book.wait_for(lambda: book.page.locator(".lab-remedy:visible").count() == 3)
    book.page.wait_for_timeout(2500)  # the saved picture follows two seconds later
    before = verdict(book)
    book.save()
    book.reload()
    book.wait_svg(".lab-planner .lab-chart svg")
    assert verdict(book) == before
    size = book.path.stat().st_size
    assert size < 150_000, f"{size} bytes for one planner"
    book.reopen_without_kernel()
    book.wait_for(lambda: book.page.locator(".jp-OutputArea img, .jp-OutputArea svg").count())
    book.shot("planner_no_kernel")
    book.errors.clear()  # JupyterLab's own, about the kernel that is not there


@pytest.mark.parametrize("width", [1280, 800])
def test_it_is_whole_on_narrow_pages(notebook, width):
    book = opened(notebook, width=width, height=1000)
    over = book.page.locator(".lab-planner").evaluate("n => n.scrollWidth - n.clientWidth")
    assert over <= 1
    book.shot(f"planner_{width}", ".lab-planner")
    answer = book.page.locator(".lab-verdict").bounding_box()
    controls = book.page.locator(".lab-controls").bounding_box()
    assert answer["y"] < controls["y"] + 60  # above them, or beside them
