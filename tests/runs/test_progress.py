"""Progress: throttled, one line, and never in the way."""

import io
import sys
import types

import pytest

from rlhf_lab.runs.progress import Progress, working


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


def work(progress: Progress, clock: Clock, steps: int, seconds: float) -> None:
    for i in range(steps):
        clock.now += seconds
        progress.update(note=f"reward {i}")


def test_a_terminal_line_rewrites_itself_five_times_a_second(clock):
    out = Terminal()
    progress = Progress(1000, "rollout", stream=out, clock=clock)
    work(progress, clock, 500, 0.01)  # five seconds
    shown = out.getvalue().split("\r")[1:]
    assert 20 <= len(shown) <= 27 and "\n" not in out.getvalue()
    assert shown[-1].startswith("rollout  ") and "ETA 0:05" in shown[-1]
    progress.close()
    assert out.getvalue().endswith("\n") and "500/1000   50%" in out.getvalue().split("\r")[-1]


def test_a_shorter_line_blanks_out_a_longer_one(clock):
    out = Terminal()
    progress = Progress(10, "x", stream=out, clock=clock)
    clock.now += 1
    progress.update(note="a long note")
    clock.now += 1
    progress.update(note="b")
    long, short = out.getvalue().split("\r")[-2:]
    assert len(short) >= len(long) and short.endswith(" ")


def test_a_terminal_line_fits_its_terminal(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    out = Terminal()
    Progress(10, "a label that is much longer than the line", stream=out, clock=clock).close()
    assert all(len(line.rstrip("\n")) <= 29 for line in out.getvalue().split("\r"))


def test_a_log_gets_a_line_every_ten_seconds_and_a_last_one(clock):
    out = io.StringIO()
    progress = Progress(100, "train", stream=out, clock=clock)
    work(progress, clock, 100, 0.5)
    progress.close()
    lines = out.getvalue().splitlines()
    assert len(lines) == 6 and "\r" not in out.getvalue()
    assert lines[0] == "train  20/100   20%  elapsed 0:10  ETA 0:40  reward 19"
    assert lines[-1] == "train  100/100  100%  elapsed 0:50  reward 99"


def test_closing_is_final(clock):
    out = io.StringIO()
    with Progress(3, "x", stream=out, clock=clock) as progress:
        progress.update()
    progress.close()
    progress.update()
    assert out.getvalue() == "x  1/3   33%  elapsed 0:00\n" and progress.done == 1
    assert repr(progress) == "Progress('x', 1/3)"


@pytest.mark.parametrize(("total", "text"), [(None, "x  2  elapsed"), (0, "2/0  100%")])
def test_totals_that_are_not_known_or_nothing(clock, total, text):
    progress = Progress(total, "x", stream=io.StringIO(), clock=clock)
    progress.update(2)
    assert text in progress.line() and "ETA" not in progress.line()


def test_almost_done_is_not_done(clock):
    progress = Progress(1000, "x", stream=io.StringIO(), clock=clock)
    progress.update(999)
    assert " 99%" in progress.line()


def test_notes_stay_on_one_line(clock):
    progress = Progress(2, "x", stream=io.StringIO(), clock=clock)
    progress.update(note="Once\nupon\r\x1b[2Ja time")
    assert progress.line().endswith("Once upon [2Ja time")


def test_an_output_that_went_away_does_not_stop_the_work(clock):
    out = io.StringIO()
    progress = Progress(5, "x", stream=out, clock=clock)
    out.close()
    clock.now += 20
    progress.update()
    progress.close()
    latin = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Progress(1, "βeta", stream=latin, clock=clock).close()
    latin.seek(0)
    assert latin.read().startswith("?eta")


@pytest.fixture
def shown(monkeypatch):
    """What a notebook is given to show."""
    shown: list[tuple[str, dict]] = []

    class Handle:
        def update(self, bundle, raw):
            shown.append(("update", bundle))

    def display(bundle, raw, display_id):
        shown.append(("display", bundle))
        return Handle()

    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())
    ipython.display = types.ModuleType("IPython.display")
    ipython.display.display = display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", ipython.display)
    return shown


def test_what_takes_seconds_is_said_at_once_and_leaves_nothing(shown):
    with working("reading a large file"):
        assert shown == [("display", {"text/plain": "reading a large file …"})]
    assert shown[1:] == [("update", {})]


def test_a_notebook_output_is_updated_in_place(clock, shown):
    progress = Progress(100, "sft", clock=clock)
    work(progress, clock, 100, 0.1)  # ten seconds: 20 updates at most
    progress.close()
    assert [kind for kind, _ in shown].count("display") == 1 and 18 <= len(shown) <= 23
    assert shown[0][1] == {"text/plain": "sft  0/100    0%  elapsed 0:00  ETA ?"}
    assert shown[-1][1]["text/plain"].startswith("sft  100/100  100%  elapsed 0:10")


def test_a_terminal_ipython_is_no_notebook(clock, monkeypatch, capsys):
    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    Progress(1, "x", clock=clock).close()
    assert capsys.readouterr().err.endswith("x  0/1    0%  elapsed 0:00\n")
