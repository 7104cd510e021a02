"""`rlhf-lab data`: the figures it prints, against counting by hand.

pytest tests/test_pipeline.py
"""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rlhf_lab as lab
from rlhf_lab import pipeline
from rlhf_lab.cli.main import main
from rlhf_lab.data.chat import EncodedPrompt
from rlhf_lab.data.load import from_rows

ROWS = [{"prompt": f"Tell me about {i}.\n", "completion": "A fox. " * i} for i in range(1, 41)]


def test_lengths_and_drops_are_those_of_the_tokens():
    tokenizer, limit = lab.load("tiny").tokenizer, 60
    data = from_rows(ROWS)
    (demonstrations, prompts) = pipeline.describe_data(data, "tiny", limit)
    asked = {r["prompt"]: len(tokenizer(r["prompt"])["input_ids"]) for r in ROWS}
    answered = {r["prompt"]: len(tokenizer(r["completion"])["input_ids"]) + 1 for r in ROWS}
    over = [p for p in asked if asked[p] + answered[p] > limit]
    assert 5 < len(over) < 35
    assert demonstrations["truncated"] == len(over) and demonstrations["dropped: too long"] == 0
    middle, most = sorted(answered.values())[20], max(answered.values())
    assert demonstrations["completion tokens"] == f"{middle} (at most {most})"
    assert demonstrations["train"] + demonstrations["held out"] == 40
    # A prompt that leaves no room for a response of 64 tokens is too long for PPO.
    assert prompts["dropped: too long"] == 40


def test_every_stage_begins_where_the_one_before_it_ended(tmp_path, monkeypatch):
    begun = {}

    def train(plan, data, *, out, **_):
        begun[plan.stage] = plan.model.paths
        return SimpleNamespace(model_path=out / "model", status="finished")

    monkeypatch.setattr(pipeline, "train", train)
    for name in ("_simulate", "report"):
        monkeypatch.setattr(pipeline, name, lambda *_: None)
    pairs = [{**r, "chosen": r["completion"], "rejected": "No."} for r in ROWS]
    pipeline.train_all("tiny", from_rows(pairs), out=tmp_path)
    own = lab.load("tiny").paths
    sft = own | {"sft": str(tmp_path / "sft" / "model")}
    both = sft | {"reward": str(tmp_path / "reward" / "model")}
    assert begun == {"sft": own, "reward": sft, "ppo": both, "dpo": both}


def test_every_text_becomes_tokens_once(monkeypatch):
    seen, encode = [], EncodedPrompt.response_ids

    def count(prompt, response, **how):
        seen.extend([response] * isinstance(response, str))
        return encode(prompt, response, **how)

    monkeypatch.setattr(EncodedPrompt, "response_ids", count)
    pipeline.describe_data(from_rows(ROWS), "tiny", 60)
    assert sorted(seen) == sorted(r["completion"] for r in ROWS)


def test_of_a_large_set_a_part_is_looked_at_and_reported(monkeypatch):
    monkeypatch.setattr(pipeline, "COUNTED", 15)
    (demonstrations, _) = pipeline.describe_data(from_rows(ROWS), "tiny", 60)
    assert demonstrations["looked at"] == "15 rows"


def test_the_command_says_shape_rows_and_drops(tmp_path, capsys):
    path = tmp_path / "mine.json"
    same = {"question": "Why?", "better": "So.", "worse": "So."}
    rows = [{**same, "question": f"Why {i}?", "worse": "No."} for i in range(20)] + [same] * 3
    path.write_text(json.dumps(rows))
    fields = ["--field", "chosen=better", "--field", "rejected=worse"]
    assert main(["data", str(path), *fields]) == 0
    printed = capsys.readouterr().out
    assert "prompt = 'question', chosen = 'better', rejected = 'worse'" in printed
    assert "dropped 3 pairs whose chosen and rejected are identical" in printed
    assert "preferences" in printed and "held out" in printed


TEXT = st.text(st.characters(codec="utf-8"), max_size=40)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.fixed_dictionaries({"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}),
        min_size=10,
        max_size=20,
    )
)
def test_any_text_that_is_read_can_be_described(rows):
    try:
        data = from_rows(rows)
    except ValueError:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        described = pipeline.describe_data(data, "tiny")
    assert {d["set"] for d in described} <= {"demonstrations", "preferences", "prompts"}


@pytest.mark.parametrize("field", ["prompt", "rejected"])
def test_a_field_that_nobody_has_is_named(field, capsys, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS))
    assert main(["data", str(path), "--field", f"{field}=nothing"]) == 2
    assert f"no column 'nothing' for {field}" in capsys.readouterr().err
