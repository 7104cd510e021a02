"""The file of annotations: no answer is ever lost, and nobody else's file is touched.

Run: pytest tests/data/test_preferences.py
"""

import json
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lab.data.preferences import Annotations, is_annotations, pair_id


def texts(file, who=None):
    return [(row["chosen"], row["rejected"]) for row in Annotations(file).preferences(who)]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "mine.jsonl"


def test_an_answer_is_one_line_that_says_everything(file):
    made = Annotations(file)
    assert not file.exists()  # nothing is written before there is something to say
    made.add("left", "Which?\n", "a", "b", seconds=1.234)
    made.add("right", "Which?\n", "c", "d")
    made.add("tie", "Which?\n", "e", "f", who="ada")
    one, two, three = (json.loads(line) for line in file.read_text().splitlines())
    assert (one["annotation"], one["prompt"]) == ("left", "Which?\n")
    assert (one["chosen"], one["rejected"], one["seconds"]) == ("a", "b", 1.23)
    assert (two["annotation"], two["chosen"], two["rejected"]) == ("right", "d", "c")
    assert (three["annotation"], three["first"], three["second"]) == ("tie", "e", "f")
    assert "chosen" not in three and three["who"] == "ada"
    assert one["time"].endswith("+00:00") and one["pair"] == pair_id("Which?\n", "b", "a")
    assert is_annotations(file)


def test_the_last_word_on_a_pair_stands_and_each_person_has_one(file):
    made = Annotations(file)
    made.add("left", "p", "a", "b")
    made.add("left", "p", "b", "a")  # the same pair, shown the other way round
    made.add("left", "p", "a", "b", who="ada")
    assert texts(file) == [("b", "a"), ("a", "b")]
    assert texts(file, "") == [("b", "a")] and texts(file, "ada") == [("a", "b")]


def test_what_is_taken_back_is_gone_and_what_stood_before_it_stands_again(file):
    made = Annotations(file)
    made.add("left", "p", "a", "b")
    second = made.add("right", "p", "a", "b")
    made.undo(second)
    assert made.preferences() == [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    assert texts(file) == [("a", "b")]
    assert len(file.read_text().splitlines()) == 3  # the file only grows


def test_a_last_line_torn_anywhere_costs_that_answer_only(file):
    made = Annotations(file)
    for text in "abc":
        made.add("left", "p", text, "other")
    whole = file.read_bytes()
    last = whole[:-1].rindex(b"\n") + 1
    for cut in range(last, len(whole)):
        file.write_bytes(whole[:cut])
        left = "ab" if cut < len(whole) - 1 else "abc"  # only its line break is missing: it counts
        assert [chosen for chosen, _ in texts(file)] == list(left)
    for cut in (last, last + 1, last + 20, len(whole) - 1):
        file.write_bytes(whole[:cut])
        Annotations(file).add("left", "p", "d", "other")
        again = Annotations(file)
        assert [r["chosen"] for r in again.preferences()] == [
            *("abc" if cut == len(whole) - 1 else "ab"),
            "d",
        ]
        assert again.torn == (last < cut < len(whole) - 1)


def test_zeros_that_a_crash_left_are_no_answer(file):
    Annotations(file).add("left", "p", "a", "b")
    with file.open("ab") as end:
        end.write(b"\0" * 300)
    Annotations(file).add("left", "p", "c", "d")
    assert texts(file) == [("a", "b"), ("c", "d")]


FOREIGN = {
    "prose": b"Dear diary,\n",
    "a list": b'[{"prompt": "p", "chosen": "a", "rejected": "b"}]',
    "other rows": b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n',
    "pretty JSON": b'{\n  "annotation": "left"\n}\n',
    "an unknown kind": b'{"annotation": "maybe", "id": "1"}\n',
    "no texts": b'{"annotation": "left", "id": "1", "who": "", "pair": "x", "prompt": "p"}\n',
    "binary": bytes(range(256)) * 4,
    "a bare number": b"1",
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_another_file_is_refused_in_one_line_and_left_alone(file, content):
    file.write_bytes(content)
    with pytest.raises(ValueError, match="no annotation") as caught:
        Annotations(file)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)
    assert file.read_bytes() == content


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        Annotations(tmp_path)


def test_a_file_that_becomes_another_is_left_alone_from_then_on(file):
    made = Annotations(file)
    made.add("left", "p", "a", "b")
    file.write_text("short\n")
    with pytest.raises(ValueError, match="line 1"):
        made.add("left", "p", "c", "d")
    assert file.read_text() == "short\n"


def test_a_broken_line_in_the_middle_that_is_not_ours_is_named(file):
    Annotations(file).add("left", "p", "a", "b")
    with file.open("a") as end:
        end.write("something else\n")
    with pytest.raises(ValueError, match="line 2 is no annotation"):
        Annotations(file)


def test_an_empty_file_may_be_filled(file):
    file.touch()
    Annotations(file).add("left", "p", "a", "b")
    assert texts(file) == [("a", "b")] and is_annotations(file)


def test_two_readers_of_one_file_see_each_other(file):
    one, two = Annotations(file), Annotations(file)
    one.add("left", "p", "a", "b")
    two.add("left", "p", "c", "d")
    assert len(two.answers()) == 2 and len(one.answers()) == 1
    one.read()
    assert one.answers() == two.answers()


def test_an_answer_that_cannot_be_written_is_an_error(tmp_path):
    made = Annotations(tmp_path / "folder" / "mine.jsonl")
    (tmp_path / "folder").write_text("a file is in the way")
    with pytest.raises(OSError):
        made.add("left", "p", "a", "b")
    assert made.answers() == []
    with pytest.raises(ValueError, match="choose from left, right, tie, skip"):
        made.add("best", "p", "a", "b")


anything = st.text(st.characters(), max_size=30)


@given(
    anything | st.lists(st.fixed_dictionaries({"role": anything, "content": anything})),
    anything,
    anything,
    st.sampled_from(["left", "right"]),
)
def test_any_text_comes_back_as_it_was(tmp_path_factory, prompt, one, other, side):
    file = tmp_path_factory.mktemp("any") / "mine.jsonl"
    Annotations(file).add(side, prompt, one, other)
    chosen, rejected = (one, other) if side == "left" else (other, one)
    assert Annotations(file).preferences() == [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    ]
    file.unlink()


WRITER = """
import sys
from rlhf_lab.data.preferences import Annotations
made = Annotations(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for i in range(int(sys.argv[3])):
    made.add("left", "p", f"{sys.argv[2]} {i}", "x" * 3000)
    print(i, flush=True)
"""


def writer(file, name, count):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(file), name, str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_people_write_at_once_and_nothing_is_lost(file):
    writers = [writer(file, name, 60) for name in ("ada", "bob")]
    for w in writers:
        w.stdout.readline()
    for w in writers:
        w.stdin.write("\n")
        w.stdin.flush()
    for w in writers:
        w.communicate(timeout=60)
    assert Annotations(file).torn == 0
    assert sorted(chosen for chosen, _ in texts(file)) == sorted(
        f"{name} {i}" for name in ("ada", "bob") for i in range(60)
    )


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX's")
def test_a_killed_process_loses_no_answer_that_it_has_taken(file):
    made = writer(file, "ada", 100_000)
    made.stdout.readline()
    made.stdin.write("\n")
    made.stdin.flush()
    lines = [made.stdout.readline() for _ in range(25)]
    made.send_signal(signal.SIGKILL)
    lines += made.stdout.readlines()
    made.wait(10)
    saved = [chosen for chosen, _ in texts(file)]
    assert [f"ada {line.strip()}" for line in lines if line.strip()] == saved[: len(lines)]
    assert len(saved) - len(lines) in (0, 1)  # the one that was on disk before it could be printed
