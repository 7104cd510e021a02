"""What users get wrong: one clear line, exit code 2, and no run folder left behind.

pytest tests/cli/test_errors.py
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest
from families import model_and_rows, rows

import rlhf_lab as lab
from rlhf_lab.cli.main import _parser, main
from rlhf_lab.runs.json_files import unread

pytestmark = pytest.mark.usefixtures("few_stories")


ROWS = rows()
PAIRS = [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in ROWS]
LINES = "\n".join(json.dumps(r) for r in ROWS)
TABLE = "prompt,completion\n" + "\n".join(f"p{i},c{i}" for i in range(20))
HH = "\n\nHuman: {}\n\nAssistant: {}"


def all_with(**changes) -> str:
    return json.dumps([{**r, **changes} for r in ROWS])


# name: (file name, its content, what the line says)
FILES = {
    "missing file": ("none.json", None, "no data file .*none.json: give"),
    "unknown suffix": ("a.txt", LINES, r"\.txt is not a format we read; give a \.json"),
    "no suffix": ("data", LINES, "no suffix is not a format"),
    "empty JSON": ("a.json", "", "has no rows"),
    "empty JSONL": ("a.jsonl", "\n\n", "has no rows"),
    "empty CSV": ("a.csv", "", "has no rows"),
    "CSV of a head only": ("a.csv", "prompt,completion\n", "has no rows"),
    "empty list": ("a.json", "[]", "has no rows"),
    "not JSON": ("a.json", "hello", "not valid JSON: .* line 1"),
    "cut JSON": ("a.json", json.dumps(ROWS)[:-9], "not valid JSON"),
    "single quotes": ("a.json", str(ROWS), "not valid JSON: .*double quotes.* line 1"),
    "a comma too many": ("a.json", json.dumps(ROWS)[:-1] + ",]", "not valid JSON"),
    "text after the list": ("a.json", json.dumps(ROWS) + "x", "something follows the list"),
    "a JSON number": ("a.json", "5", "list of objects"),
    "JSON numbers": ("a.json", "[1, 2, 3]", "list of objects"),
    "lists of lists": ("a.json", "[[1], [2]]", "list of objects"),
    "nested too deeply": ("a.json", "[" * 100_000, "nested too deeply"),
    "broken line 3": ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b"}\n{"prompt":', "line 3"),
    "UTF-16": ("a.json", LINES.encode("utf-16"), "not UTF-8"),
    "Latin-1": ("a.json", '[{"prompt": "\xe9"}]'.encode("latin-1"), "not UTF-8"),
    "binary junk": ("a.jsonl", bytes(range(256)), "not UTF-8|not valid JSON"),
    "too many cells": ("a.csv", "prompt,completion\na,b,c\n", "line 2: 3 cells .* 2 columns"),
    "two equal columns": ("a.csv", "prompt,prompt\na,b\n", "two columns have the same name"),
    "open quote": ("a.csv", 'prompt,completion\n"a,b\n', "line 2: unexpected end"),
    "bars in a CSV": ("a.csv", TABLE.replace(",", "|"), "no prompt field"),
    "not Parquet": ("a.parquet", LINES, "not a readable Parquet file"),
    "not gzip": ("a.jsonl.gz", LINES, "not a whole gzip file"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(LINES.encode())[:-20], "not a whole gzip file"),
    "too few rows": ("a.json", json.dumps(ROWS[:3]), "3 usable rows; at least 10"),
    "empty prompts": ("a.json", all_with(prompt=" "), "no prompt: .* hold no conversation"),
    "numbers for prompts": ("a.json", all_with(prompt=7), "0 usable rows.*wrong type"),
    "half characters": ("a.json", all_with(prompt="\ud800"), "broken characters"),
    "no known field": ("a.json", json.dumps([{"x": "a"}] * 20), r"no prompt field among \[x\]"),
    "chosen alone": (
        "a.json",
        json.dumps([{"prompt": "a", "chosen": "b"}] * 20),
        "chosen is there, rejected is not",
    ),
    "rejected alone": (
        "a.json",
        json.dumps([{"prompt": "a", "rejected": "b"}] * 20),
        "rejected is there, chosen is not",
    ),
    "pairs without a prompt": (
        "a.json",
        json.dumps([{"chosen": "a", "rejected": "b"}] * 20),
        "hold no conversation",
    ),
    "prompts differ": (
        "a.json",
        json.dumps(
            [
                {"chosen": HH.format(f"x{i}", "a"), "rejected": HH.format(f"y{i}", "b")}
                for i in range(20)
            ]
        ),
        "hold no conversation|prompts differ",
    ),
    "no answer at the end": (
        "a.json",
        json.dumps([{"messages": [{"role": "user", "content": f"hi {i}"}]} for i in range(20)]),
        "nothing to train reward on",  # they wait for an answer: prompts
    ),
    "roles of numbers": (
        "a.json",
        json.dumps([{"messages": [{"role": 1, "content": "x"}]} for i in range(20)]),
        "hold no conversation|wrong type",
    ),
    "identical pairs": (
        "a.json",
        all_with(chosen="same", rejected="same"),
        "nothing to train reward on",
    ),
    "no preferences": (
        "a.json",
        json.dumps([{"prompt": f"p{i}", "completion": "c"} for i in range(20)]),
        "nothing to train reward on",
    ),
    "prompts alone": (
        "a.json",
        json.dumps([{"prompt": f"p{i}"} for i in range(20)]),
        "nothing to train reward on",
    ),
}


def error_line(args: list[str], capsys) -> str:
    """Run the command line; → its one line on standard error."""
    try:
        code = main(args)
    except SystemExit as left:
        code = left.code
    line = capsys.readouterr().err
    assert code == 2, line
    assert line.startswith("rlhf-lab: ") and line.count("\n") == 1 and "Traceback" not in line
    assert not Path("runs").exists() and not Path("out").exists(), "a run folder was left behind"
    return line


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("name", FILES)
def test_broken_data(name, tmp_path, capsys):
    file, content, says = FILES[name]
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / file).write_bytes(data)
    line = error_line(["train", "reward", "--data", str(tmp_path / file), "--out", "out"], capsys)
    assert re.search(says, line), line


DEMOS = [{"prompt": f"p{i}", "completion": "c"} for i in range(20)]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
# name: (stage, rows, what the line says)
UNFIT = {
    "demonstrations, reward": ("reward", DEMOS, "nothing to train reward on: no chosen and"),
    "demonstrations, kto": ("kto", DEMOS, "nothing to train kto on: no completion and label"),
    "prompts alone": ("sft", [{"prompt": r["prompt"]} for r in DEMOS], "nothing to train sft on"),
    "labelled": ("sft", [{**r, "label": i < 9} for i, r in enumerate(DEMOS)], "nothing to train"),
    "empty answers": ("sft", [{**r, "completion": ""} for r in DEMOS], "nothing to train sft on"),
    "identical": ("dpo", [{**r, "rejected": r["chosen"]} for r in PAIRS], "nothing to train dpo"),
    "tools": ("sft", [{"messages": TURNS, "tools": TOOLS}] * 20, "no row is left.*out tools"),
    "long": ("sft", [{**r, "prompt": "a " * 6000} for r in DEMOS], r"within 512 tokens \(\d+ too"),
    "long pairs": ("dpo", [{**r, "prompt": "a " * 6000} for r in PAIRS], "max_length may be up"),
    "long, sampled": ("ppo", [{**r, "prompt": "a " * 6000} for r in DEMOS], "no row is left"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_plan_refuses_the_rows_that_a_training_refuses(name, tmp_path, capsys):
    stage, unfit, says = UNFIT[name]
    (file := tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, unfit)))
    given = [stage, "--data", str(file)]
    line = error_line(["plan", *given], capsys)
    assert re.search(says, line), line
    assert line == error_line(["train", *given, "--out", "out", "--quiet"], capsys)
    with pytest.raises(ValueError) as refused:
        lab.plan(stage, data=file)
    assert line == f"rlhf-lab: {refused.value}\n"


@pytest.mark.parametrize(
    ("asked", "near"), [("nope.yaml", ""), ("note8.md", "note9.md"), ("NOTE9.md", "note9.md")]
)
def test_a_missing_file_is_not_taken_for_a_stranger(asked, near, tmp_path):
    (tmp_path / "note9.md").touch()
    line = unread(tmp_path / asked, FileNotFoundError())
    hint = f"; did you mean '{tmp_path / near}'?" if near else ""
    assert line == f"no such file: {tmp_path / asked}{hint}"


# ------------------------------------------------------------------------------------------ models


def overwrite(file: str, content: str | bytes):
    def change(folder: Path) -> None:
        data = content if isinstance(content, bytes) else content.encode()
        (folder / file).write_bytes(data)

    return change


def remove(*files: str):
    def change(folder: Path) -> None:
        for file in files:
            (folder / file).unlink()

    return change


def settings(file: str, **changes):
    """Change (or with None: take out) entries of a JSON file."""

    def change(folder: Path) -> None:
        whole = json.loads((folder / file).read_text()) | changes
        kept = {k: v for k, v in whole.items() if v is not None}
        (folder / file).write_text(json.dumps(kept))

    return change


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lacks_a_layer(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    whole = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in whole.items() if "layers.1." not in k}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


MODELS = {
    "no config": (remove("config.json"), "no config.json in the model folder"),
    "config is not JSON": (overwrite("config.json", "{"), "config.json is not JSON"),
    "config is binary": (overwrite("config.json", b"\xff\xfe\x00"), "config.json is not JSON"),
    "config is a list": (overwrite("config.json", "[]"), "names no model_type"),
    "no model_type": (settings("config.json", model_type=None), "names no model_type"),
    "unknown model_type": (settings("config.json", model_type="nonesuch"), "cannot load a"),
    "no weights": (remove("model.safetensors"), "cannot load a model"),
    "pickled weights": (pickled, "convert them to safetensors"),
    "weights cut short": (cut_weights, "cannot load a model"),
    "weights are a pointer": (
        overwrite("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        "is a pointer of Git LFS, not the file: run git lfs pull",
    ),
    "weights are junk": (overwrite("model.safetensors", "junk" * 99), "cannot load a model"),
    "a layer is missing": (lacks_a_layer, "weights missing.*not a whole one"),
    "sizes do not match": (settings("config.json", hidden_size=32), "cannot load a model"),
    "heads do not divide": (settings("config.json", num_attention_heads=7), "cannot load a"),
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), "no tokenizer in it"),
    "tokenizer is not JSON": (overwrite("tokenizer.json", "{"), "cannot load a tokenizer"),
    "no eos token": (settings("tokenizer_config.json", eos_token=None), "has no eos token"),
    "an encoder": (settings("config.json", model_type="bert"), "bert has layers of its own"),
    "code of its own": (
        settings("config.json", model_type="mine", auto_map={"AutoConfig": "code.Mine"}),
        "Python code of its own",
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model folder and a data file in which nothing is wrong."""
    return model_and_rows(tmp_path_factory.mktemp("whole"), ROWS)


@pytest.mark.parametrize("name", MODELS)
def test_broken_models(name, whole, tmp_path, capsys):
    change, says = MODELS[name]
    shutil.copytree(whole / "model", tmp_path / "model")
    change(tmp_path / "model")
    args = ["train", "sft", "--model", str(tmp_path / "model"), "--out", "out"]
    line = error_line([*args, "--data", str(whole / "rows.json")], capsys)
    assert re.search(says, line), line


# --------------------------------------------------------------------------------------- arguments

ARGUMENTS = {
    "unknown command": (["fly"], "invalid choice: 'fly'"),
    "unknown stage": (["train", "pop"], "invalid choice: 'pop'"),
    "unknown option": (["train", "sft", "--stepz", "3"], "unrecognized arguments: --stepz"),
    "no steps": (["train", "sft", "--steps", "0"], "must be 1 or more"),
    "steps in words": (["train", "sft", "--steps", "many"], "whole number .* not 'many'"),
    "seed in words": (["train", "sft", "--seed", "x"], "invalid int value: 'x'"),
    "no rows": (["train", "sft", "--rows", "-1"], "must be 1 or more"),
    "set without =": (["train", "dpo", "--set", "beta"], "write NAME=VALUE"),
    "unknown setting": (["train", "dpo", "--set", "betta=1"], "did you mean 'beta'"),
    "setting of another stage": (["train", "sft", "--set", "kl_coef=1"], "no setting 'kl_coef'"),
    "a word for a number": (["train", "sft", "--set", "learning_rate=fast"], "must be a number"),
    "a number for a switch": (["train", "sft", "--set", "bf16=3"], "must be True or False"),
    "negative rate": (["train", "sft", "--set", "learning_rate=-1"], "must be above 0"),
    "no minibatches": (["train", "ppo", "--set", "num_mini_batches=0"], "of at least 1"),
    "uneven minibatches": (["train", "ppo", "--set", "num_mini_batches=5"], "does not split"),
    "temperature 0": (["train", "ppo", "--set", "temperature=0"], "temperature must be above"),
    "no response": (["train", "ppo", "--set", "response_length=0"], "response_length must be"),
    "endless response": (["train", "ppo", "--set", "response_length=5000"], "leaves no room"),
    "unknown estimator": (["train", "ppo", "--set", "kl_estimator='k9'"], "did you mean 'k3'"),
    "unknown scheduler": (["train", "sft", "--set", "lr_scheduler_type=bent"], "bent"),
    "rank -1": (["train", "sft", "--set", "lora_r=-1"], "lora_r must be 0 or more, got -1"),
    "no such layer": (
        ["train", "sft", "--set", "lora_r=2", "--set", "lora_target_modules=['nope']"],
        "nope",
    ),
    "one token a row": (["train", "sft", "--set", "max_length=1"], "no row is left"),
    "field without =": (["train", "sft", "--data", "ROWS", "--field", "chosen"], "OURS=COLUMN"),
    "unknown field": (["train", "sft", "--data", "ROWS", "--field", "x=prompt"], "no field 'x'"),
    "unknown column": (["train", "sft", "--data", "ROWS", "--field", "prompt=x"], "no column 'x'"),
    "unknown model": (["train", "sft", "--model", "tinny"], "no model 'tinny': did you mean tiny"),
    "no such folder": (["train", "sft", "--model", "./nope"], "no such folder: nope"),
    "a model as a word": (
        ["plan", "ppo", "mini"],
        "mini; a model is given with --model",
    ),
    "a command nearly": (["quantise"], "did you mean 'quantize'"),
    "a choice nearly": (["export", "x", "--to", "guf"], "did you mean 'gguf'"),
    "a teacher nowhere": (
        ["plan", "distill", "--teacher-model", "me/x"],
        "no model 'me/x': n",
    ),
    "hub model, no hub": (
        ["train", "sft", "--model", "owner/name", "--data", "ROWS"],
        "hub cannot be reached",
    ),
    "preset, no hub": (
        ["train", "sft", "--model", "Qwen2.5-0.5B", "--data", "ROWS"],
        "hub cannot be reached",
    ),
    "hub data, no hub": (["train", "sft", "--data", "owner/name"], "hub cannot be reached"),
    "data is a folder": (
        ["train", "sft", "--data", "."],
        "is a folder in which datasets finds no data",
    ),
    "PPO without a reward model": (
        ["train", "ppo", "--model", "MODEL", "--data", "ROWS"],
        "needs a reward model",
    ),
    "a language model for reward": (["train", "ppo", "--reward-model", "MODEL"], "no score head"),
    "a shortened flag": (["train", "sft", "--accel", "cpu", "--proc", "2"], "did you mean '--acc"),
    "nothing to list": (["list"], "what is one of models, hardware, stages, settings"),
    "no stage": (["train"], "stage is one of sft, reward, ppo, dpo"),
    "a setting as a flag": (["train", "dpo", "--beta", "3"], "it is a setting: --set beta=3 "),
    "the plan's flag": (["train", "sft", "--lora-r=8"], "it is a setting: --set lora_r=8 "),
    "a setting of all": (["train", "all", "--kl-coef"], "it is a setting: --set kl_coef=VALUE "),
    "4 bits whole": (
        ["train", "sft", "--set", "load_in_4bit=True"],
        "load_in_4bit trains adapters only: set lora_r, for example 16",
    ),
    "4 bits of four models": (
        ["train", "ppo", "--set", "load_in_4bit=True", "--set", "lora_r=8"],
        "PPO trains one base in 4 bits alone: set layout=adapters",
    ),
    "a run to come": (
        ["train", "ppo", "--reward-model", "runs/none/model"],
        "no such folder: runs/none/model; .* train that first, also for a dry run",
    ),
    "processes without a network": (
        ["plan", "sft", "--gpus", "2"],
        "bytes/s go from process to process.*measure --set network=1e9",
    ),
}


DOORS = {
    "quantize": lambda run: lab.quantize(run),
    "serve": lambda run: lab.serve(run),
    "export": lambda run: lab.export(run, to="gguf"),
    "chat": lambda run: lab.chat(run),
    "generate": lambda run: lab.generate(run, "A story."),
    "health": lambda run: lab.health(run),
    "clone": lambda run: lab.clone(run),
    "report": lambda run: lab.report(run),
    "inspect": lambda run: lab.inspect(run),
    "plan": lambda run: lab.plan("ppo", run),
    "reward model": lambda run: lab.plan("ppo", reward_model=run),
    "teacher": lambda run: lab.plan("distill", teacher_model=run),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_folder_that_is_not_there_is_called_the_same_at_every_door(door, tmp_path):
    (tmp_path / "runs" / "ppo-1").mkdir(parents=True)
    with pytest.raises((ValueError, OSError)) as refused:
        DOORS[door]("runs/ppo1")
    assert str(refused.value) == "no such folder: runs/ppo1; did you mean 'runs/ppo-1'?"


@pytest.mark.parametrize("name", sorted({*lab.__all__} - {"plan", "train"}))
def test_a_function_without_a_command_is_said_to_be_python_s(name, capsys):
    word = name.replace("_", "-")
    if word not in _parser()._subparsers._group_actions[0].choices:
        line = f"{word} has no command: in Python, import rlhf_lab as lab; lab.{name}"
        assert line in error_line([word, "runs/x"], capsys)


@pytest.mark.parametrize("word, near", [("helth", "lab.health("), ("trian", "'train'")])
def test_a_command_misspelt_has_a_near_name(word, near, capsys):
    assert near in error_line([word], capsys)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_wrong_arguments(name, whole, capsys):
    args, says = ARGUMENTS[name]
    places = {"ROWS": str(whole / "rows.json"), "MODEL": str(whole / "model")}
    args = [places.get(a, a) for a in args]
    if args[:1] == ["train"]:
        args += ["--out", "out"]
    line = error_line(args, capsys)
    assert re.search(says, line), line


def test_a_run_that_is_there_stays(whole, capsys, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.json").write_text("{}")
    args = ["train", "sft", "--model", str(whole / "model"), "--data", str(whole / "rows.json")]
    line = error_line([*args, "--out", "mine"], capsys)
    assert "already holds a run" in line and "give --overwrite" in line
    assert (tmp_path / "mine" / "run.json").read_text() == "{}"
    (tmp_path / "file").write_text("")
    assert "is a file" in error_line([*args, "--out", "file"], capsys)
    assert error_line([*args, "--out", "file/inside"], capsys)


def test_enough_kinds_are_named():
    assert len(FILES) + len(MODELS) + len(ARGUMENTS) >= 60
