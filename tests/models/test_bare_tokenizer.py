"""Tokens without transformers: where a tokenizer's files are understood they are transformers' own,
elsewhere nothing is read.

pytest tests/models/test_bare_tokenizer.py
"""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
from families import make_folder, rows
from templates import case, chat_tokenizer, names

import rlhf_lab as lab
from rlhf_lab.data.chat import EncodedPrompt, chat_format
from rlhf_lab.data.load import load_data
from rlhf_lab.data.messages import Dropped
from rlhf_lab.models.bare_tokenizer import BareTokenizer, bare_tokenizer
from rlhf_lab.models.load import BUNDLED
from rlhf_lab.models.tokenizer import load_tokenizer
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
PLAIN = "{% for m in messages %}{{ m.content }} {% endfor %}"


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
    folder = lab.load(name).paths["base"]
    bare = bare_tokenizer(folder)
    assert bare is not None
    assert_same(bare, load_tokenizer(folder))
    assert "whole" in vars(bare)  # tools, and beginnings to go on from: transformers was asked


READ = {"gemma", "gemma3", "phi3", "llava_next", "strict alternation, spaces around"}
"""Some of the templates that must be read, so that this test compares something."""


@pytest.mark.parametrize("name", names())
def test_templates_write_what_transformers_writes(name, tmp_path):
    known = case(name)
    tokenizer = chat_tokenizer(known.template, known.eos)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    bare = bare_tokenizer(tmp_path)
    assert bare is not None or name not in READ
    if bare is not None:
        assert_same(bare, load_tokenizer(tmp_path))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gpt2", "gpt_neox"])
def test_families_are_read_or_left_to_transformers(family, tmp_path):
    folder = make_folder(tmp_path / "model", family)
    (folder / "chat_template.jinja").write_text(PLAIN)
    bare = bare_tokenizer(folder)
    assert (bare is not None) == (family not in ("mistral", "qwen2"))
    if bare is not None:
        assert_same(bare, load_tokenizer(folder))


def planted(file: str, **changes):
    def plant(folder):
        path = folder / file
        there = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**there, **changes}))

    return plant


CUTS = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
TEMPLATE = "chat_template.jinja"
FAULTS = {
    "texts are cut": planted("tokenizer.json", truncation=CUTS),
    "a token that is none yet": planted("tokenizer_config.json", unk_token="<new>"),
    "another of them": planted("tokenizer_config.json", extra_special_tokens=["<new>"]),
    "a setting": planted("tokenizer_config.json", split_special_tokens=True),
    "a class": planted("tokenizer_config.json", tokenizer_class="GPT2Tokenizer"),
    "no class": planted("tokenizer_config.json", tokenizer_class=None),
    "a pad token to choose": planted("tokenizer_config.json", pad_token="<|end|>"),
    "code": planted("config.json", auto_map={"AutoConfig": "x.Y"}),
    "a family": planted("config.json", model_type="mistral"),
    "older files": planted("special_tokens_map.json", bos_token="<|user|>"),
    "a broken file": lambda folder: (folder / "tokenizer.json").write_text("{"),
    "no file": lambda folder: (folder / "tokenizer.json").unlink(),
    "no template": lambda folder: (folder / TEMPLATE).unlink(),
    "a broken template": lambda folder: (folder / TEMPLATE).write_text("{% if %}"),
    "a date": lambda folder: (folder / TEMPLATE).write_text("{{ strftime_now('%Y') }}"),
    "JSON": lambda folder: (folder / TEMPLATE).write_text("{{ messages | tojson }}"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_understood_is_not_read(fault, tmp_path):
    load_tokenizer(lab.load("tiny").paths["base"]).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert bare_tokenizer(tmp_path) is not None
    FAULTS[fault](tmp_path)
    assert bare_tokenizer(tmp_path) is None


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
