"""The chat in a real JupyterLab: asked by keyboard, hostile text, stored without a kernel.

Run: pytest tests/browser/test_chat.py        (RLHF_LAB_SHOTS=folder keeps the screenshots)
"""

import json

EVIL = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
CELL = f"""
from rlhf_lab.widgets.chat import Chat
evil = {json.dumps(EVIL)}
def one(prompt, **settings):
    return evil + prompt, 7.5
def two(prompt, temperature, max_new_tokens, seed):
    return f"{{temperature}} {{max_new_tokens}} {{seed}}", None
Chat({{"sft": one, "ppo": two}}, ["A story, please.\\n", "Another one."], lambda p: "Note of " + p)
"""


def test_asked_by_click_and_keyboard_shown_as_text_and_stored(notebook):
    """Look at the screenshots: chat-light, -dark, -narrow, -stored."""
    book = notebook([CELL], fresh=True).run_all()
    page = book.page
    box = page.get_by_label("Prompt")
    box.wait_for(timeout=30_000)
    assert box.input_value() == "A story, please."
    page.get_by_label("Example").select_option("Another one.")
    book.wait_for(lambda: box.input_value() == "Another one.")
    box.fill(EVIL)
    page.get_by_label("New tokens").fill("9")
    page.get_by_label("Seed").fill("3")
    page.get_by_label("Seed").press("Tab")
    assert page.evaluate("() => document.activeElement.textContent") == "Ask sft and ppo"
    page.keyboard.press("Enter")
    card = page.locator(".lab-chat .card")
    book.wait_for(lambda: card.count() == 2)
    book.wait_for(lambda: "Note of" in page.locator(".lab-chat .note").inner_text())
    assert card.nth(0).locator(".text").inner_text() == EVIL + EVIL
    assert card.nth(1).locator(".text").inner_text() == "1.0 9 3"
    assert page.locator(".lab-chat .prompt").inner_text() == EVIL
    assert card.nth(0).locator(".strip").inner_text() == "gold reward 7.5"
    assert page.locator(".lab-chat img, .lab-chat script").count() == 0
    assert page.title() != "taken"
    tops = [card.nth(i).bounding_box()["y"] for i in (0, 1)]
    assert tops[0] == tops[1]
    book.shot("chat-light", ".jp-OutputArea")
    book.theme("dark")
    page.wait_for_selector("#jupyterlab-splash", state="detached")
    book.shot("chat-dark", ".jp-OutputArea")
    book.theme("light")
    page.wait_for_selector("#jupyterlab-splash", state="detached")
    page.set_viewport_size({"width": 560, "height": 900})
    book.wait_for(lambda: card.nth(1).bounding_box()["y"] > card.nth(0).bounding_box()["y"])
    book.shot("chat-narrow", ".jp-OutputArea")
    book.reopen_without_kernel()
    page = book.page
    page.wait_for_selector(".lab-chat .card", timeout=20_000)
    assert page.locator(".lab-chat .text").first.inner_text() == EVIL + EVIL
    assert page.locator(".lab-chat img, .lab-chat script").count() == 0
    assert page.title() != "taken"
    assert not page.get_by_text("Loading widget").is_visible()
    book.shot("chat-stored", ".jp-OutputArea")
    book.errors.clear()  # JupyterLab says that it has no model of the widget
