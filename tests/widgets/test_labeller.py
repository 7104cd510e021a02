"""The labeller: which pair is shown, what is saved, how agreement is counted (by hand too).

Run: pytest tests/widgets/test_labeller.py
"""

import json
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rlhf_lab as lab
from rlhf_lab.charts.agreement import Choice, shares, wilson
from rlhf_lab.widgets.labeller import LONGEST, Labeller, shown
from rlhf_lab.world.gold_reward import Annotator, accuracy_ceiling, gold_reward

pytestmark = pytest.mark.usefixtures("few_stories")
SVG = "{http://www.w3.org/2000/svg}"


def rows(count, prompt="Tell me {}.\n"):
    """The better response is the longer one, and says so."""
    return [
        {"prompt": prompt.format(i), "chosen": f"good and long {i}", "rejected": f"bad {i}"}
        for i in range(count)
    ]


def words(prompt, response):
    return float(len(response.split()))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "mine.jsonl"


@pytest.fixture
def make(file):
    def labeller(count=4, **more):
        return Labeller(more.pop("pairs", rows(count)), more.pop("file", file), **more)

    return labeller


def better(labeller, good=True):
    """The side of the good (or bad) response of the current pair."""
    return "left" if labeller.current.left.startswith("good") == good else "right"


def say(labeller, do, **more):
    """What the browser would send."""
    message = {"do": do, "pair": labeller.view["id"], "seconds": 1.5, **more}
    labeller._on_message(labeller, message, [])


# -- asking and keeping -------------------------------------------------------------------------
def test_a_choice_keeps_the_response_that_stood_there(make, file):
    labeller = make(2)
    for side, other in (("left", "right"), ("right", "left")):
        view = labeller.view
        say(labeller, side)
        line = json.loads(file.read_text().splitlines()[-1])
        assert (line["annotation"], line["seconds"]) == (side, 1.5)
        assert [line["chosen"], line["rejected"]] == [view[side], view[other]]
        assert line["prompt"].strip() == view["prompt"]  # line breaks around it are not shown
    assert labeller.view["id"] == "" and labeller.current is None
    assert labeller.view["note"] == "Saved: right is better."


def test_ties_and_skips_are_counted_and_left_out(make):
    labeller = make(4)
    for answer in ("tie", "skip", "skip", better(labeller)):
        labeller.answer(answer)
    assert labeller.counts == {"preferences": 1, "ties": 1, "skips": 2}
    usable = "1 usable of 4 answers: a tie or a skip makes no pair to train on"
    assert labeller.view["counts"] == f"1 preference, 1 tie, 2 skips; {usable}"
    assert usable in repr(labeller) and "1 of them usable" in labeller.still().words
    assert len(labeller.preferences) == 1
    with pytest.raises(ValueError, match="all 4 pairs are labelled"):
        labeller.answer("tie")


def test_undo_goes_back_answer_by_answer_and_the_same_pair_comes_again(make):
    labeller = make(3)
    first = labeller.view
    say(labeller, "left")
    second = labeller.view
    say(labeller, "tie")
    say(labeller, "undo")
    assert labeller.view["id"] == second["id"] and labeller.done == 1
    say(labeller, "undo")
    assert {**labeller.view, "moves": 0, "note": ""} == {**first, "moves": 0, "note": ""}
    say(labeller, "undo")
    assert labeller.view["note"] == "Nothing to take back." and labeller.preferences == []


def test_the_same_file_goes_on_where_one_stopped(make):
    before = make(5)
    before.answer("left")
    before.answer("skip")
    after = make(5)
    keys = ("id", "left", "right", "done", "counts", "undo")
    assert {k: after.view[k] for k in keys} == {k: before.view[k] for k in keys}
    after.undo()  # what an earlier session answered can be taken back as well
    assert after.done == 1 and make(5).done == 1


def test_two_people_share_a_file_and_not_their_progress(make):
    ada, bob = make(3, who="ada"), make(3, who="bob")
    ada.answer("left")
    bob.answer("tie")
    bob.answer("right")
    assert (ada.done, bob.done) == (1, 2)
    assert len(ada.preferences) == len(bob.preferences) == 1
    bob.undo()
    assert (make(3, who="ada").done, make(3, who="bob").done) == (1, 1)


def test_another_file_is_refused_and_a_full_disk_is_said(make, file, tmp_path):
    file.write_text("my thesis\n")
    with pytest.raises(ValueError, match="line 1 is no annotation"):
        make()
    assert file.read_text() == "my thesis\n"
    labeller = make(file=tmp_path / "folder" / "mine.jsonl")
    (tmp_path / "folder").touch()  # in the way of the folder that has to be made
    say(labeller, "left")
    assert labeller.view["note"].startswith("Not saved: ") and labeller.done == 0
    (tmp_path / "folder").unlink()
    say(labeller, "left")
    assert labeller.done == 1


@pytest.mark.parametrize(
    "junk",
    [
        None,
        "left",
        {},
        {"do": "reboot"},
        {"do": ["left"]},
        {"do": "left"},
        {"do": "left", "pair": 7},
        {"do": "__init__"},
        {"do": "left", "pair": "0" * 16},
    ],
)
def test_what_the_browser_did_not_mean_changes_nothing(make, file, junk):
    labeller = make()
    moves = labeller.view["moves"]
    labeller._on_message(labeller, junk, [])
    assert labeller.done == 0 and not file.exists()
    assert labeller.view["moves"] == moves + 1  # it hears that nothing came of it


def test_a_double_click_answers_one_pair(make):
    labeller = make()
    first = labeller.view["id"]
    for _ in range(2):
        labeller._on_message(labeller, {"do": "left", "pair": first}, [])
    assert labeller.done == 1


@pytest.mark.parametrize("seconds", [None, "4", -1, float("nan"), float("inf"), True, [1]])
def test_a_time_that_cannot_be_is_measured_here(make, file, seconds):
    labeller = make()
    say(labeller, "left", seconds=seconds)
    assert 0 <= json.loads(file.read_text())["seconds"] < 60


# -- which pairs, and where they stand ----------------------------------------------------------
def test_the_position_says_nothing(make):
    labeller = make(600)
    left = [pair.left.startswith("good") for pair in labeller.pairs]
    assert 240 < sum(left) < 360
    # Not by who was preferred: the same pairs, labelled the other way round, stand as before.
    turned = [
        {"prompt": r["prompt"], "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows(600)
    ]
    sides = [(p.left, p.right) for p in labeller.pairs]
    assert [(p.left, p.right) for p in make(pairs=turned).pairs] == sides
    assert [(p.left, p.right) for p in make(600, seed=1).pairs] != sides


def test_pairs_come_once_and_two_equal_responses_never(make):
    pairs = [
        *rows(2),
        {"prompt": "x", "chosen": "a", "rejected": "a"},
        *rows(1),
        {"prompt": "y", "first": "a", "second": "b"},
    ]
    assert [p.prompt for p in make(pairs=pairs).pairs] == ["Tell me 0.\n", "Tell me 1.\n", "y"]
    for bad, message in (
        ([], "no pairs"),
        ([{"prompt": "x", "chosen": "a", "rejected": "a"}], "two different"),
        ([{"prompt": "x", "chosen": "a"}], "pair 0 needs .* it has prompt, chosen"),
        ([{"chosen": "a", "rejected": "b"}], "pair 0 needs a prompt"),
        ([{"prompt": "x", "chosen": 1, "rejected": 2}], "pair 0 needs"),
    ):
        with pytest.raises(ValueError, match=message):
            make(pairs=bad)
    with pytest.raises(ValueError, match="choose from end, each"):
        make(feedback="never")


# -- agreement ----------------------------------------------------------------------------------
def test_wilson_by_hand():
    # 8 of 10, z² = 3.8414571: (0.8 + 0.19207 ± 1.959964·√(0.016 + 0.0096036)) / 1.384146
    assert wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=2e-6)
    assert wilson(0, 10) == pytest.approx((0.0, 0.277533), abs=2e-6)
    assert wilson(10, 10) == pytest.approx((0.722467, 1.0), abs=2e-6)
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(1, 2000), st.data())
def test_an_interval_holds_its_share_and_turns_with_it(n, data):
    count = data.draw(st.integers(0, n))
    low, high = wilson(count, n)
    assert 0 <= low <= count / n + 1e-12 and count / n - 1e-12 <= high <= 1
    assert wilson(n - count, n) == pytest.approx((1 - high, 1 - low))


def test_shares_by_hand():
    chosen = [
        Choice(left=True, longer=3, gold=2.0, label=True, expected=0.9),
        Choice(left=True, longer=-1, gold=1.0, label=False, expected=0.7),
        Choice(left=False, longer=0, gold=0.0, label=True, expected=None),
        Choice(left=True, longer=2, gold=-1.0, label=None, expected=0.8),
    ]
    rows = {row.name: row for row in shares(chosen)}
    assert {name: (row.share, row.n) for name, row in rows.items()} == {
        "You agree with the gold reward": (2 / 3, 3),  # one pair that it has equal is left out
        "The annotator agrees with it": (pytest.approx(0.8), 3),
        "You agree with the annotator": (2 / 3, 3),
        "You chose the left one": (3 / 4, 4),
        "You chose the longer one": (2 / 3, 3),
    }
    # Gold: longer in the first; the shorter in the second; of the last the one that was not chosen.
    assert rows["You chose the longer one"].note == "by the gold reward 33%"
    assert str(rows["You chose the left one"]) == (
        "75% of 4, 95% interval 30% to 95%; by chance 50%"
    )
    assert rows["The annotator agrees with it"].low is None
    assert shares([]) == []


def test_agreement_is_counted_against_gold_annotator_and_habits(make):
    annotator = SimpleNamespace(prefers_first=lambda p, a, b: 0.8 if "good" in a else 0.2)
    labeller = make(4, gold_reward=words, annotator=annotator)
    for good in (True, True, False):
        labeller.answer(better(labeller, good))
    labeller.answer("tie")
    rows = {row.name: (row.share, row.n) for row in labeller.tally()}
    left = rows.pop("You chose the left one")
    assert rows == {
        "You agree with the gold reward": (2 / 3, 3),
        "The annotator agrees with it": (pytest.approx(0.8), 3),
        "You agree with the annotator": (2 / 3, 3),
        "You chose the longer one": (2 / 3, 3),
    }
    assert left[1] == 3


def test_in_the_bundled_world_the_annotator_meets_its_ceiling(make):
    """Without a length bias, agreeing with the gold reward is the best that can be done."""
    annotator = Annotator(seed=3)
    pairs = lab.load_data("stories").preferences.train[:60]
    labeller = make(pairs=pairs, gold_reward=gold_reward, annotator=annotator)
    while pair := labeller.current:
        gaps = [gold_reward(pair.prompt, r) for r in (pair.left, pair.right)]
        labeller.answer("left" if gaps[0] > gaps[1] else "right")
    decided = [
        r
        for r in pairs
        if gold_reward(r["prompt"], r["chosen"]) != gold_reward(r["prompt"], r["rejected"])
    ]
    rows = {row.name: row for row in labeller.tally()}
    assert rows["You agree with the gold reward"].share == 1.0
    expected = rows["The annotator agrees with it"]
    assert expected.n == len(decided)
    assert expected.share == pytest.approx(accuracy_ceiling(decided, annotator))
    labels = rows["You agree with the annotator"]
    assert labels.n == 60 and 0.55 < labels.share < 0.95


def test_pairs_without_labels_are_labelled_by_the_annotator(make):
    annotator = Annotator()
    pairs = [
        {"prompt": r["prompt"], "first": r["chosen"], "second": r["rejected"]}
        for r in lab.load_data("stories").preferences.train[:8]
    ]
    labels = [
        annotator.label(i, r["prompt"], r["first"], r["second"])["chosen"]
        for i, r in enumerate(pairs)
    ]
    labeller = make(
        pairs=[*pairs, {"prompt": "not of this world", "first": "a", "second": "b"}],
        gold_reward=gold_reward,
        annotator=annotator,
    )
    assert [pair.label for pair in labeller.pairs] == [*labels, None]
    while labeller.current:
        labeller.answer("left")
    assert {row.name: row.n for row in labeller.tally()}["You agree with the annotator"] == 8


def test_without_gold_and_annotator_the_labels_of_the_data_remain(make):
    labeller = make(2)
    for _ in range(2):
        labeller.answer(better(labeller))
    assert [row.name for row in labeller.tally()] == [
        "You agree with the data's labels",
        "You chose the left one",
        "You chose the longer one",
    ]


def test_agreement_is_hidden_until_the_end_or_until_one_asks(make):
    labeller = make(2, gold_reward=words)
    labeller.answer("left")
    assert labeller.view["rows"] == [] and not labeller.view["revealed"]
    assert "gold" not in labeller.view["note"] and "gold" not in repr(labeller)
    assert "agree" not in labeller.still().words.lower().replace("agreement is hidden", "")
    labeller.answer("left")
    assert labeller.view["revealed"] and labeller.view["rows"][0]["name"].endswith("gold reward")
    labeller.undo()
    assert labeller.view["rows"] == []
    say(labeller, "reveal")
    assert len(labeller.view["rows"]) == 4


def test_with_feedback_every_answer_hears_the_gold_reward(make):
    pairs = [*rows(2), {"prompt": "x", "chosen": "one two", "rejected": "three four"}]
    labeller = make(pairs=pairs, gold_reward=words, feedback="each")
    labeller.answer(better(labeller))
    assert labeller.view["note"].endswith("better. The gold reward agrees (by 2.0).")
    labeller.answer(better(labeller, False))
    assert labeller.view["note"].endswith("The gold reward prefers the other (by 2.0).")
    labeller.answer("right")
    assert labeller.view["note"].endswith("The gold reward has them equal.")
    assert labeller.view["rows"][0]["short"] == "50% of 2"


# -- showing ------------------------------------------------------------------------------------
EVIL = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a\x00b\x1b[2Jc",
    "\ud800x",
    "\u202eevil",
    "line\r\nbreak",
]


@pytest.mark.parametrize("evil", EVIL)
def test_hostile_text_reaches_the_browser_as_text(make, tmp_path, evil):
    name = "".join(c for c in evil if c.isprintable() and c != "/") + ".jsonl"
    labeller = make(
        pairs=[{"prompt": evil, "chosen": evil + "1", "rejected": evil}], file=tmp_path / name
    )
    json.dumps(labeller.view, ensure_ascii=False).encode()  # Jupyter's wire is UTF-8
    text = labeller.view["prompt"] + labeller.view["left"] + labeller.view["file"]
    assert not set(text) & set("\x00\x1b\ud800\u202e\r")
    if "<" in evil:  # not escaped here: the page sets text, not HTML
        assert labeller.view["prompt"] == evil
    labeller.answer("left")
    assert labeller.preferences[0]["prompt"] == evil  # saved as it is, whatever is shown
    ET.fromstring(labeller.still())


def test_long_and_spoken_texts_are_shown_whole_enough():
    assert shown("x" * (LONGEST + 1500)).endswith("x… (1,500 more characters)")
    assert shown([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]) == (
        "user: Hi\nassistant: Ho"
    )
    assert shown("\n two\nlines\n") == " two\nlines"


def test_the_still_picture_is_the_tally(make):
    labeller = make(2, gold_reward=words)
    assert labeller.still().words == "Your labels: 0 of 2. No answers yet."
    labeller.answer(better(labeller))
    assert labeller.still().words.endswith("hidden until all pairs are labelled.")
    labeller.answer(better(labeller))
    svg = ET.fromstring(labeller.still())
    texts = [t.text for t in svg.iter(f"{SVG}text")]
    assert {"Your labels: 2 of 2", "You agree with the gold reward", "100% of 2"} <= set(texts)
    dots = [c for c in svg.iter(f"{SVG}circle")]
    assert len(dots) == 4 and svg.get("role") == "img"
    places = {t.text: float(t.get("x")) for t in svg.iter(f"{SVG}text")}
    assert float(dots[0].get("cx")) == places["100%"]


def test_its_repr_is_the_same_every_time(make):
    labeller = make(2, gold_reward=words)
    assert repr(labeller) == "Labeller(0 of 2 labelled)" == repr(make(2))
    while labeller.current:
        labeller.answer(better(labeller))
    assert repr(labeller).startswith(
        "Labeller(2 of 2 labelled; you agree with the gold reward: 100% of 2; "
    )


def test_in_a_terminal(make, file):
    labeller = make(pairs=[*rows(2), {"prompt": "\x1b[2J", "chosen": "a", "rejected": "b"}])
    typed, printed = iter(["?", "1", "u", " 2 ", "S", "q"]), []
    assert labeller.ask(lambda _: next(typed), printed.append) is labeller
    lines = [json.loads(line)["annotation"] for line in file.read_text().splitlines()]
    assert lines == ["left", "undo", "right", "skip"]
    assert "Type 1, 2, t, s, u or q." in printed and "Taken back: label this pair again." in printed
    assert printed[-1] == f"2 of 3 labelled, saved in {file}" and "\x1b" not in "".join(printed)

    def closed(_):
        raise EOFError

    make(3).ask(closed, printed.append)  # a pipe that ends is a q


# -- what comes of it ---------------------------------------------------------------------------
def test_the_lab_takes_the_preferences(make):
    labeller = make(24)
    for _ in range(20):
        labeller.answer(better(labeller))
    labeller.answer("tie")
    data = lab.load_data(labeller.preferences)
    pairs = [*data.preferences.train, *data.preferences.test]
    assert len(pairs) == 20 and all(p["chosen"].startswith("good") for p in pairs)
    assert {p["prompt"] for p in pairs} == {f"Tell me {i}.\n" for i in range(20)}


@pytest.mark.slow
def test_a_reward_model_and_a_policy_learn_from_twenty_answers(make, tmp_path):
    data = lab.load_data("stories")
    labeller = make(pairs=data.preferences.train[:22], gold_reward=data.gold_reward)
    while labeller.done < 20:
        pair = labeller.current
        gaps = [gold_reward(pair.prompt, r) for r in (pair.left, pair.right)]
        labeller.answer("left" if gaps[0] > gaps[1] else "right")
    plan = lab.plan("reward", "tiny", max_steps=2)
    run = lab.train(plan, labeller.preferences, out=tmp_path / "reward", quiet=True)
    assert run.status == "finished" and run.last_step == 2
    assert run.summary["rows"] == 18 and run.summary["held_out_pairs"] == 2
    assert 0 <= run.summary["accuracy"] <= 1
    own_reward = lab.load("tiny").with_stage("reward", run.folder / "model")
    few = {"max_steps": 1, "per_device_train_batch_size": 8, "response_length": 8}
    plan = lab.plan("ppo", own_reward, **few)
    assert lab.train(plan, data, out=tmp_path / "ppo", quiet=True).status == "finished"
