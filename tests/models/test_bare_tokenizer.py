"""Tokens without transformers: a bundled model's are transformers' own.

pytest tests/models/test_bare_tokenizer.py
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from families import rows

import rlhf_lab as lab
from rlhf_lab.data.chat import EncodedPrompt, chat_format
from rlhf_lab.data.load import load_data
from rlhf_lab.data.messages import Dropped
from rlhf_lab.models.load import BUNDLED
from rlhf_lab.models.tokenizer import BareTokenizer, load_tokenizer
from rlhf_lab.pipeline import describe_data

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TURN = {"role": "user", "content": " Who?\n"}
TALKS = [
    [TURN],
    [{"role": "system", "content": "Be kind."}, TURN],
    [TURN, {"role": "assistant", "content": "No"}],
    [TURN, {"role": "assistant", "content": "No."}, {"role": "user", "content": "<b>'é' 🧿"}],
    [
        TURN,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
    ],
]
ANSWERS = [
    "Nobody.",
    " spaces ",
    "",
    "a</s>",
    [{"role": "assistant", "content": "b", "reasoning_content": "r"}],
]


def texts(seed: int, special: list[str]) -> list[str]:
    """Words, odd characters, spaces and the tokenizer's own special tokens in random order."""
    rng = random.Random(seed)
    pieces = [" ", "  ", "\n", "\t", "w1", "The fox", "é", "☃", "🧿", "\x07", "'s", "12", *special]
    return ["".join(rng.choices(pieces, k=rng.randint(0, 12))) for _ in range(60)]


def found(read, *args) -> object:
    """What is read, or why it is left out."""
    try:
        return read(*args)
    except Dropped as reason:
        return str(reason)


def assert_same(bare, whole) -> None:
    """All that readers of prompts and answers ask of a tokenizer."""
    assert chat_format(bare) == chat_format(whole)
    special = [token.content for token in whole.added_tokens_decoder.values()]
    assert set(bare.all_special_ids) == set(whole.all_special_ids)
    for text in texts(len(special), special):
        for add in (True, False):
            assert (
                bare(text, add_special_tokens=add).input_ids
                == whole(text, add_special_tokens=add).input_ids
            )
    for talk in [*TALKS, *texts(1, special)[:10]]:
        for tools in (None, [TOOL]) if isinstance(talk, list) else (None,):
            one, other = (EncodedPrompt(t, talk, tools) for t in (bare, whole))
            assert found(lambda p: p.ids, one) == found(lambda p: p.ids, other)
            for answer in ANSWERS:
                assert found(one.learned_ids, answer) == found(other.learned_ids, answer)


@pytest.mark.parametrize("name", BUNDLED)
def test_the_bundled_ones_are_read(name):
    folder = Path(lab.load(name).paths["base"])
    bare = BareTokenizer(folder)
    assert_same(bare, load_tokenizer(folder))
    assert "whole" in vars(bare)  # tools, and beginnings to go on from: transformers was asked


def test_others_are_left_to_transformers(tmp_path):
    """The same files elsewhere too: what somebody keeps there may change."""
    folder = tmp_path / "tiny"
    shutil.copytree(lab.load("tiny").paths["base"], folder)
    assert isinstance(lab.load("tiny").encoder, BareTokenizer)
    assert not isinstance(lab.load(folder).encoder, BareTokenizer)


def test_the_stories_are_described_without_writing_them():
    """The table of the lengths that ship with the models is that of the rows themselves, as
    transformers' tokenizer cuts them."""
    model, stories = lab.load("tiny"), load_data("stories")
    _ = model.tokenizer
    assert not isinstance(model.encoder, BareTokenizer)
    for limit in (512, 62):
        described = describe_data("stories", "tiny", limit)
        assert described == describe_data(stories, model, limit)
        assert any(row.get("truncated") for row in described) == (limit == 62)


DATA = "from rlhf_lab.cli.main import main\nassert main(['data', {!r}]) == 0"
PLAN = (
    "import rlhf_lab as lab\nfrom rlhf_lab.planning import predict\n"
    "predict(lab.plan('sft', 'tiny', hardware='h100'), lab.load_data('mine.jsonl'))"
)
HEAVY = "torch transformers trl datasets pandas plotly numpy".split()


@pytest.mark.parametrize("code", [DATA.format("stories"), DATA.format("mine.jsonl"), PLAN])
def test_nothing_heavy_is_imported(code, tmp_path):
    """Issue 31: `data` took eight seconds of a processor, most of them to import transformers."""
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows())))
    code = f"{code}\nimport sys\nprint({set(HEAVY)} & set(sys.modules))"
    run = {"capture_output": True, "text": True, "cwd": tmp_path}
    done = subprocess.run([sys.executable, "-c", code], **run)
    assert done.stdout.splitlines()[-1:] == ["set()"], done.stdout + done.stderr
