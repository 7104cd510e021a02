"""The rollout inspector in a real JupyterLab: by keyboard, in both themes, against hostile text.

Run: pytest tests/browser/test_inspector.py
"""

import random

import pytest

from rlhf_lab.runs.run import Run

STORY = (
    "Once a fox named Rosa lived in the cave. One evening a friend gave Rosa a tiny feather. The "
    "feather tickled Rosa and she gig|gled. The whole cave smelled of cheese. Since then Rosa "
    "sleeps with one eye open. The end."
)
HOSTILE = (
    '<script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">\n'
    '"><svg onload="window.hacked = 3"> \u202eback to front '
)
STEPS = 12


def tokens_of(text, seed, drift):
    """A record as PPO keeps it, with figures that drift as training goes on."""
    chance = random.Random(seed)
    texts = [w.replace("_", " ") for w in text.replace(" ", "| ").split("|")] + ["<|end|>"]
    ratios = [
        round(chance.gauss(0.1 * drift, drift * chance.choice([0.1, 0.2, 1.0])), 4) for _ in texts
    ]
    place = [i / len(texts) for i in range(len(texts))]
    record = {
        "text": texts,
        "special": [len(texts) - 1],
        "log_ratio": ratios,
        "logprob": [round(-abs(chance.gauss(0, 1)), 4) for _ in texts],
        "value": [round(1 + p + chance.gauss(0, 0.1), 4) for p in place],
        "advantage": [round(chance.gauss(0, 1), 4) for _ in texts],
        "reward": [round(-0.05 * r, 4) for r in ratios],
        "return": [round(1.8 + chance.gauss(0, 0.05), 4) for _ in texts],
    }
    record["reward"][-1] += 1.9
    return record


def make_run(folder, stage, steps=0, before="sft", hostile_at=None):
    run = Run.create(folder, stage=stage, model="tiny", settings={})
    prompts = [
        f"Write a funny story about a {a} and a key in the cave.\n" for a in ("mouse", "fox")
    ]
    plain = STORY.replace("|", "")
    other = plain.replace("Rosa", "Otto")
    first = plain if before == "base" else f"After {before}: {other}"
    run.sample(0, [{"prompt": p, "response": first, "when": before} for p in prompts])
    for step in range(1, steps + 1):
        rows = []
        for i, animal in enumerate(("fox", "frog", "owl", "cat")):
            text = HOSTILE if (step, i) == hostile_at else STORY
            rows.append(
                {
                    "prompt": f"Tell me a scary story with a {animal}, the {step}th of them.",
                    "response": text.replace("|", ""),
                    "reward": 1 + 0.1 * step,
                    "gold_reward": 0.5,
                    "gold/mood": 0.25,
                    "gold/ends": 1.0,
                    "tokens": tokens_of(text, 10 * step + i, step / steps),
                }
            )
        run.log(step, reward=1 + 0.1 * step)
        run.sample(step, rows)
    after = f"After {stage}: {other}"
    run.sample(0, [{"prompt": p, "response": after, "when": stage} for p in prompts])
    run.finish()
    return run


def opening(*folders):
    made = ", ".join(f"Run.load({str(f)!r})" for f in folders)
    return [
        "from rlhf_lab.runs.run import Run\nfrom rlhf_lab.widgets.inspector import Inspector\n"
        f"shown = Inspector({made})\nshown"
    ]


@pytest.fixture
def opened(notebook, tmp_path):
    """A notebook with an inspector of one PPO run on the page."""
    run = make_run(tmp_path / "ppo", "ppo", STEPS, hostile_at=(3, 1))
    book = notebook(opening(run.folder)).run_all()
    book.page.wait_for_selector(".lab-tk .card .t")
    return book


def page_text(book):
    return book.page.locator(".lab-tk .card").first.inner_text()


def slider(book, name):
    """The handle of a slider, found by its label."""
    return book.page.locator(f'.widget-slider:has(.widget-label:text-is("{name}")) .noUi-handle')


def choose(book, name, option):
    """A choice of a drop-down, made as a reader makes it."""
    book.page.get_by_label(name, exact=True).select_option(label=option)


def test_it_opens_and_moves_by_keyboard(opened):
    book = opened
    assert f"step {STEPS}" in page_text(book)
    handle = slider(book, "Step")
    handle.focus()
    for _ in range(4):
        book.page.keyboard.press("ArrowLeft")
    book.wait_for(lambda: f"step {STEPS - 4}" in page_text(book))
    book.page.keyboard.press("Home")
    book.wait_for(lambda: "step 1\n" in page_text(book))
    book.page.keyboard.press("End")
    book.wait_for(lambda: f"step {STEPS}" in page_text(book))
    book.shot("inspector_light", ".jp-OutputArea")


def test_tokens_speak_when_pointed_at_and_by_keyboard(opened):
    book = opened
    strip = book.page.locator(".lab-tk .strip").first
    token = book.page.locator(".lab-tk .t", has_text="named").first
    token.hover()
    tooltip = token.evaluate("node => getComputedStyle(node, '::after').content")
    assert "“ named”" in tooltip and "log-ratio" in tooltip and "advantage" in tooltip
    book.shot("inspector_hover", ".jp-OutputArea")
    slider(book, "Token").focus()
    for _ in range(3):
        book.page.keyboard.press("ArrowRight")
    book.wait_for(lambda: strip.inner_text().startswith("3/43 “ fox”"))
    assert book.page.locator(".lab-tk .sel").inner_text() == " fox"
    book.wait_for(lambda: "token 3" in book.page.locator(".lab-chart").inner_html())
    # Tab reaches every control, each with a name.
    names = []
    book.page.locator(".widget-toggle-buttons, .widget-slider").first.scroll_into_view_if_needed()
    slider(book, "Step").focus()
    for _ in range(14):
        names.append(
            book.page.evaluate("""() => {
          const at = document.activeElement;
          const row = at.closest('.widget-inline-hbox');
          return at.labels?.[0]?.textContent || at.getAttribute('aria-label')
            || at.textContent || row?.querySelector('.widget-label')?.textContent;
        }""")
        )
        book.page.keyboard.press("Tab")
    for wanted in ("Step", "Sample", "Colour", "Search", "Refresh", "Token", "Table"):
        assert any(wanted == (n or "").strip() for n in names), (wanted, names)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colourings_in_both_themes(opened, theme):
    book = opened
    book.theme(theme)
    for name in ("log-ratio", "KL", "advantage", "value", "reward contribution"):
        choose(book, "Colour", name)
        book.wait_for(lambda: book.page.locator(".lab-tk .legend").count())
        book.page.wait_for_timeout(300)
        assert book.page.locator(".lab-tk .t[class*=' p'], .lab-tk .t[class*=' m']").count() > 3
        book.shot(f"inspector_{theme}_{name.split()[0]}", ".jp-OutputArea")
    colours = book.page.locator(".lab-tk .text").first.evaluate(
        "n => [getComputedStyle(n).color, getComputedStyle(n.parentNode).backgroundColor]"
    )
    assert colours[0] != colours[1]
    choose(book, "Colour", "none")
    book.wait_for(lambda: not book.page.locator(".lab-tk .t[class*=' p']").count())


def test_search_finds_hostile_text_and_shows_it_as_text(opened):
    book = opened
    book.page.get_by_label("Search", exact=True).fill("<SCRIPT>")
    book.wait_for(lambda: "step 3" in page_text(book))
    shown = page_text(book)
    assert "<script>window.hacked = 1</script>" in shown and "<img src=x onerror=" in shown
    assert '"><svg onload=' in shown and "U+202E" in shown
    assert "1 of 1 found" in book.text(0)
    assert book.page.locator(".lab-tk script, .lab-tk img, .lab-tk svg").count() == 0
    book.page.wait_for_timeout(300)
    assert book.page.evaluate("() => window.hacked") is None
    book.shot("inspector_hostile", ".jp-OutputArea")
    choose(book, "Colour", "advantage")
    book.page.locator(".lab-tk .t").first.hover()
    assert book.page.evaluate("() => window.hacked") is None


def test_the_next_hit_is_a_key_away(opened):
    book = opened
    book.page.get_by_label("Search", exact=True).fill("scary story with a frog")
    book.wait_for(lambda: f"of {STEPS} found" in book.text(0))
    following = book.page.get_by_role("button", name="Next")
    book.wait_for(following.is_enabled)  # a button that is greyed out takes no focus
    following.focus()
    before = page_text(book)
    book.page.keyboard.press("Enter")
    book.wait_for(lambda: page_text(book) != before)
    assert "frog" in book.page.locator(".lab-tk mark").first.inner_text()


def test_stages_side_by_side(notebook, tmp_path):
    runs = [
        make_run(tmp_path / "sft", "sft", before="base"),
        make_run(tmp_path / "ppo", "ppo", 2),
        make_run(tmp_path / "dpo", "dpo"),
    ]
    book = notebook(opening(*(r.folder for r in runs)), width=1500).run_all()
    book.page.wait_for_selector(".lab-tk .card")
    titles = book.page.locator(".lab-tk h4").all_inner_texts()
    assert titles == [
        "sft · before training (base)",
        "sft · after training",
        "ppo · after training",
        "dpo · after training",
    ]
    tops = [book.page.locator(".lab-tk .card").nth(i).bounding_box()["y"] for i in (0, 1, 2)]
    assert len(set(tops)) == 1  # beside one another
    book.shot("inspector_side_by_side", ".jp-OutputArea")


def test_a_saved_notebook_keeps_the_picture(opened):
    book = opened
    book.reopen_without_kernel()
    picture = book.page.locator("img[src*='lab-still'], .lab-still").first
    picture.wait_for(timeout=20_000)
    book.errors.clear()  # JupyterLab says that it has no model of the widget
    assert book.path.stat().st_size < 300_000
    book.shot("inspector_without_kernel", ".jp-OutputArea")
    book.errors.clear()
