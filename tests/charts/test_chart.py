"""Charts are read back as XML: what is drawn, the words, and that nothing is left unescaped."""

import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stored_pictures import svg_of

from rlhf_lab.charts.chart import bar_chart, line_chart
from rlhf_lab.charts.frame import nice_ticks, tick_text, wrapped
from rlhf_lab.display import (
    counted,
    first_line,
    format_bytes,
    format_number,
    format_seconds,
    html_table,
    table,
)

SVG = "{http://www.w3.org/2000/svg}"


def lines(series, **more) -> ET.Element:
    return ET.fromstring(line_chart(series, **{"x_label": "step", "y_label": "loss", **more}))


def texts(svg: ET.Element) -> list[str]:
    return [t.text or "" for t in svg.iter(f"{SVG}text")]


def curves(svg: ET.Element) -> list[ET.Element]:
    return [p for p in svg.iter(f"{SVG}path") if p.get("fill") == "none"]


def tooltips(svg: ET.Element) -> list[str]:
    return [t.text for c in svg.iter(f"{SVG}circle") for t in c.iter(f"{SVG}title")]


def test_a_screen_reader_hears_the_last_values():
    svg = lines(
        {"loss": ([1, 2], [3.0, 2.25]), "eval_loss": ([1, 2, 3], [3.5, 2.5, math.nan])},
        title="Training",
        references=[(2.0, "floor")],
    )
    assert svg.get("role") == "img"
    assert svg.get("aria-label") == ("Training. loss: last 2.25; eval_loss: last 2.5; floor: 2")


def test_a_notebook_draws_it_trusted_or_not():
    """JupyterLab draws SVG only in notebooks that were run, an image with its data always."""
    picture = line_chart({"loss": ([1], [0.5])}, x_label="step", y_label="nats")
    bundle = picture._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"}
    assert bundle["text/plain"] == "nats. loss: last 0.5"
    assert ET.fromstring(svg_of(bundle)).get("aria-label") == "nats. loss: last 0.5"
    assert ET.fromstring(picture).get("aria-label") == "nats. loss: last 0.5"
    from IPython.core.formatters import DisplayFormatter

    shown, _ = DisplayFormatter().format(picture)
    assert shown["text/plain"] == picture.words  # though IPython prints a str as a str


def test_points_land_where_they_belong():
    svg = lines({"y": ([0, 10], [0.0, 1.0])})
    (path,) = curves(svg)
    (x1, y1), (x2, y2) = (map(float, p.split()) for p in path.get("d")[1:].split("L"))
    assert x2 > x1 and y2 < y1  # to the right, and up
    ticks = {t.text: float(t.get("y")) for t in svg.iter(f"{SVG}text")}
    assert ticks["1.0"] - 3.7 == pytest.approx(y2, abs=0.1)


def test_gaps_break_a_line_and_lonely_points_are_dots():
    svg = lines({"y": (range(8), [1, 2, None, 4, math.nan, 6, 7, math.inf])})
    (path,) = curves(svg)
    assert path.get("d").count("M") == 2  # 1-2 and 6-7
    dots = [c for c in svg.iter(f"{SVG}circle") if c.get("class") != "point"]
    assert len(dots) == 1  # the 4
    assert "nan" not in ET.tostring(svg, encoding="unicode").lower()


@pytest.mark.parametrize(
    "series",
    [
        {},
        {"empty": ([], [])},
        {"nothing": ([1, 2], [None, math.nan])},
    ],
)
def test_a_chart_without_data_has_words_for_it(series):
    svg = lines(series)
    assert "no data yet" in texts(svg) and not curves(svg)
    assert svg.get("aria-label")


def test_a_constant_is_a_line_in_the_middle():
    svg = lines({"beta": (range(5), [0.05] * 5)})
    heights = {float(p.split()[1]) for p in curves(svg)[0].get("d")[1:].split("L")}
    assert len(heights) == 1 and 80 < heights.pop() < 200


def test_series_differ_by_colour_and_dash():
    svg = lines({f"s{i}": ([0, 1], [i, i + 1]) for i in range(12)})
    looks = {(p.get("style"), p.get("stroke-dasharray")) for p in curves(svg)}
    assert len(looks) == 12
    assert len({p.get("stroke-dasharray") for p in curves(svg)[:3]}) == 3


def test_the_legend_wraps_and_never_lies_over_the_plot():
    names = [f"a rather long series name {i}" for i in range(9)]
    svg = lines({n: ([0, 1], [0, 1]) for n in names}, width=300)
    legend = {t.text: t for t in svg.iter(f"{SVG}text") if t.text in names}
    assert set(legend) == set(names)
    top = min(float(p.split()[1]) for c in curves(svg) for p in c.get("d")[1:].split("L"))
    assert max(float(t.get("y")) for t in legend.values()) < top
    assert len({(t.get("x"), t.get("y")) for t in legend.values()}) == 9
    assert float(svg.get("height")) >= 260  # it grows, the curves keep their room


def test_tooltips_are_thinned_and_keep_the_last_point():
    svg = lines({"loss": (range(1000), [1000.0 - i for i in range(1000)])})
    assert len(tooltips(svg)) == 60
    assert tooltips(svg)[0] == "loss: 1,000 (step 0)" and tooltips(svg)[-1] == "loss: 1 (step 999)"
    assert tooltips(lines({"one": ([3], [2.5])})) == ["one: 2.5 (step 3)"]


def test_a_long_series_is_thinned_but_its_spike_survives():
    ys = [1.0] * 50_000
    ys[31_234] = 9.0
    text = line_chart({"kl": (range(50_000), ys)}, x_label="step", y_label="KL")
    assert len(text) < 60_000
    heights = [float(p.split()[1]) for p in curves(ET.fromstring(text))[0].get("d")[1:].split("L")]
    assert heights.count(min(heights)) == 1 and max(heights) - min(heights) > 100


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", '"><b>', "a & b", "\x00\x1b\ud800"])
def test_everything_a_user_writes_is_escaped(evil):
    made = [
        line_chart(
            {evil: ([0], [1])},
            title=evil,
            x_label=evil,
            y_label=evil,
            references=[(1, evil)],
            band={evil: ([0], [0], [1])},
        ),
        bar_chart(
            {evil: {evil: 1}}, title=evil, y_label=evil, x_label=evil, references=[(1, evil)]
        ),
        html_table([{evil: evil}], caption=evil),
    ]
    for text in made:
        root = ET.fromstring(text)
        assert not [e for e in root.iter() if e.tag.endswith(("script", "}b"))]


def test_prose_in_a_table_keeps_its_width_and_numbers_beside_it_their_line():
    page = html_table(
        [{"step": 1, "what it means": "a sentence of more than thirty characters, so"}]
    )
    assert page.count("text-align:left;min-width:10em") == 2  # head and cell
    assert page.count("text-align:right;white-space:nowrap") == 2
    assert "width" not in html_table([{"step": 1, "name": "short"}])


def test_colours_follow_the_theme_with_fallbacks():
    text = line_chart({"a": ([0, 1], [0, 1])}, x_label="step", y_label="loss")
    used = re.findall(r"var\((--jp-[\w-]+)(, [^)]+)?\)", text)
    assert {name for name, _ in used} >= {"--jp-ui-font-color1", "--jp-layout-color0"}
    assert all(fallback for _, fallback in used)
    assert " id=" not in text and "url(" not in text and "http" not in text.replace(SVG[1:-1], "")


def test_axis_labels_and_references_are_written():
    svg = lines({"a": ([0, 9], [0.5, 0.7])}, y_label="accuracy (share)", references=[(0.9, "cap")])
    assert {"step", "accuracy (share)", "cap", "0", "8"} <= set(texts(svg))
    assert "0.9" in texts(svg)  # the range reaches the reference


def test_counted_things_have_no_half_ticks():
    svg = lines({"a": ([0, 1, 2], [5, 6, 7])})
    bottom = max(float(t.get("y")) for t in svg.iter(f"{SVG}text") if t.text != "step")
    assert [t.text for t in svg.iter(f"{SVG}text") if float(t.get("y")) == bottom] == [
        "0",
        "1",
        "2",
    ]


def test_a_series_of_two_lengths_is_an_error():
    with pytest.raises(ValueError, match="2 xs but 1 ys"):
        lines({"a": ([0, 1], [0])})


numbers = st.none() | st.floats() | st.integers(-(10**9), 10**9)


@given(st.dictionaries(st.text(max_size=8), st.lists(numbers, max_size=6), max_size=4))
def test_any_numbers_make_a_picture(data):
    svg = lines({name: (range(len(ys)), ys) for name, ys in data.items()}, references=[(1, "r")])
    width, height = float(svg.get("width")), float(svg.get("height"))
    for path in curves(svg):
        for piece in path.get("d")[1:].split("M"):
            for x, y in (map(float, p.split()) for p in piece.split("L")):
                assert 0 <= x <= width and 0 <= y <= height


# -- bars -------------------------------------------------------------------------------------
MEMORY = {
    "predicted": {"parameters": 3.0, "activations": 4.0},
    "measured": {"parameters": 3.0, "activations": 5.0, "workspace": math.nan},
}


def blocks(svg: ET.Element) -> list[ET.Element]:
    return [r for r in svg.iter(f"{SVG}rect") if r.get("class") == "block"]


def test_stacked_bars_stand_on_one_another_in_proportion():
    svg = ET.fromstring(bar_chart(MEMORY, title="Memory", y_label="GiB"))
    first, second, third, fourth = blocks(svg)
    heights = [float(b.get("height")) for b in (first, second, third, fourth)]
    assert heights[1] / heights[0] == pytest.approx(4 / 3, rel=0.01)
    assert heights[3] / heights[0] == pytest.approx(5 / 3, rel=0.01)
    stacked = float(second.get("y")) + float(second.get("height"))
    assert stacked == pytest.approx(float(first.get("y")), abs=0.15)
    assert svg.get("aria-label") == "Memory. predicted: 7; measured: 8"
    assert first.find(f"{SVG}title").text == "predicted, parameters: 3"
    assert {"predicted", "measured", "parameters", "activations", "7", "8"} <= set(texts(svg))


def test_bars_can_be_empty_many_or_long_named():
    assert "no data yet" in texts(ET.fromstring(bar_chart({}, y_label="GiB")))
    many = ET.fromstring(
        bar_chart({f"a very long name {i}": {"a": i} for i in range(40)}, y_label="s")
    )
    assert len(blocks(many)) == 40
    turned = [t for t in many.iter(f"{SVG}text") if "rotate(-35" in (t.get("transform") or "")]
    assert 10 < len(turned) <= 40


def test_a_negative_block_is_refused():
    with pytest.raises(ValueError, match="'a'.*negative"):
        bar_chart({"bar": {"a": -1.0}}, y_label="GiB")


# -- ticks and wording ------------------------------------------------------------------------
@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 10))
def test_ticks_are_round_few_and_inside(low, span, at_most):
    ticks = nice_ticks(low, low + span, at_most)
    assert 2 <= len(ticks) <= max(at_most + 1, 10)
    assert all(low - span * 1e-6 <= t <= low + span * (1 + 1e-6) for t in ticks)
    step = ticks[1] - ticks[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 1e-3


def test_ticks_by_hand():
    assert nice_ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert nice_ticks(0.05, 0.31, 5) == [0.1, 0.2, 0.3]
    assert nice_ticks(0, 2, 8, whole=True) == [0, 1, 2]
    assert [tick_text(t, [0, 0.5, 1]) for t in (0, 0.5, 1)] == ["0", "0.5", "1.0"]
    assert [tick_text(t, [0, 5e5, 1e6]) for t in (5e5, 1e6)] == ["0.5M", "1.0M"]
    assert tick_text(2000, [0, 2000]) == "2000" and tick_text(2e-5, [0, 2e-5]) == "2e-5"


def test_wrapping_loses_no_short_word():
    text = "predicted simulated and measured memory of one step"
    assert " ".join(wrapped(text, 13, 120)) == text and len(wrapped(text, 13, 120)) > 2


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, None, "–"),
        (math.nan, "s", "–"),
        (math.inf, "USD", "∞"),
        (0, None, "0"),
        (1234567, None, "1,234,567"),
        (0.123456, None, "0.1235"),
        (1.5e-7, None, "1.5e-7"),
        (-3.0, "nats", "-3 nats"),
        (3.42e12, "FLOP", "3.42 TFLOP"),
        (1.2e6, "tokens", "1.2 M tokens"),
        (512, "tokens", "512 tokens"),
        (1234.5, "USD", "$1,234.50"),
        (0.00123, "USD", "$0.00123"),
        (13.5 * 2**30, "B", "13.5 GiB"),
        (75, "s", "1 min 15 s"),
    ],
)
def test_numbers_read_well(value, unit, text):
    assert format_number(value, unit) == text


def test_counts_read_as_a_person_writes_them_and_errors_as_their_first_line():
    words = [counted(n, "row") for n in (0, 1, 2, 2048)]
    assert words == ["0 rows", "1 row", "2 rows", "2,048 rows"]
    assert [counted(x, "epoch") for x in (1.0, 1.5)] == ["1 epoch", "1.5 epochs"]
    assert first_line(ValueError("\n  one\ntwo")) == "one" and first_line(OSError()) == "OSError"


def test_bytes_and_seconds_by_hand():
    assert [format_bytes(b) for b in (0, 512, 1024, 2**30 - 1, 3 * 2**40)] == [
        *("0 B", "512 B", "1 KiB", "1 GiB", "3 TiB")
    ]
    assert [format_seconds(s) for s in (0, 1.2e-4, 0.5, 12.34, 59.99, 3599.9, 3720, 90000)] == [
        *("0 s", "120 µs", "500 ms", "12.3 s", "1 min", "1 h", "1 h 2 min", "1 d 1 h")
    ]


def test_a_plain_table_aligns_numbers_right():
    shown = table([{"name": "loss", "last": 2.5}, {"name": "kl", "last": 12}])
    assert shown.splitlines() == ["name  last", "----  ----", "loss   2.5", "kl      12"]
    assert table([]) == "(nothing to show)"
    assert table([{"a": "x\ny"}]).splitlines()[-1] == "x y"
