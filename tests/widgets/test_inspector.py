"""The rollout inspector: what it shows of runs written by hand.

Run: pytest tests/widgets/test_inspector.py
"""

import re
import xml.etree.ElementTree as ET

import pytest
from sample_runs import EVIL, FIGURES, HARMLESS, OURS, Read, make, record

from rlhf_lab.charts import tokens_view as view
from rlhf_lab.charts.samples import HELD_OUT, TRAINING, SampleSet
from rlhf_lab.runs.run import Run
from rlhf_lab.widgets.inspector import Inspector

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("evil", EVIL)
def test_hostile_text_is_shown_everywhere_and_runs_nowhere(tmp_path, evil):
    # What reaches a disk as JSON and comes back, with a run's own name as hostile as a file can be.
    name = "<img src=x onerror=alert(1)>"
    run = Run.create(tmp_path / name, stage="ppo", model="m", settings={})
    row = {"prompt": evil, "response": evil, "reward": 1.0, evil: 2.0}
    texts = [evil[:5], evil[5:]]
    tokens = {"text": texts, "log_ratio": [1.0, -1.0], "value": [1.0, 2.0], "special": [1]}
    run.sample(1, [{**row, "tokens": tokens}])
    run.sample(2, [{**row, "when": evil}])
    shown = Inspector(run)
    for mode in (TRAINING, HELD_OUT):
        shown.mode.value = mode
        for part in (shown._page, shown._status, shown._legend, shown._count):
            read = Read(part.value)
            assert read.tags <= OURS and read.attributes <= HARMLESS, part.value
            part.value.encode()  # a lone surrogate could not be sent
        assert evil.rstrip("\n") in Read(shown._page.value).text
        "".join(label for label, _ in shown.sample.options).encode()
        root = ET.fromstring(shown.still())
        assert {e.tag.removeprefix(SVG) for e in root.iter()} <= {"svg", "rect", "text", "line"}
        assert "\x1b" not in repr(shown) and "\u202e" not in repr(shown)
    shown.table.value = True
    assert Read(shown._page.value).tags <= OURS | {
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "caption",
    }


# -- the set of samples ------------------------------------------------------------------------
def test_steps_choices_and_selected_samples_of_one_run(tmp_path):
    samples = SampleSet([make(tmp_path / "run", evaluated=(2,), prompts=("p", "q"))])
    assert samples.modes() == [TRAINING, HELD_OUT] and samples.first_mode() == TRAINING
    assert samples.steps(TRAINING) == [1, 2, 3] and samples.steps(HELD_OUT) == [2]
    assert samples.choices(TRAINING, 2) == [("1: first at 2", 0), ("2: second at 2", 1)]
    assert samples.choices(HELD_OUT, 2) == [("1: p", "p"), ("2: q", "q")]
    (sample,) = samples.select(TRAINING, 3, 1)
    assert (sample.prompt, sample.title) == ("second at 3", "run · step 3")
    assert sample.figures == {"reward": 3.5, "gold_reward": 0.25, "gold/mood": 1.0}
    assert [(c.title, c.response) for c in samples.select(HELD_OUT, 2, "q")] == [
        ("run · before training (sft)", "before q"),
        ("run · step 2, held-out", "at 2 q"),
        ("run · after training (ppo)", "after q"),
    ]


def test_stages_stand_side_by_side_on_one_prompt(tmp_path):
    runs = [
        make(tmp_path / "sft", "sft", (), before="base", prompts=("only sft", "p")),
        make(tmp_path / "ppo", "ppo", (1,)),
        make(tmp_path / "dpo", "dpo", ()),
    ]
    samples = SampleSet(runs)
    assert samples.first_mode() == HELD_OUT  # training would leave out two of them
    assert samples.choices(HELD_OUT, 0) == [("1: p", "p"), ("2: only sft", "only sft")]
    assert [c.title for c in samples.select(HELD_OUT, 0, "p")] == [
        "sft · before training (base)",
        "sft · after training",
        "ppo · before training (sft)",
        "ppo · after training",
        "dpo · after training",
    ]
    # DPO's answer before training is PPO's, word for word: once is enough.


def test_runs_in_training_stand_at_the_same_step_or_the_last_before_it(tmp_path):
    samples = SampleSet(
        [make(tmp_path / "a", steps=(1, 2, 3, 4)), make(tmp_path / "b", steps=(2, 3))]
    )
    assert [c.title for c in samples.select(TRAINING, 4, 0)] == ["a · step 4", "b · step 3"]
    assert [c.title for c in samples.select(TRAINING, 1, 0)] == ["a · step 1"]


def test_runs_of_one_name_are_told_apart(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    samples = SampleSet([make(tmp_path / "x" / "run"), make(tmp_path / "y" / "run")])
    assert samples.names == ["run", "run (2)"]
    assert len(samples.select(TRAINING, 3, 0)) == 2


def test_what_cannot_be_read_is_said(tmp_path):
    good, bad, gone = (make(tmp_path / n) for n in ("good", "bad", "gone"))
    (bad.folder / "samples.jsonl").write_text('{"step": 1}\nno json\n{"step": 2}\n')
    (gone.folder / "run.json").unlink()
    shown = Inspector(good, bad, gone)
    assert len(shown.sample_set.problems) == 2
    assert "bad cannot be read" in shown._status.value and "line 2" in shown._status.value
    assert "gone cannot be read" in shown._status.value
    assert [s.name for s in shown.selected] == ["good"]


# -- the inspector ----------------------------------------------------------------------------
def test_it_opens_at_the_newest_step_coloured_by_log_ratio(tmp_path):
    shown = Inspector(make(tmp_path / "run"))
    assert (shown.mode.value, shown.step.value, shown.colour.value) == (TRAINING, 3, "log_ratio")
    page = Read(shown._page.value).text
    assert page.startswith("first at 3run · step 3reward 3.5 · gold reward 0.25 · gold/mood 1")
    assert "KL -0.4 nats · 5 tokens" in page and "A fox ran.<end>" in page
    assert 'class="t m8"' in shown._page.value and "log π − log π_ref (nats)" in shown._legend.value
    assert shown._chart.picture.words.endswith("log-ratio: last 0.1")
    assert shown._compute.layout.display == "none"


def test_the_slider_moves_through_training_and_the_chooser_through_samples(tmp_path):
    shown = Inspector(make(tmp_path / "run"))
    shown.step.value = 1
    assert "first at 1" in shown._page.value and "1.5" in shown._page.value
    shown.sample.value = 1
    assert "second at 1" in shown._page.value
    shown.step.value = 2
    assert "second at 2" in shown._page.value  # the place in the step stays


@pytest.mark.parametrize("key", ["", *view.QUANTITIES])
def test_every_colouring_has_its_legend_and_its_chart(tmp_path, key):
    shown = Inspector(make(tmp_path / "run"))
    shown.colour.value = key
    coloured = re.search(r'class="t [pm]\d', shown._page.value)
    assert bool(coloured) == bool(key) == bool(shown._legend.value)
    words = shown._chart.picture.words
    if key:
        assert view.QUANTITIES[key].axis in shown._legend.value.replace("&#x27;", "'")
        assert view.QUANTITIES[key].axis in words
    if key == "value":
        assert "value: last 3" in words and "return: last 2" in words


def test_a_token_is_chosen_by_keyboard_and_its_figures_are_said(tmp_path):
    shown = Inspector(make(tmp_path / "run"))
    assert "Point at a token" in shown._page.value
    assert (shown.token.min, shown.token.max) == (0, 5)
    shown.token.value = 3
    assert re.search(r'class="t m8 sel"[^>]*> ran<', shown._page.value)
    assert 'aria-live="polite">3/5 “ ran” · log-ratio\xa0-2' in shown._page.value
    assert "token 3: last -2" in shown._chart.picture.words
    shown.table.value = True
    assert re.search(r"<td[^>]*> ran</td><td[^>]*>-2</td>", shown._page.value)


def test_search_counts_jumps_and_goes_round(tmp_path):
    shown = Inspector(make(tmp_path / "run", prompts=("p", "q")))
    assert shown._next.disabled
    shown.query.value = "SECOND"
    assert "1 of 3 found" in shown._count.value and not shown._next.disabled
    seen = [shown.selected[0].prompt]
    for _ in range(3):
        shown._next.click()
        seen.append(shown.selected[0].prompt)
    assert seen == ["second at 1", "second at 2", "second at 3", "second at 1"]
    shown._previous.click()
    assert "3 of 3 found" in shown._count.value
    assert Read(shown._page.value).text.startswith("second at 3")
    assert "<mark>second</mark>" in shown._page.value
    shown.query.value = "fox r"
    assert "4 of 6" not in shown._count.value  # already in sight: nothing moves
    assert shown.selected[0].prompt == "second at 3"
    assert re.findall(r'class="t[^"]* hit"[^>]*>([^<]*)<', shown._page.value) == [" fox", " ran"]
    shown.query.value = "after q"  # a search stays in its set, and says what is elsewhere
    assert shown.mode.value == TRAINING and shown.selected[0].prompt == "second at 3"
    assert "0 found; 1 in Held-out prompts" in shown._count.value
    shown.mode.value = HELD_OUT
    assert "1 found" in shown._count.value and not shown._next.disabled
    shown._next.click()
    assert shown.sample.value == "q"
    shown.mode.value = TRAINING
    shown.query.value = "nowhere"
    assert "0 found" in shown._count.value and shown._next.disabled
    shown.query.value = ""
    assert "found" not in shown._count.value


def test_what_stands_side_by_side_is_one_stop_of_the_search(tmp_path):
    shown = Inspector(make(tmp_path / "run", steps=(), prompts=("p1", "p2", "p3")))
    shown.query.value = "p"
    seen = []
    for _ in range(4):
        seen.append(shown.sample.value)
        shown._next.click()
    assert seen == ["p1", "p2", "p3", "p1"]
    shown._previous.click()
    assert shown.sample.value == "p1"


def test_an_old_run_has_text_and_a_sentence_instead_of_colours(tmp_path):
    shown = Inspector(make(tmp_path / "run", tokens=False))
    assert shown.colour.disabled and shown.colour.value == ""
    assert "A fox ran." in Read(shown._page.value).text and "3 words" in shown._page.value
    assert "so they have no colours" in shown._status.value and not shown._legend.value
    for part in (shown._chart, shown.token, shown.table, shown._compute):
        assert part.layout.display == "none"
    assert "fill-opacity" not in shown.still()


def test_nothing_yet_is_said_in_one_line(tmp_path):
    assert repr(Inspector()).startswith("Inspector: No run was given")
    empty = Run.create(tmp_path / "empty", stage="ppo", model="m", settings={})
    shown = Inspector(empty)
    assert repr(shown) == (
        "Inspector: These runs have no samples yet. Press Refresh when they have gone on."
    )
    assert "no samples yet" in shown.still() and "(ppo, running): 0 samples" in shown._status.value
    empty.sample(1, [{"prompt": "p", "response": "A fox ran.", "tokens": record(**FIGURES)}])
    shown._refresh.click()
    assert shown.step.value == 1 and "A fox ran." in Read(shown._page.value).text
    assert shown._top.layout.display is None


def test_steps_without_figures_say_so_and_it_opens_at_one_with_them(tmp_path):
    run = make(tmp_path / "run", steps=(1, 2))
    run.sample(3, [{"prompt": "p", "response": "A fox ran."}])
    shown = Inspector(run)
    assert shown.step.value == 2
    assert [label for label, _ in shown.step.options] == ["1", "2", "3, text only"]
    shown.step.value = 3
    assert "so they have no colours" in shown._status.value and not shown._legend.value
    run.sample(4, [{"prompt": "p", "response": "A fox ran.", "tokens": record(**FIGURES)}])
    shown._refresh.click()
    assert shown.step.value == 4  # it was at the newest


def test_refresh_follows_a_run_that_is_being_written(tmp_path):
    run = make(tmp_path / "run", steps=(1, 2))
    shown = Inspector(run)
    more = {"prompt": "new", "response": "A fox ran.", "tokens": record(**FIGURES)}
    Run.load(run.folder).sample(5, [more])  # by another process
    with open(run.folder / "samples.jsonl", "a") as file:
        file.write('{"step": 6, "prompt": "ha')  # it is writing at this moment
    shown._refresh.click()
    assert shown.step.value == 5 and "new" in shown._page.value
    shown.step.value = 2
    Run.load(run.folder).sample(6, [more])
    shown._refresh.click()
    assert shown.step.value == 2  # who looks back is left there
    assert [s for _, s in shown.step.options] == [1, 2, 5, 6]


def test_missing_figures_are_computed_when_asked_for(tmp_path):
    scored = []

    def score(run, row):
        scored.append((run.name, row["response"]))
        return {"text": row["response"].split(), "log_ratio": [0.5, -0.5]}

    shown = Inspector(make(tmp_path / "ppo", steps=(1,), tokens=False), score=score)
    assert shown.mode.value == TRAINING and shown._compute.layout.display == "none"
    # The model of step 1 is gone: the one at the end would tell of another one's words.
    shown = Inspector(make(tmp_path / "dpo", "dpo", ()), score=score)
    assert shown.colour.disabled and shown._compute.layout.display is None
    assert "Press Score tokens" in shown._status.value
    shown._compute.click()
    assert scored == [("dpo", "before p"), ("dpo", "after p")]
    assert shown.colour.value == "log_ratio" and shown._page.value.count('class="t p8"') == 2
    assert shown._compute.layout.display == "none"
    shown._refresh.click()
    assert shown._page.value.count('class="t p8"') == 2 and len(scored) == 2
    assert "dpo · before training (sft)" in shown._chart.picture  # a line for each


def test_a_model_that_is_gone_leaves_the_page_as_it_was(tmp_path):
    def score(run, row):
        raise FileNotFoundError("no model in <b>here</b>")

    shown = Inspector(make(tmp_path / "dpo", "dpo", ()), score=score)
    shown._compute.click()
    assert "FileNotFoundError: no model in &lt;b&gt;" in shown._status.value
    assert "after p" in Read(shown._page.value).text and not shown._compute.disabled


def test_it_reads_the_same_every_time(tmp_path):
    run = make(tmp_path / "run")
    text = repr(Inspector(run))
    assert text == repr(Inspector(run)) and "0x" not in text
    assert text.splitlines() == [
        "Inspector of run",
        "prompt: first at 3",
        "run · step 3: A fox ran. [reward 3.5 · gold reward 0.25 · gold/mood 1 · KL -0.4 nats · "
        "5 tokens]",
    ]


def test_outside_a_notebook_it_prints_its_words(tmp_path, capsys):
    Inspector(make(tmp_path / "run"))._ipython_display_()
    assert "run · step 3: A fox ran.<end> (reward 3.5" in capsys.readouterr().out


def test_every_control_has_a_name(tmp_path):
    shown = Inspector(make(tmp_path / "run"))

    def walk(widget):
        yield widget
        for child in getattr(widget, "children", ()):
            yield from walk(child)

    controls = [x for x in walk(shown.widget) if hasattr(x, "disabled")]
    assert len(controls) == 11
    for control in controls:
        assert control.description or control is shown.mode and all(n for n, _ in control.options)


def test_a_colour_that_these_tokens_lack_is_not_offered_and_comes_back(tmp_path):
    shown = Inspector(make(tmp_path / "run"))  # held-out samples have no figures of tokens
    assert shown.colour.value == "log_ratio" and not shown.colour.disabled
    shown.mode.value = HELD_OUT
    assert (shown.colour.value, shown.colour.disabled) == ("", True)
    assert [key for _, key in shown.colour.options] == [""]
    shown.mode.value = TRAINING
    assert shown.colour.value == "log_ratio" and not shown.colour.disabled


def test_held_out_stories_show_the_figures_that_were_kept_of_all_responses(tmp_path):
    run = Run.create(tmp_path / "run", stage="sft", model="tiny", settings={})
    row = {"prompt_ids": [1], "ids": [2, 3], "when": "sft"}
    run.evaluated([{**row, "ended": True, "gold_reward": 7.25, "length": 40.0}])
    run.sample(0, [{**row, "prompt": "p", "response": "A fox."}])
    (sample,) = SampleSet([run]).samples
    assert sample.figures == {"gold_reward": 7.25, "length": 40.0}
    assert "7.25" in repr(Inspector(run))
