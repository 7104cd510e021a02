"""The reader's own prediction: kept, checked, and shown beside what came out."""

import pytest

import rlhf_lab as lab
from rlhf_lab.widgets import guess as guess_module
from rlhf_lab.widgets.guess import NONE_YET


def test_a_guess_stands_beside_what_was_predicted_and_measured():
    peak = lab.guess("How many MiB is the peak?", unit="MiB", value=100)
    lines = repr(peak.reveal(predicted=137.0, measured=125.0)).splitlines()
    assert lines[0] == "How many MiB is the peak?"
    assert [line.split()[:3] for line in lines[3:]] == [
        ["your", "guess", "100"],
        ["predicted", "137", "MiB"],
        ["measured", "125", "MiB"],
    ]
    assert "0.80 times" in lines[3]  # 100 of the 125 measured, not of the 137 predicted


def test_of_choices_one_is_right():
    phase = lab.guess("Which takes longest?", ["rollout", "updates"], value="rollout")
    assert "something else" in repr(phase.reveal(measured="updates", because="it is tiny"))
    phase.value = "updates"
    shown = repr(phase.reveal(measured="updates", because="it is tiny"))
    assert "right" in shown and shown.endswith("it is tiny")


def test_without_a_guess_run_all_goes_on():
    peak = lab.guess("How many?")
    assert peak.value is None
    assert NONE_YET in repr(peak.reveal(measured=3))


def test_what_is_no_answer_is_refused_in_a_line():
    with pytest.raises(ValueError, match="'many' is no number such as 8.5: How many"):
        lab.guess("How many?", unit="MiB", value="many")
    with pytest.raises(ValueError, match="'c' is none of a, b: Which"):
        lab.guess("Which?", ["a", "b"]).value = "c"
    with pytest.raises(ValueError, match="give predicted, simulated, measured, known"):
        lab.guess("How many?").reveal(real=3)
    with pytest.raises(ValueError, match="nothing to reveal"):
        lab.guess("How many?").reveal()
    typed = lab.guess("How many?", unit="MiB")
    typed._box.value = "lots"  # what somebody types is told in the table, and breaks no cell
    assert "'lots' is no number" in repr(typed.reveal(measured=3))


@pytest.mark.parametrize("typed", ["8,9", "nan", "inf", "1,02", "eight"])
def test_a_number_is_read_as_meant_or_not_at_all(typed):
    """8,9 was taken for 89; thousands may have their commas."""
    with pytest.raises(ValueError, match="is no number such as 8.5: How many[?]$"):
        lab.guess("How many?", value=typed)
    assert lab.guess("How many?", value="12,345.5").value == 12345.5
    for unit, shown in {"USD": "$60,000", "GiB": "60,000 GiB", "%": "60,000%"}.items():
        assert lab.guess("How many?", unit=unit, value=shown).value == 60_000
    assert "against it" in repr(lab.guess("How many?", value=-3).reveal(measured=9))
    assert "times" not in repr(lab.guess("How many?", value=-3).reveal(measured=9))


def test_a_guess_that_comes_later_is_put_into_the_table(monkeypatch):
    updates = []
    handle = type("Handle", (), {"update": lambda _, new, raw: updates.append(new["text/plain"])})
    monkeypatch.setattr(guess_module, "notebook_display", lambda: lambda *_, **__: handle())
    peak = lab.guess("How many MiB is the peak?", unit="MiB")
    peak.reveal(measured=1250.0)._ipython_display_()
    peak._box.value = "1,000"
    assert "1,000 MiB" in updates[-1] and "0.80 times" in updates[-1]


def test_what_a_question_says_is_text():
    shown = lab.guess("<script>", ["<b>"], value="<b>").reveal(measured="<b>", because="<i>")
    assert not any(tag in shown._repr_html_() for tag in ("<script>", "<b>", "<i>"))
