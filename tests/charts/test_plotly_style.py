"""What all figures share: thinned curves, units, any text as text, looks, how they travel.

pytest tests/charts/test_plotly_style.py
"""

import html
import json
import subprocess
import sys
from types import SimpleNamespace

import plotly.io as pio
import pytest
from figure_kit import contrast, lines, rgb, table
from hypothesis import example, given
from hypothesis import strategies as st

from rlhf_lab.charts.cost_bars import stage_costs
from rlhf_lab.charts.curves import curves
from rlhf_lab.charts.frame import thinned_indices
from rlhf_lab.charts.frontier import frontier
from rlhf_lab.charts.plotly_style import MIME, THEMES, Figure, safe, unit_of

HOSTILE = '<script>alert(1)</script> <img src=x onerror="go()"> &lt;b&gt; $x$ %{y} \x1b[31m\x00'


@given(
    st.lists(st.one_of(st.none(), st.floats(-1e9, 1e9)), min_size=1, max_size=300),
    st.integers(4, 60),
)
@example([0.0] * 10 + [None] + [0.0] * 10, 4)
def test_thinning_keeps_ends_extremes_and_gaps(column, at_most):
    found = thinned_indices(column, at_most=at_most)
    assert found == sorted(set(found)) and {0, len(column) - 1} <= set(found)
    assert len(found) <= max(at_most, 3 * (at_most // 2) + 2)
    real, left = [[v for v in c if v is not None] for c in (column, [column[i] for i in found])]
    if real:
        assert (min(left), max(left)) == (min(real), max(real))
    assert (None in column) == any(column[i] is None for i in found)


def test_units_read_well():
    assert unit_of("bytes", 3 * 2**30) == ("GiB", 2**30)
    assert unit_of("bytes", 100) == ("B", 1)
    assert unit_of("seconds", 5 * 3600) == ("hours", 3600)
    assert unit_of("seconds", 0.02) == ("milliseconds", 1e-3)
    assert unit_of("flops", 3e13) == ("TFLOP", 1e12)
    assert unit_of("tokens", 2e6) == ("M tokens", 1e6)
    assert unit_of("money", 2e6) == ("USD", 1)


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


@given(st.text(max_size=60))
def test_safe_text_is_shown_letter_by_letter(text):
    shown = safe(text, 80)
    assert not set("<>$%{}\n") & set(shown)
    line = " ".join(text.split())
    assert html.unescape(shown) == "".join(c if c.isprintable() else "\ufffd" for c in line)
    assert len(html.unescape(safe(text, 10))) <= 10


def test_hostile_names_are_only_names(made):
    run = made(
        "x",
        {1: {"kl": 1.0, HOSTILE: 2.0, "gold_reward": 1.0}},
        model=HOSTILE,
        summary={"kl": 1.0, "gold_reward": 1.0},
    )
    ledger = SimpleNamespace(ledger=table())
    figures = [
        curves({HOSTILE: run}, metrics=["kl", HOSTILE]),
        frontier({HOSTILE: run}),
        frontier({HOSTILE: run}, reward=HOSTILE),
        stage_costs({HOSTILE: ledger}, quantity="bytes"),
        curves(run, made("y", {1: {"kl": 2.0}}, model="tiny"), metrics=["kl"]),
    ]
    for figure in figures:
        bundle = json.loads(figure.to_json())
        for trace in bundle["data"]:
            trace.pop("legendgroup", None)  # a key, never shown
        bundle["layout"].pop("meta")  # the words, plain text
        for text in strings(bundle):
            assert "<script" not in text and "<img" not in text and "$x$" not in text
            assert "%{y}" not in text and "\x1b" not in text and "\x00" not in text
        assert "\x1b" not in figure.words and "\x00" not in figure.words
    names = [t.name for t in lines(figures[0])]
    assert html.unescape(names[0]).startswith("<script>alert(1)</script>")


def test_text_reads_on_light_and_dark_backgrounds():
    text, white, black = ({n: rgb(c[0]) for n, c in THEMES.items()}, rgb("#FFFFFF"), rgb("#111111"))
    assert contrast(rgb("#000000"), white) == pytest.approx(21)
    assert min(contrast(text["both"], white), contrast(text["both"], black)) >= 4.2
    assert min(contrast(text["light"], white), contrast(text["dark"], black)) >= 7
    figure = stage_costs(table(), quantity="bytes")
    assert figure.layout.font.color == THEMES["both"][0]
    assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0,0,0,0)"
    dark = stage_costs(table(), quantity="bytes", theme="dark")
    assert dark.layout.font.color == THEMES["dark"][0]


def test_a_notebook_gets_data_and_words_and_no_copy_of_plotly(monkeypatch):
    figure = stage_costs(table(), quantity="bytes")
    for default in ("plotly_mimetype", "plotly_mimetype+notebook", "vscode"):
        monkeypatch.setattr(pio.renderers, "default", default)
        bundle = figure._repr_mimebundle_()
        assert set(bundle) == {MIME, "text/plain"}
        assert bundle["text/plain"] == figure.words == repr(figure)
        assert len(json.dumps(bundle)) < 10_000
    seen = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: seen.append(data))
    figure._ipython_display_()
    figure.show()
    assert seen == [bundle, bundle]
    monkeypatch.setattr(pio.renderers, "default", "json")  # someone else's way
    assert set(figure._repr_mimebundle_()) == {"application/json"}
    assert repr(Figure()).startswith("Figure(")


def test_no_torch_for_a_figure():
    code = "import sys, rlhf_lab.charts.frontier; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
