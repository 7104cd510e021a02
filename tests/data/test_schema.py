"""Every shape that people keep data in, out of every container that can hold it.

pytest tests/data/test_schema.py
"""

from __future__ import annotations

import csv
import gzip
import json
import string
from collections.abc import Callable
from pathlib import Path

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_lab.data import load as data_module
from rlhf_lab.data.load import Data, Reservoir, from_rows, load_data
from rlhf_lab.data.mapping import Fields
from rlhf_lab.data.messages import dialogue
from rlhf_lab.data.recognise import ready, recognise
from rlhf_lab.data.schema import Dropped, Shape, convert

N = 30


def shape(**fields: str) -> Shape:
    return ready(Fields(**fields), [], list(fields.values()), "mine")


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def rows_of(**columns: Callable[[int], object]) -> list[dict]:
    return [{name: make(i) for name, make in columns.items()} for i in range(N)]


TEXT = {
    "prompt": lambda i: f"Say {i}.",
    "good": lambda i: f'It is {i}, "so".\nYes',
    "bad": lambda i: f"No, {i}",
}
CHAT = {
    "prompt": lambda i: [turn("user", f"Say {i}.")],
    "good": lambda i: [turn("assistant", TEXT["good"](i))],
    "bad": lambda i: [turn("assistant", TEXT["bad"](i))],
}
HH = "\n\nHuman: {}\n\nAssistant: {}"

SHAPES = {
    "prompt, completion": rows_of(prompt=TEXT["prompt"], completion=TEXT["good"]),
    "prompt, chosen, rejected": rows_of(
        prompt=TEXT["prompt"], chosen=TEXT["good"], rejected=TEXT["bad"]
    ),
    "instruction file": rows_of(
        instruction=TEXT["prompt"],
        input=lambda i: "",
        output=TEXT["good"],
        chosen=TEXT["good"],
        rejected=TEXT["bad"],
    ),
    "dialogue strings": rows_of(
        chosen=lambda i: HH.format(TEXT["prompt"](i), TEXT["good"](i)),
        rejected=lambda i: HH.format(TEXT["prompt"](i), TEXT["bad"](i)),
    ),
    "chat: prompt, completion": rows_of(prompt=CHAT["prompt"], completion=CHAT["good"]),
    "chat: prompt, chosen, rejected": rows_of(
        prompt=CHAT["prompt"], chosen=CHAT["good"], rejected=CHAT["bad"]
    ),
    "chat: chosen, rejected": rows_of(
        chosen=lambda i: CHAT["prompt"](i) + CHAT["good"](i),
        rejected=lambda i: CHAT["prompt"](i) + CHAT["bad"](i),
    ),
    "chat: messages": rows_of(messages=lambda i: CHAT["prompt"](i) + CHAT["good"](i)),
    "chat: from and value": rows_of(
        conversations=lambda i: [
            {"from": "human", "value": TEXT["prompt"](i)},
            {"from": "gpt", "value": TEXT["good"](i)},
        ]
    ),
    "prompts only": rows_of(prompt=TEXT["prompt"]),
}


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        tab = "\t" if path.suffix == ".tsv" else ","
        writer = csv.DictWriter(file, list(rows[0]), delimiter=tab)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_lines(path: Path, rows: list[dict]) -> Path:
    text = "\n".join(json.dumps(r) for r in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_json(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps(rows, indent=1))
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def save_dataset(path: Path, rows: list[dict]) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


CONTAINERS = {
    "a.json": write_json,
    "a.jsonl": write_lines,
    "lines.json": write_lines,
    "a.jsonl.gz": write_lines,
    "a.csv": write_csv,
    "a.tsv": write_csv,
    "a.parquet": write_parquet,
    "saved": save_dataset,
    "Dataset": lambda path, rows: datasets.Dataset.from_list(rows),
    "DatasetDict": lambda path, rows: datasets.DatasetDict(train=datasets.Dataset.from_list(rows)),
    "list": lambda path, rows: rows,
    "generator": lambda path, rows: (r for r in rows),
    "DataFrame": lambda path, rows: pandas.DataFrame(rows),
}
HELD = [
    (shape, container)
    for shape in SHAPES
    for container in CONTAINERS
    if not (shape.startswith("chat") and container in ("a.csv", "a.tsv"))  # cells hold text only
]


@pytest.mark.parametrize(("shape", "container"), HELD)
def test_every_shape_out_of_every_container(shape, container, tmp_path):
    """The same rows come out, whatever held them; nothing is lost on the way."""
    found = load_data(CONTAINERS[container](tmp_path / container, SHAPES[shape]))
    expected = from_rows(SHAPES[shape])
    for name in ("sft", "preferences", "prompts"):
        assert getattr(found, name) == getattr(expected, name)
    assert len(all_rows(found.prompts)) == N and not found.report.dropped


def all_rows(split) -> list[dict]:
    return split.train + split.test


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_becomes_ours(shape):
    """By hand: what each of the thirty rows must become."""
    found, chat = from_rows(SHAPES[shape]), shape.startswith(("chat", "dialogue"))
    prompts = [r["prompt"] for r in all_rows(found.prompts)]
    wanted = [CHAT["prompt"](i) if chat else f"Say {i}.\n" for i in range(N)]
    assert sorted(prompts, key=repr) == sorted(wanted, key=repr)
    answers = {r["completion"] for r in all_rows(found.sft)}
    assert answers == ({TEXT["good"](i) for i in range(N)} if "only" not in shape else set())
    pairs = {(r["chosen"], r["rejected"]) for r in all_rows(found.preferences)}
    has_pairs = "chosen" in SHAPES[shape][0]
    assert pairs == ({(TEXT["good"](i), TEXT["bad"](i)) for i in range(N)} if has_pairs else set())


def test_text_that_is_already_parted_stays_as_it_is():
    """TRL's own shape puts the space into the completion: nothing is added then."""
    rows = [{"prompt": f"The sky {i} is", "completion": " blue."} for i in range(20)]
    assert {r["prompt"] for r in all_rows(from_rows(rows).prompts)} == {r["prompt"] for r in rows}


def test_a_dialogue_of_several_turns_keeps_them_all():
    text = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:"
    turns = [turn("user", "Hi"), turn("assistant", "Hello"), turn("user", "Bye")]
    assert dialogue(text) == [*turns, turn("assistant", "")]
    row = {"prompt": text, "completion": "See you"}
    made = convert(row, shape(prompt="prompt", completion="completion"))
    assert made == [{"prompt": turns, "completion": "See you"}]


def test_users_own_names_are_mapped_and_reported():
    rows = [{"frage": f"f{i}", "gut": "ja", "schlecht": "nein"} for i in range(20)]
    fields = {"prompt": "frage", "chosen": "gut", "rejected": "schlecht"}
    found = load_data(rows, fields=fields)
    assert len(all_rows(found.preferences)) == 20
    assert "prompt = 'frage'" in found.notes[0] and "chosen = 'gut'" in found.notes[0]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": "nope"}, "no column 'nope' for prompt; there are"),
        ({"promt": "frage"}, "no field 'promt' to map; did you mean 'prompt'. choose from prompt"),
        ({"prompt": "frage", "chosen": "gut"}, "rejected.*is not, among"),
        ({}, "no prompt field among .frage, gut, schlecht."),
        ({"completion": "gut"}, "no prompt: .* hold no conversation"),
    ],
)
def test_a_wrong_mapping_is_one_line(fields, says):
    rows = [{"frage": f"f{i}", "gut": "ja", "schlecht": "nein"} for i in range(20)]
    with pytest.raises(ValueError, match=says) as error:
        load_data(rows, fields=fields)
    assert "\n" not in str(error.value)


def test_a_whole_conversation_says_more_than_a_prompt_beside_it():
    """As in UltraFeedback: `prompt` is the first question, `chosen` the whole conversation."""
    talk = [turn("system", "Be brief."), turn("user", "Hi")]
    row = {
        "prompt": "Hi",
        "chosen": [*talk, turn("assistant", "a")],
        "rejected": [*talk, turn("assistant", "b")],
    }
    assert convert(row, PAIR) == [{"prompt": talk, "chosen": "a", "rejected": "b"}]


def test_a_message_in_parts_is_joined():
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]
    row = {"messages": [turn("user", parts), turn("assistant", "Yes")]}
    made = convert(row, shape(completion="messages"))
    assert made == [{"prompt": [turn("user", "Hi you")], "completion": "Yes"}]


def test_gaps_of_a_table_are_gaps():
    frame = pandas.DataFrame(
        {"prompt": [f"p{i}" for i in range(20)], "completion": ["c"] * 19 + [None]}
    )
    assert load_data(frame).report.dropped == {"empty": 1}


def test_dates_that_another_reader_made_of_texts_are_refused_with_the_reason(tmp_path):
    """`datasets` makes timestamps of a column of ISO dates: 2024-05-01 would be learned as
    2024-05-01 00:00:00. Our reader of the same file leaves them as they stand."""
    rows = [{"prompt": f"p{i}", "completion": f"2024-05-{i:02}"} for i in range(1, 21)]
    file = write_lines(tmp_path / "a.jsonl", rows)
    assert load_data(file).sft.train[0]["completion"].strip().startswith("2024-05-")
    made = datasets.load_dataset("json", data_files=str(file), cache_dir=str(tmp_path))["train"]
    frame = pandas.DataFrame(rows).assign(completion=lambda f: pandas.to_datetime(f.completion))
    for source in (made, frame):
        with pytest.raises(ValueError, match="dropped 20 rows: a date, which datasets and pandas"):
            load_data(source)


PAIR = shape(prompt="prompt", chosen="chosen", rejected="rejected")
IMPLICIT = shape(chosen="chosen", rejected="rejected")


@pytest.mark.parametrize(
    ("row", "of", "reason"),
    [
        ("text", PAIR, "wrong type"),
        (None, PAIR, "wrong type"),
        ({"prompt": 5, "chosen": "a", "rejected": "b"}, PAIR, "wrong type: int"),
        ({"prompt": "p", "chosen": 5, "rejected": "b"}, PAIR, "wrong type: int"),
        (
            {"prompt": "p", "chosen": {"a": 1}, "rejected": "b"},
            PAIR,
            "wrong type: an object .*",
        ),
        (
            {"prompt": [{"role": "user", "content": 3}], "chosen": "a", "rejected": "b"},
            PAIR,
            "wrong type: int",
        ),
        (
            {"prompt": [{"content": "hi"}], "chosen": "a", "rejected": "b"},
            PAIR,
            "wrong type: an .*",
        ),
        ({"prompt": ["hi"], "chosen": "a", "rejected": "b"}, PAIR, "wrong type: a list of texts.*"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, PAIR, "empty"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, PAIR, "empty"),
        ({"prompt": "p", "chosen": "", "rejected": None}, PAIR, "empty"),
        ({"prompt": "p\ud800", "chosen": "a", "rejected": "b"}, PAIR, "broken characters"),
        ({"chosen": "a", "rejected": "b"}, IMPLICIT, "no prompt"),
        (
            {"chosen": HH.format("x", "a"), "rejected": HH.format("y", "b")},
            IMPLICIT,
            "prompts differ",
        ),
        (
            {"chosen": HH.format("x", "a") + "\n\nHuman: z", "rejected": HH.format("x", "b")},
            IMPLICIT,
            "no answer at the end",
        ),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row, of, reason):
    with pytest.raises(Dropped, match=f"^{reason}$"):
        convert(row, of)


def test_every_row_is_accounted_for():
    """Kept and dropped add up to what was read; a row that lacks one side is counted."""
    good = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(20)]
    bad = [
        {"prompt": "", "chosen": "a", "rejected": "b"},
        {"prompt": 5},
        "text",
        {"prompt": "q", "chosen": "a", "rejected": ""},
        {"prompt": "r", "chosen": "a"},
        {"prompt": "s", "chosen": "same", "rejected": "same"},
    ]
    found = from_rows(good + bad, name="mine")
    report = found.report
    assert report.rows == 26 and report.kept + sum(report.dropped.values()) == 26
    assert (
        report.dropped == {"empty": 3, "wrong type": 1, "wrong type: int": 1}
        and report.identical == 1
    )
    assert len(all_rows(found.preferences)) == 20
    assert any("dropped 3 rows: empty" in note for note in found.notes)


def test_rows_without_one_field_are_counted():
    rows = [
        {"prompt": f"p{i}", "completion": "c", "chosen": "a", "rejected": "b"} for i in range(20)
    ]
    rows[3]["chosen"] = rows[4]["completion"] = ""
    found = from_rows(rows, name="mine")
    assert found.report.missing == {"chosen": 1, "rejected": 1, "completion": 1}
    assert len(all_rows(found.preferences)) == 19 and len(all_rows(found.sft)) == 19


def test_a_prompt_with_many_answers_stands_on_one_side():
    rows = [{"prompt": f"p{i % 12}", "completion": f"c{i}"} for i in range(60)]
    found = from_rows(rows)
    assert not ({r["prompt"] for r in found.sft.train} & {r["prompt"] for r in found.sft.test})
    assert len(all_rows(found.prompts)) == 12 and len(all_rows(found.sft)) == 60


# ------------------------------------------------------------------------------ large and random


def test_of_a_large_source_a_random_sample_is_kept_and_reported(monkeypatch):
    rows = ({"prompt": f"p{i}", "completion": "x" * 50} for i in range(5000))
    found = load_data(rows, limit=100)
    kept = [int(r["prompt"].strip()[1:]) for r in all_rows(found.sft)]
    assert len(kept) == 100 and found.report.rows == 5000
    assert "a random sample of 100 rows" in found.notes[-1]
    assert 1900 < sum(kept) / 100 < 3100  # of all 5,000, not the first hundred
    monkeypatch.setattr(data_module, "MEMORY", 20_000)
    rows = ({"prompt": f"p{i}", "completion": "x" * 50} for i in range(5000))
    assert 30 < load_data(rows).report.kept < 130
    rows = ({"prompt": f"p{i}", "completion": "x" * 50} for i in range(5000))
    assert load_data(rows, limit=400).report.kept == 400, "who names a number gets it"


@given(st.integers(0, 200), st.integers(1, 50), st.integers(0, 10**6))
def test_a_sample_is_uniform_and_within_its_limits(count, limit, seed):
    """Checked against sorting all of them by the same draws."""
    import random

    sample = Reservoir(seed, limit, 10**9)
    for i in range(count):
        sample.add({"i": i})
    draw = random.Random(seed)
    order = sorted(range(count), key=[draw.random() for _ in range(count)].__getitem__)
    assert [r["i"] for r in sample.rows()] == order[:limit]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["prompt", "chosen", "role", "content", "x"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)
ROW = st.fixed_dictionaries(
    {}, optional={k: JSON for k in ("prompt", "completion", "chosen", "rejected", "messages")}
)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(ROW | JSON, max_size=15))
def test_rows_of_anything_are_read_or_refused_in_one_line(rows):
    try:
        found = from_rows(rows)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
        return
    assert isinstance(found, Data) and found.report.rows == len(rows)
    for row in all_rows(found.preferences):
        assert row["chosen"].strip() and row["rejected"].strip()


@settings(max_examples=2500, deadline=10_000, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from([".json", ".jsonl", ".csv", ".tsv", ".parquet", ".json.gz"]),
    st.binary(max_size=200)
    | st.text(string.printable, max_size=200).map(str.encode)
    | st.tuples(st.integers(0, 400), st.binary(max_size=4)),
)
def test_malformed_files_are_read_or_refused_in_one_line(tmp_path, suffix, content):
    """Random bytes, random text, and whole files with some bytes overwritten."""
    path = tmp_path / f"a{suffix}"
    if isinstance(content, tuple):
        at, damage = content
        writer = {
            ".csv": write_csv,
            ".tsv": write_csv,
            ".parquet": write_parquet,
            ".json": write_json,
        }.get(suffix, write_lines)
        whole = writer(path, SHAPES["prompt, completion"]).read_bytes()
        content = whole[:at] + damage + whole[at + len(damage) :]
    path.write_bytes(content)
    try:
        found = load_data(path)
    except ValueError as error:
        assert str(error) and "\n" not in str(error) and "\r" not in str(error)
    else:
        assert found.report.kept >= 10


def test_recognising_needs_no_more_than_names():
    found = recognise(SHAPES["chat: messages"], None, "x").fields
    assert found == Fields(completion="messages")
