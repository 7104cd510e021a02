"""The live chart without a browser: what goes over the wire, when, and what stays behind."""

import math
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stored_pictures import svg_of

import rlhf_lab.widgets.live as live
from rlhf_lab.charts.chart import bar_chart, line_chart
from rlhf_lab.charts.frame import GREY_GRID, GREY_TEXT, Picture, grid
from rlhf_lab.widgets.live import Chart, Showing, mime_bundle

SVG = "{http://www.w3.org/2000/svg}"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def picture(values=(1.0, 2.0), title="Loss", **more):
    axes = {"x_label": "step", "y_label": "nats"}
    return line_chart({"loss": (range(len(values)), values)}, title=title, **axes, **more)


def sent(chart: Chart) -> str:
    return zlib.decompress(chart.svg).decode()


# -- what is sent -----------------------------------------------------------------------------
def test_the_synced_trait_holds_the_whole_picture():
    """A page that is reloaded asks the kernel for the state: it must be all there."""
    chart = Chart(picture([3.0, 2.5, 2.25]))
    assert sent(chart) == chart.picture.live
    assert chart.get_state()["svg"] == chart.svg
    path = next(p for p in ET.fromstring(sent(chart)).iter(f"{SVG}path"))
    assert path.get("d").count("L") == 2


def test_live_and_still_differ_only_in_how_values_are_read():
    chart = picture([3.0, 2.5, 2.25])
    still, moving = ET.fromstring(chart), ET.fromstring(chart.live)
    for svg in (still, moving):
        assert svg.get("aria-label") == "Loss. loss: last 2.25"
    assert "<title>loss: 2.25 (step 2)</title>" in chart and "data-x" not in chart
    assert "<title>" not in chart.live
    (reading,) = (g for g in moving.iter(f"{SVG}g") if g.get("class") == "curve")
    assert reading.get("data-name") == "loss"
    assert reading.get("data-x") == "0 1 2" and reading.get("data-y") == "3 2.5 2.25"
    drawn = [[p.get("d") for p in svg.iter(f"{SVG}path")] for svg in (still, moving)]
    assert drawn[0] == drawn[1]


def test_a_reading_lies_where_the_axes_say():
    """The script places dots by data-box, data-xs and data-ys: they must meet the curve."""
    svg = ET.fromstring(picture([0.0, 1.0, 4.0]).live)
    plot = next(g for g in svg.iter(f"{SVG}g") if g.get("class") == "plot")
    left, top, right, bottom = map(float, plot.get("data-box").split())
    x0, x1 = map(float, plot.get("data-xs").split())
    y0, y1 = map(float, plot.get("data-ys").split())
    curve = next(g for g in plot if g.get("class") == "curve")
    xs, ys = (list(map(float, curve.get(f"data-{a}").split())) for a in "xy")
    wide, high = (right - left) / (x1 - x0), (bottom - top) / (y1 - y0)
    placed = [(left + (x - x0) * wide, bottom - (y - y0) * high) for x, y in zip(xs, ys)]
    (path,) = svg.iter(f"{SVG}path")
    for here, there in zip(placed, path.get("d")[1:].split("L"), strict=True):
        assert here == pytest.approx(tuple(map(float, there.split())), abs=0.11)


def test_a_long_history_is_thinned_for_the_wire_and_its_spike_survives():
    values = [math.sin(i / 50) for i in range(50_000)]
    values[31_234] = 9.0
    long = picture(values)
    assert len(zlib.compress(long.live.encode())) < 4_000
    assert "9" in re.search(r'data-y="([^"]*)"', long.live)[1].split()


EVIL = ["<script>alert(1)</script>", '"><b onload="x">', "a & b", "\x00\x1b\ud800", "'/>"]


@pytest.mark.parametrize("evil", EVIL)
def test_hostile_names_stay_text_in_what_is_sent(evil):
    chart = line_chart(
        {evil: ([0, 1], [1, 2])}, title=evil, x_label=evil, y_label=evil, references=[(1, evil)]
    )
    both = grid([chart, bar_chart({evil: {evil: 1.0}}, y_label=evil)], title=evil)
    for text in (chart.live, both, both.live):
        tags = {e.tag.removeprefix(SVG) for e in ET.fromstring(text).iter()}
        assert tags <= {"svg", "g", "path", "line", "rect", "circle", "text", "title"}
        assert not [k for e in ET.fromstring(text).iter() for k in e.attrib if k.startswith("on")]


# -- when it is sent --------------------------------------------------------------------------
def test_redraws_wait_for_one_another_and_the_last_is_never_lost():
    clock = Clock()
    chart = Chart(clock=clock)
    shown = []
    chart.observe(lambda change: shown.append((clock.now, sent(chart))), "svg")
    for i in range(101):  # ten a second
        clock.now = 100 + i / 10
        chart.draw(picture([1.0, float(i)]))
    times = [at for at, _ in shown]
    assert min(b - a for a, b in zip(times, times[1:])) >= 0.2 - 1e-9
    assert len(times) > 30
    chart.draw(picture([1.0, 12345.0]))  # comes too early
    assert "12,345" not in sent(chart) and "12,345" in chart.picture.words
    chart.flush()
    assert "last 12,345" in sent(chart)
    chart.flush()
    assert len(shown) == len(times) + 1


def test_a_redraw_that_is_skipped_is_not_drawn():
    clock, drawn = Clock(), []
    chart = Chart(clock=clock)
    for i in range(10):
        chart.draw(lambda i=i: drawn.append(i) or picture([i, i + 1]))
    assert drawn == [0]
    assert chart.picture.words.endswith("last 10") and drawn == [0, 9]
    chart.flush()
    assert drawn == [0, 9]  # drawn once, although asked for and sent


def test_now_does_not_wait():
    clock = Clock()
    chart = Chart(picture(), clock=clock)
    chart.draw(picture([5.0, 6.0]), now=True)
    assert "last 6" in sent(chart)


@pytest.mark.parametrize("points", [20, 400])
def test_no_minute_carries_a_megabyte(points, monkeypatch):
    """A training loop that draws a hundred times a second for three minutes, on a machine that
    draws in no time."""
    clock, random_ = Clock(), random.Random(0)
    monkeypatch.setattr(live.time, "thread_time", lambda: 0.0)
    chart = Chart(clock=clock)
    sizes: list[tuple[float, int]] = []
    chart.observe(lambda c: sizes.append((clock.now, len(c.new) + live.ENVELOPE)), "svg")

    def noisy():
        series = {
            name: (range(points), [random_.gauss(0, 1) for _ in range(points)])
            for name in ("a", "b", "c", "d")
        }
        return line_chart(series, x_label="step", y_label="nats")

    for i in range(18_000):
        clock.now = 100 + i / 100
        chart.draw(noisy)
    busiest = max(sum(s for at, s in sizes if start <= at < start + 60) for start, _ in sizes)
    assert busiest < 1e6 - len(chart._esm) - len(chart._css)
    assert len(sizes) > 150


def test_drawing_takes_a_small_share_of_the_time(monkeypatch):
    """A picture that takes 50 ms to draw comes every 2.5 s, however often `draw` is called."""
    clock, drawn = Clock(), []
    monkeypatch.setattr(live.time, "thread_time", clock)

    def slow():
        clock.now += 0.05
        drawn.append(clock.now)
        return picture()

    chart = Chart(clock=clock)
    for _ in range(10_000):
        clock.now += 0.001
        chart.draw(slow)
    assert len(drawn) == 4


@given(st.lists(st.floats(0, 3), min_size=2, max_size=40))
def test_any_pace_ends_with_the_last_picture(pauses):
    clock = Clock()
    chart = Chart(clock=clock)
    last = picture()
    for i, pause in enumerate(pauses):
        clock.now += pause
        last = picture([0.0, float(i)])
        chart.draw(last)
    chart.flush()
    assert sent(chart) == last.live


# -- grids ------------------------------------------------------------------------------------
def test_a_grid_places_its_pictures_side_by_side():
    drawing = grid(
        [picture(title=f"p{i}", width=300, height=200) for i in range(3)], 2, title="All"
    )
    svg = ET.fromstring(drawing)
    inner = [(s.get("x"), s.get("y")) for s in svg.iter(f"{SVG}svg") if s.get("x")]
    assert inner == [("0", "28"), ("308", "28"), ("0", "236")]
    assert drawing.size == (608, 436)
    assert (svg.get("width"), svg.get("height")) == ("608", "436")
    assert svg.get("aria-label") == "All. " + ". ".join(f"p{i}. loss: last 2" for i in range(3))
    assert not [s for s in svg.iter(f"{SVG}svg") if s is not svg and s.get("aria-label")]
    plots = [g for g in ET.fromstring(drawing.live).iter(f"{SVG}g") if g.get("class") == "plot"]
    assert len(plots) == 3


def test_grids_nest_and_can_be_empty():
    assert ET.fromstring(grid([])).get("role") == "img"
    inner = grid([picture()] * 2)
    outer = grid([inner, picture()], columns=1)
    assert len([g for g in ET.fromstring(outer.live).iter() if g.get("class") == "plot"]) == 3


# -- what stays -------------------------------------------------------------------------------
def test_a_frozen_chart_is_a_picture_and_its_words():
    chart = Chart()
    assert mime_bundle(chart.picture) == {"text/plain": "no picture yet"}
    chart.draw(picture([2.0, 1.5]), now=True)
    frozen = mime_bundle(chart.picture)
    assert set(frozen) == {"text/html", "text/plain"}
    assert frozen["text/plain"] == "Loss. loss: last 1.5"
    assert 'alt="Loss. loss: last 1.5"' in frozen["text/html"]


def test_an_image_is_legible_on_a_light_page_and_on_a_dark_one():
    """A page's colours do not reach into an image: it brings its own, and no background."""
    svg = svg_of(mime_bundle(picture([2.0, 1.5])))
    background = next(ET.fromstring(svg).iter(f"{SVG}rect"))
    assert background.get("style") == "fill:none"
    greys = {c for c in re.findall('(?:fill|stroke):([^;"]+)', svg)}
    assert greys & {GREY_TEXT, GREY_GRID} and not [c for c in greys if c.startswith("var(")]

    def luminance(colour: str) -> float:  # WCAG 2.2
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05

    text = luminance(GREY_TEXT)
    assert min(luminance("#ffffff") / text, text / luminance("#111111")) > 4.2


def test_a_grid_is_kept_as_images_that_wrap_on_a_narrow_page():
    parts = [picture(title=f"p{i}", width=300, height=200) for i in range(3)]
    bundle = mime_bundle(grid(parts, title="All <three>"))
    images = re.findall(
        '<img [^>]*alt="(p[0-9])[^>]* width="300" style="max-width:max[(]100%,180px[)]"',
        bundle["text/html"],
    )
    assert images == ["p0", "p1", "p2"]
    assert bundle["text/html"].startswith("<div><b>All &lt;three&gt;</b></div>")
    assert "All <three>. p0" in bundle["text/plain"]


def test_a_large_picture_is_saved_without_what_an_image_cannot_show():
    many = grid([picture([i / 7 for i in range(100)], title=f"p{i}") for i in range(6)], title="T")
    large = Picture(str(many), many.words, many.live, many.size)  # in one piece
    frozen = svg_of(live.mime_bundle(large))
    assert len(frozen) < len(large) / 2
    shown, whole = ET.fromstring(frozen), ET.fromstring(large)
    assert not [e for e in shown.iter() if e.tag == f"{SVG}title" or e.get("data-x")]
    for tag in ("text", "path", "line"):
        assert len(list(shown.iter(f"{SVG}{tag}"))) == len(list(whole.iter(f"{SVG}{tag}")))


def test_the_same_widget_is_always_named_the_same():
    assert repr(Chart(picture())) == repr(Chart()) == "Chart()"


def test_outside_a_notebook_the_words_are_printed(capsys):
    drawing = picture([2.0, 1.5])
    showing = Showing(Chart(drawing), lambda: drawing)
    assert capsys.readouterr().out == "Loss. loss: last 1.5\n"
    showing.refresh(now=True)
    assert showing.freeze() == mime_bundle(drawing)
    assert capsys.readouterr().out == ""


class Notebook:
    """Stands for IPython's display: outputs by number, with what was put there in order."""

    def __init__(self):
        self.outputs = []

    def __call__(self, shown, raw=False, display_id=None):
        place = [shown]
        self.outputs.append(place)
        handle = type("Handle", (), {"update": lambda _, new, raw=False: place.append(new)})
        return handle() if display_id else None


@pytest.fixture
def notebook(monkeypatch):
    page_outputs = Notebook()
    monkeypatch.setattr(live, "notebook_display", lambda: page_outputs)
    return page_outputs


def test_a_picture_stands_beside_a_widget_and_follows_it(notebook, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(live.time, "monotonic", clock)
    values = [1.0]
    chart = Chart()
    showing = Showing(chart, lambda: picture(values))
    beside, box = notebook.outputs
    assert '<img class="lab-still" ' in beside[0]["text/html"]
    assert live.NOTE in beside[0]["text/html"] and repr(box[0]) == live.NOTE
    assert chart in box[0].children
    values.append(7.0)
    showing.refresh()  # within two seconds: not yet
    assert len(beside) == 1
    clock.now += 2.1
    showing.refresh()
    assert len(beside) == 2 and beside[1]["text/plain"].endswith("last 7")
    values.append(8.0)
    showing.refresh(now=True)
    assert beside[2]["text/plain"].endswith("last 8")


def test_freezing_leaves_the_picture_alone(notebook):
    showing = Showing(Chart(), picture)
    beside, box = notebook.outputs
    showing.freeze()
    assert beside[-1] == live.mime_bundle(picture())
    assert box[-1] == {}  # nothing is shown, nothing is saved that a later reader cannot see
    showing.refresh(now=True)
    showing.freeze()
    assert len(beside) == 2


def test_a_run_that_ends_has_one_output(notebook):
    chart = Chart()
    showing = Showing(chart, picture, beside=False)
    showing.refresh(now=True)
    (place,) = notebook.outputs
    assert place == [chart]
    showing.freeze()
    assert place[-1] == mime_bundle(picture())


def test_all_our_scripts_are_small_and_ask_nobody():
    files = [p for p in Path(live.__file__).parent.iterdir() if p.suffix in (".js", ".css")]
    assert {p.name for p in files} >= {"chart.js", "chart.css"}
    assert sum(p.stat().st_size for p in files) <= 60_000
    for path in files:
        text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "://" not in re.sub(r"^\s*//.*|\s// .*", "", text, flags=re.M)
        assert not re.search("innerHTML|outerHTML|insertAdjacentHTML|@import|eval", text), path.name


def test_a_script_that_never_draws_loads_no_widgets():
    code = "import sys, rlhf_lab.charts.chart; print('ipywidgets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
