"""Coloured tokens: every shade, every number, and that no text does anything.

Run: pytest tests/charts/test_tokens_view.py
"""

import math
import re
import xml.etree.ElementTree as ET

import pytest
from figure_kit import contrast, rgb
from hypothesis import given
from hypothesis import strategies as st
from sample_runs import EVIL, FIGURES, Read, make, record

from rlhf_lab.charts import tokens_view as view
from rlhf_lab.charts.tokens_picture import INK, WIDTH, on_white, tokens_picture
from rlhf_lab.charts.tokens_view import LEVELS, STYLE, Scale, Tokens, scale_of, shade
from rlhf_lab.widgets.inspector import Inspector

SVG = "{http://www.w3.org/2000/svg}"
anything = st.text(st.characters(exclude_categories=()), max_size=40) | st.sampled_from(EVIL)


@given(anything)
def test_any_text_comes_back_exactly_and_brings_no_tag(text):
    read = Read(view.visible(text))
    assert read.text == text
    assert read.tags <= {"i"} and read.attributes <= {"class"}


@given(st.lists(anything, max_size=6), anything)
def test_any_tokens_come_back_exactly(texts, wanted):
    figures = {"log_ratio": [0.5] * len(texts)}
    made = view.tokens_html(Tokens(texts, figures=figures), "log_ratio", Scale(0, 1), wanted, 0)
    read = Read(made)
    assert read.text == "".join(texts)
    assert read.tags <= {"span", "i"} and read.attributes <= {"class", "data-tip"}
    assert Read(view.marked("".join(texts), wanted)).text == "".join(texts)


@given(anything)
def test_in_one_line_of_plain_text_everything_is_visible(text):
    made = view.plain(text)
    assert "\n" not in made and not re.search(
        "[\x00-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", made
    )


def test_line_breaks_and_unseen_characters_by_hand():
    assert view.visible("a\nb") == 'a<i class="nl"></i>\nb'
    assert view.visible("<\u202e&") == '&lt;<i class="un">U+202E</i>&amp;'
    assert view.visible("\U0001f469\u200d\U0001f680 caf\u00e9 \u05d0") == (
        "\U0001f469\u200d\U0001f680 caf\u00e9 \u05d0"
    )
    assert view.plain("a\n\tb\x00") == "a⏎⇥b[U+0000]"


# -- colours ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("background", "text"),
    [("#ffffff", "#212121"), ("#111111", "#ffffff"), ("#ffffff", "#222222")],
)
def test_letters_can_be_read_on_every_shade_in_both_themes(background, text):
    for level in range(-LEVELS, LEVELS + 1):
        colour, opacity = shade(level)
        pairs = zip(rgb(colour), rgb(background), strict=True)
        mixed = [opacity * over + (1 - opacity) * under for over, under in pairs]
        assert contrast(mixed, rgb(text)) >= 4.5, level
        assert contrast(rgb(on_white(level)), rgb(INK)) >= 4.5, "in a stored picture"
        assert level == 0 or f".lab-tk .{'p' if level > 0 else 'm'}{abs(level)}{{" in STYLE


def test_a_scale_by_hand():
    scale = Scale(0.0, 2.0)
    assert [scale.level(x) for x in (0, 2, -2, 1, -0.5, 9, -9, None)] == [0, 8, -8, 4, -2, 8, -8, 0]
    assert (scale.start, scale.end) == ("≤ -2", "≥ 2")
    assert Scale(0, 0.5, one_sided=True).start == "0"


def test_scales_of_a_run_by_hand():
    tokens = Tokens.of(record(**FIGURES), "")
    assert scale_of("log_ratio", [tokens]) == Scale(0.0, 2.0)
    assert scale_of("advantage", [tokens]) == Scale(0.0, 1.0)
    assert scale_of("value", [tokens]) == Scale(2.0, 1.0)  # around the median
    assert scale_of("reward", [tokens]) == Scale(0.0, 0.2)  # the score, last, is off the scale
    k3 = [math.exp(-x) - 1 + x for x in FIGURES["log_ratio"]]
    assert tokens.figures["kl"] == pytest.approx(k3)
    assert scale_of("kl", [tokens]) == Scale(0.0, 5.0, one_sided=True)  # e² − 3 = 4.39
    assert scale_of("log_ratio", [Tokens.of(None, "a b")]) is None
    assert scale_of("log_ratio", []) is None


def test_one_wild_token_does_not_take_the_colours_from_all_others():
    calm = Tokens(["x"] * 99, figures={"log_ratio": [0.1] * 98 + [50.0]})
    assert scale_of("log_ratio", [calm]).reach == pytest.approx(0.1)


def test_tokens_are_shaded_by_one_figure_and_their_tooltip_has_all():
    tokens = Tokens.of(record(**FIGURES), "")
    html = view.tokens_html(tokens, "log_ratio", Scale(0, 2), "", 1)
    spans = re.findall(r'<span class="([^"]*)" data-tip="([^"]*)">([^<]*|&lt;end&gt;)</span>', html)
    assert [c for c, _, _ in spans] == ["t", "t p4 sel", "t m8", "t p2", "t sp"]
    tooltip = spans[2][1].replace("\xa0", " ")
    assert tooltip == (
        "3/5 “ ran” · log-ratio -2 · KL (k3) 4.389 · advantage -1 · value 2 · "
        "reward contribution 0.2 · return 2.1 · log π -3"
    )
    plain = view.tokens_html(tokens, "", None)
    assert not re.search(r"\b[pm]\d", re.sub('data-tip="[^"]*"', "", plain))


numbers = st.none() | st.floats() | st.integers() | st.text(max_size=2)
jsonish = st.recursive(numbers | st.booleans(), lambda s: st.lists(s, max_size=3))


names = st.sampled_from(["text", "special", *FIGURES])
records = st.dictionaries(names, st.lists(jsonish, max_size=4) | jsonish, max_size=7)


@given(records, st.text(max_size=9))
def test_whatever_a_record_holds_the_response_is_shown(found, response):
    tokens = Tokens.of(found, response)
    assert all(len(xs) == len(tokens.text) for xs in tokens.figures.values())
    assert all(x is None or math.isfinite(x) for xs in tokens.figures.values() for x in xs)
    for key in view.QUANTITIES:
        scale = scale_of(key, [tokens])
        assert Read(view.tokens_html(tokens, key, scale)).text == "".join(tokens.text)
    if not isinstance(found.get("text"), list) or not found["text"]:
        assert "".join(tokens.text) == response
    view.token_rows(tokens)


# -- the picture ------------------------------------------------------------------------------
def drawn(picture):
    return [t.text for t in ET.fromstring(picture).iter(f"{SVG}text")]


def test_the_picture_holds_prompt_figures_tokens_and_legend(tmp_path):
    shown = Inspector(make(tmp_path / "run"))
    shown.colour.value = "advantage"
    texts = drawn(shown.still())
    assert texts[:2] == ["first at 3", "run · step 3"]
    assert texts[3:8] == ["A", "fox", "ran", ".", "<end>"]
    assert texts[-3:] == [
        "advantage (whitened):",
        "≤ -1 made less likely",
        "≥ 1 made likelier",
    ]
    shades = [
        r for r in ET.fromstring(shown.still()).iter(f"{SVG}rect") if r.get("class") == "shade"
    ]
    assert len(shades) == 4 + 2 * LEVELS  # of five tokens one is in the middle
    assert shown.still().words.startswith("run · step 3: A fox ran.<end> (")


@given(st.lists(st.text("ab <&\n中", max_size=12) | st.just("x" * 200), max_size=40))
def test_no_token_is_lost_or_drawn_outside_of_the_picture(texts):
    picture = tokens_picture([("t", "f", "p", Tokens(texts))])
    root = ET.fromstring(picture)
    placed = [t for t in root.iter(f"{SVG}text") if t.get("textLength")]
    for text in placed:
        assert float(text.get("x")) + float(text.get("textLength")) <= WIDTH
        assert float(text.get("y")) <= float(root.get("height"))
    bare = "".join("".join(texts).replace("\n", "⏎").split())
    drawn_text = "".join("".join(t.text for t in placed).split())
    assert drawn_text == bare or any("more" in (t.text or "") for t in root.iter(f"{SVG}text"))


def test_words_stay_whole_where_lines_break():
    texts = [" some", "where", " over", " the", " rain", "bow"] * 12
    placed = [
        t
        for t in ET.fromstring(tokens_picture([("t", "f", "p", Tokens(texts))])).iter()
        if t.get("textLength")
    ]
    lines = {}
    for text in placed:
        lines.setdefault(text.get("y"), []).append(text.text)
    assert len(lines) > 1
    assert all(line[0] not in ("where", "bow") for line in lines.values())
