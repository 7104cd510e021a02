"""The door for data: the bundled world and users' own files.

pytest tests/data/test_load.py
"""

import json
import pickle
from dataclasses import replace

import pandas
import pytest
from datasets import Dataset, DatasetDict

from rlhf_lab.data import load
from rlhf_lab.data.load import Data, from_rows, load_data

ROWS = [
    {
        "instruction": f"Say {i}",
        "input": "" if i % 2 else f"number {i}",
        "output": f"It is {i}.",
        "chosen": f"It is {i}.",
        "rejected": f"It is {i}." if i in (3, 8) else f"No {i}.",
    }
    for i in range(40)
]


def all_rows(split):
    return split.train + split.test


def test_instruction_rows_become_three_sets():
    data = from_rows(ROWS, name="mine")
    assert len(all_rows(data.sft)) == 40 and len(all_rows(data.prompts)) == 40
    assert {"prompt": "Say 1\n", "completion": "It is 1."} in all_rows(data.sft)
    assert any(r["prompt"] == "Say 2\nnumber 2\n" for r in all_rows(data.sft))


def test_identical_pairs_are_dropped_and_counted():
    data = from_rows(ROWS, name="mine")
    assert len(all_rows(data.preferences)) == 38
    assert any("dropped 2 pairs" in note and "identical" in note for note in data.notes)


def test_a_tenth_is_held_out_and_nothing_stands_twice():
    data = from_rows(ROWS, name="mine")
    assert len(data.sft.test) == 4
    train = {r["prompt"] for r in data.sft.train}
    assert not train & {r["prompt"] for r in data.sft.test}


def test_preferences_alone_also_teach_by_demonstration():
    rows = [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad"} for i in range(20)]
    data = from_rows(rows)
    assert data.sft.train[0]["completion"] == "good"


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_the_same_rows_out_of_every_container(tmp_path, suffix):
    path = tmp_path / f"mine{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(r) for r in ROWS))
    else:
        head = list(ROWS[0])
        path.write_text("\n".join([",".join(head)] + [",".join(r[h] for h in head) for r in ROWS]))
    assert load_data(path).sft == from_rows(ROWS).sft


TABLE = pandas.DataFrame(ROWS)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", TABLE.to_csv(sep=";", index=False)),
        ("a.csv", TABLE.to_csv(sep="\t", index=False)),
        ("a.json", TABLE.to_json()),
        ("a.json", json.dumps(TABLE.to_dict("list"))),
    ],
)
def test_tables_as_spreadsheets_and_pandas_write_them(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert load_data(tmp_path / name).sft == from_rows(ROWS).sft


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
def test_an_answer_that_is_not_to_be_learned_is_no_demonstration(mark):
    """`weight` is OpenAI's key, `train` axolotl's; an earlier answer is context all the same."""

    def chat(i, last, earlier):
        turns = [("user", "Hi"), ("assistant", "Ho"), ("user", f"Say {i}"), ("assistant", f"{i}!")]
        rows = [{"role": role, "content": text} for role, text in turns]
        rows[1] |= earlier
        rows[3] |= last
        return {"messages": rows}

    learned = from_rows([chat(i, {}, mark) for i in range(20)])
    assert len(all_rows(learned.sft)) == 20
    some = from_rows([chat(i, mark if i % 2 else {}, {}) for i in range(40)])
    assert some.report.dropped == {"an answer that is marked as not to be learned": 20}


def test_a_file_has_no_splits(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    for part in ({"split": "test"}, {"subset": "small"}):
        with pytest.raises(ValueError, match="is a file, which has no splits or subsets"):
            load_data(tmp_path / "a.json", **part)


def test_a_split_that_is_not_read_is_said(tmp_path):
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:5])).save_to_disk(
        tmp_path / "saved"
    )
    data = load_data(tmp_path / "saved")
    assert len(all_rows(data.sft)) == 40
    assert "split 'train' is read, and not test" in str(data.notes)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("missing.json", None, "no data file"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", "[1, 2]", "list of objects"),
        ("a.json", "[]", "no rows"),
        ("a.txt", "hello", "not a format we read"),
        ("a.json", '[{"x": 1}]', "no prompt field"),
        ("a.json", json.dumps(ROWS[:3]), "at least 10"),
        ("a.json", json.dumps([{"text": f"All of it {i}"} for i in range(20)]), "FUNCTION"),
    ],
)
def test_bad_files_get_one_line(tmp_path, name, text, says):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        load_data(tmp_path / name)
    assert "\n" not in str(error.value)


def test_no_gold_reward_outside_the_world():
    data = from_rows(ROWS, name="mine")
    assert not data.has_gold and data.accuracy_ceiling() is None
    with pytest.raises(ValueError, match="no gold reward"):
        data.gold_reward("a", "b")


def test_the_world_comes_through_the_same_door():
    data = load_data("stories", seed=0)
    assert isinstance(data, Data) and data.has_gold
    row = data.sft.train[0]
    assert 0 <= data.gold_reward(row["prompt"], row["completion"]) <= 10
    train = {r["prompt"] for r in data.prompts.train}
    assert not train & {r["prompt"] for r in data.prompts.test}
    assert data.preferences.train and 0.75 <= data.accuracy_ceiling() <= 0.85


def test_fewer_held_out_rows_and_the_same_to_train_on():
    whole = load_data("stories")
    few = whole.with_held_out(8)
    for name in ("sft", "preferences", "prompts", "labelled"):
        of_whole, of_few = getattr(whole, name), getattr(few, name)
        assert of_few.train == of_whole.train
        assert of_few.test == of_whole.test[: 16 if name == "labelled" else 8]
    assert few.has_gold


def test_the_bundled_sets_are_written_when_they_are_read(monkeypatch):
    """PPO reads prompts: no demonstration is written for it and no pair labelled; what comes later
    is what would have come at once, in another process too."""
    monkeypatch.setitem(load.STORY_ROWS, "prompts", 5)
    data = load_data("stories", seed=3)
    assert len(data.prompts.train) == 5
    assert not {"train", "test"} & (vars(data.sft) | vars(data.preferences)).keys()
    there = pickle.loads(pickle.dumps(data))
    assert there.sft == data.sft and there.sft.train is there.sft.train
    assert repr(data.sft) == f"Split(train={len(data.sft.train)}, test={len(data.sft.test)})"
    with pytest.raises(AttributeError, match="trian"):
        data.preferences.trian  # noqa: B018


def test_a_split_that_comes_later_can_be_replaced_in_part():
    prompts = load_data("stories", seed=11).prompts  # of no other test: not made yet
    fewer = replace(prompts, train=prompts.train[:3])
    assert len(fewer.train) == 3 and fewer.test == prompts.test
