"""What is refused before training starts, and told at once; and what stops a run, told in one line.

Rows of shared cases: stumbles 15 to 18, models 7, 19, 20, 21.

    pytest tests/test_before_training.py
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from families import model_and_rows, rows

import rlhf_lab as lab
from rlhf_lab import pipeline
from rlhf_lab.cli.main import main
from rlhf_lab.runs.lock import acquire, release
from rlhf_lab.runs.run import Run
from rlhf_lab.stages import STAGES

ROWS = rows(40)
SHORT = {"max_steps": 2, "per_device_train_batch_size": 4, "seed": 0}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A random model and a file of rows, in which nothing is wrong."""
    return model_and_rows(tmp_path_factory.mktemp("whole"), ROWS)


def told(args: list[str], capsys, code: int = 2) -> str:
    """The one line that the command line says."""
    try:
        found = main(args)
    except SystemExit as left:
        found = left.code
    line = capsys.readouterr().err
    assert found == code and line.count("\n") == 1 and line.startswith("rlhf-lab: "), line
    return line


# ------------------------------------------------------------------------------------ told at once

AT_ONCE = {
    "stumbles 18: a typo": (["dpo", "--set", "betta=1"], "did you mean 'beta'"),
    "stumbles 18: in all stages": (["all", "--set", "betta=1"], "did you mean 'beta'"),
    "stumbles 18: a value": (["ppo", "--set", "kl_coef=much"], "must be a number"),
    "stumbles 15: no reward model": (["ppo", "--model", "MODEL"], "--reward-model FOLDER"),
    "stumbles 15: for all of them": (["grpo", "--model", "MODEL"], "--reward-model FOLDER"),
    "stumbles 16: there already": (["ppo", "--out", "DONE"], "give --overwrite"),
    "stumbles 16: in a row": (["all", "--out", "ALL"], "ALL/dpo already holds a run"),
    "stumbles 17: nowhere to write": (["sft", "--out", "/proc/x"], "no run can be written in /pro"),
    "stumbles 17: --modell": (["sft", "--modell", "x"], "'--model'? (see rlhf-lab train --help)"),
    "as models 20: eos": (["sft", "--set", "eos_token=<x>"], "change the tokenizer in the model's"),
    "models 20: SFT": (["sft", "--set", "resume_from_checkpoint=x"], "has no effect here"),
    "models 20: PPO": (["ppo", "--set", "resume_from_checkpoint=x"], "--out with --resume"),
    "the run's folder": (["sft", "--set", "output_dir=x"], "is named by --out"),
    "resumed and replaced": (["ppo", "--out", "o", "--resume", "--overwrite"], "say one of them"),
}
SLOW = "torch transformers trl datasets pandas plotly".split()
SCRIPT = """
import sys, time
from rlhf_lab.cli import main as cli
from rlhf_lab.data import load
load.load_data = lambda *_, **__: sys.exit("data were read")
start = time.perf_counter()
try:
    code = cli.main(sys.argv[1:])
except SystemExit as left:
    code = left.code
print(code, time.perf_counter() - start, *(m for m in %r if m in sys.modules), sep=",")
"""


@pytest.mark.parametrize("name", AT_ONCE)
def test_told_within_a_second_before_anything_slow(name, whole, tmp_path):
    """Neither data nor trainers are loaded; the message speaks of flags; nothing is left behind."""
    args, says = AT_ONCE[name]
    for folder in ("DONE", "ALL/dpo"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "run.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    args = [str(whole / "model") if a == "MODEL" else a for a in args]
    command = [sys.executable, "-c", SCRIPT % (SLOW,), "train", *args]
    done = subprocess.run(command, capture_output=True, text=True)
    assert says in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert "overwrite=True" not in done.stderr and "resume=" not in done.stderr
    code, seconds, *slow = done.stdout.strip().split(",")
    assert code == "2" and slow == [] and float(seconds) < 3  # .3 on a quiet machine
    assert sorted(tmp_path.rglob("*")) == before


def test_in_python_the_same_is_said_of_arguments(whole, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "run.json").write_text("{}")
    plan = lab.plan("ppo", whole / "model")
    for how, says in (
        ({}, r"model\.with_stage\('reward', FOLDER\)"),
        ({"out": "r"}, "say overwrite=True"),
        ({"out": "r", "resume": True, "overwrite": True}, "resume goes on with a run, overwrite"),
        ({"resume": True}, r"say which \(out\)"),
    ):
        with pytest.raises((ValueError, OSError), match=says) as error:
            lab.train(plan, whole / "rows.json", **how)
        assert "--" not in str(error.value).replace("--model", "")
    with pytest.raises(ValueError, match="in out with resume=True"):
        lab.train(lab.plan("ppo", resume_from_checkpoint="x"))


def test_a_name_that_only_some_stages_have_goes_to_these(monkeypatch, tmp_path):
    """`train all --set beta=0.3`: DPO's; `kl_coef`: PPO's."""
    plans = {}

    def train(plan, data, *, out, **_):
        plans[plan.stage] = plan
        return SimpleNamespace(model_path=out / "model", status="finished")

    monkeypatch.setattr(pipeline, "train", train)
    for name in ("_simulate", "report"):
        monkeypatch.setattr(pipeline, name, lambda *_: None)
    settings = {"beta": 0.3, "kl_coef": 0.7, "max_steps": 3}
    pipeline.train_all("tiny", lab.load_data(ROWS), out=tmp_path / "all", settings=settings)
    assert [s for s, p in plans.items() if p.settings.get("beta") == 0.3] == ["dpo"]
    assert [s for s, p in plans.items() if p.settings.get("kl_coef") == 0.7] == ["ppo"]
    assert all(p.settings["max_steps"] == 3 for p in plans.values()) and len(plans) == 4


PAIRS = [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in ROWS]
WHOLE_ROW = {
    "no pairs": (
        [{k: r[k] for k in ("prompt", "completion")} for r in ROWS],
        {},
        "train reward on",
    ),
    "a value of PPO's": (PAIRS, {"num_mini_batches": 5}, "does not split"),
    "no room": (PAIRS, {"response_length": 5000}, "takes 1024 tokens"),
    "planned only": (PAIRS, {"gpus": 2}, "planned only"),
}


@pytest.mark.parametrize("name", WHOLE_ROW)
def test_every_stage_is_checked_before_the_first_begins(name, monkeypatch, tmp_path):
    data, settings, says = WHOLE_ROW[name]
    monkeypatch.setattr(pipeline, "train", lambda *_, **__: pytest.fail("a stage has begun"))
    with pytest.raises(ValueError, match=says):
        pipeline.train_all("tiny", lab.load_data(data), out=tmp_path / "a", settings=settings)
    assert not (tmp_path / "a").exists()


def test_stumbles_17_a_bare_command_shows_what_there_is(capsys):
    assert main([]) == 0
    assert "best-of-n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("what", "rows"),
    [
        (["models"], ["tiny", "smollm2-135m", "Qwen/Qwen2.5-7B", "bundled"]),
        (["hardware"], ["h100", "GiB"]),
        (["settings", "--stage", "dpo"], ["beta", "0.5", "learning_rate"]),
    ],
)
def test_stumbles_17_what_has_a_name_is_listed(what, rows, capsys):
    assert main(["list", *what]) == 0
    printed = capsys.readouterr().out
    assert all(row in printed for row in rows)


def test_stumbles_17_the_row_that_is_broken_is_named(tmp_path, capsys):
    """Line 1 lacks its brace, so that the text breaks off in line 2."""
    lines = [json.dumps(r) for r in ROWS]
    lines[0] = lines[0][:-1]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    assert told(["data", "bad.jsonl"], capsys).rstrip().endswith("line 1")


def test_a_table_of_pandas_is_read_as_its_file_is(tmp_path):
    """Cells of lists come as arrays out of Parquet."""
    pandas = pytest.importorskip("pandas")
    turns = [
        {"messages": [{"role": "user", "content": f"w{i}"}, {"role": "assistant", "content": "w1"}]}
        for i in range(20)
    ]
    pandas.DataFrame(turns).to_parquet(tmp_path / "t.parquet")
    table = pandas.read_parquet(tmp_path / "t.parquet")
    assert lab.load_data(table).sft == lab.load_data(tmp_path / "t.parquet").sft
    gaps = pandas.DataFrame({"prompt": [f"w{i}" for i in range(20)], "completion": ["w1"] * 20})
    gaps.loc[3, "completion"] = None
    assert "dropped 1 row: empty" in lab.load_data(gaps).notes[1]


# ----------------------------------------------------------------------------- one run, one folder


def new(folder: Path, **more) -> Run:
    return Run.create(folder, stage="ppo", model="tiny", settings={}, **more)


def test_two_runs_in_one_folder_are_refused(tmp_path):
    run = new(tmp_path / "r")
    for how in (lambda: new(tmp_path / "r", overwrite=True), lambda: Run.reopen(tmp_path / "r")):
        with pytest.raises(FileExistsError, match="a training that is still going on"):
            how()
    run.finish()
    new(tmp_path / "r", overwrite=True).finish()
    assert [p.name for p in (tmp_path / "r").iterdir()] == ["run.json"]


def test_four_stages_hold_their_folder(tmp_path, whole):
    """Between two stages nobody else may begin there."""
    lock = acquire(tmp_path / "all")
    with pytest.raises(FileExistsError, match="still going on"):
        pipeline.train_all("tiny", whole / "rows.json", out=tmp_path / "all", overwrite=True)
    release(tmp_path / "all", lock)
    assert not (tmp_path / "all").exists()


KILLED = """
import os, signal, sys
from rlhf_lab.runs.run import WHOLE, Run
run = Run.create(sys.argv[1], stage="ppo", model="tiny", settings={})
run.log(7, reward=1.0)
if sys.argv[2] == "saved":
    (run.folder / "trainer" / "checkpoint-5").mkdir(parents=True)
    (run.folder / "trainer" / "checkpoint-5" / WHOLE).touch()
print(Run.load(run.folder).status, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal here")
@pytest.mark.parametrize("saved", ["saved", "not saved"])
def test_models_21_a_killed_run_says_what_there_is(saved, tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "r"), saved]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode < 0 and done.stdout.strip() == "running", done.stderr
    run = Run.load(tmp_path / "r")
    assert run.status == "interrupted" and "status='interrupted'" in repr(run)
    line = run.what_is_left()
    assert line.startswith("interrupted at step 7: no model was saved; ")
    assert ("resume=True" in line) == (saved == "saved") and line in repr(run.show())
    with pytest.raises(FileNotFoundError, match="has no model: interrupted at step 7"):
        _ = run.model_path
    with pytest.raises(FileExistsError, match="already holds a run .interrupted at step 7"):
        new(tmp_path / "r")
    new(tmp_path / "r", overwrite=True).finish()


# ------------------------------------------------------------------------------------- interrupted


def interrupted_after(steps: int, monkeypatch) -> None:
    """Ctrl-C when a metric of that step is logged."""
    log = Run.log

    def pressed(self, step, **metrics):
        log(self, step, **metrics)
        if step >= steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "log", pressed)


def test_stumbles_16_ctrl_c_says_so_and_how_to_go_on(few_stories, monkeypatch, capsys, tmp_path):
    from rlhf_lab.data import load

    monkeypatch.setattr(load, "load_data", lambda *_, **__: few_stories)
    sizes = {"per_device_train_batch_size": 4, "response_length": 8, "num_mini_batches": 1}
    sets = [x for k, v in (sizes | {"save_steps": 1}).items() for x in ("--set", f"{k}={v}")]
    args = ["train", "ppo", "--steps", "3", *sets, "--out", "r"]
    with monkeypatch.context() as patch:
        interrupted_after(2, patch)
        assert main([*args, "--quiet"]) == 130
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("rlhf-lab: interrupted: r stopped at step 2: its model so far is in r/")
    assert line.endswith("go on with the same settings and --out r --resume")
    assert "--out r --resume" in told([*args, "--quiet"], capsys)  # the same command again
    assert main([*args, "--resume"]) == 0
    shown = capsys.readouterr()
    assert "3/3" in shown.err and "1/1" not in shown.err  # counted as what it is a part of
    assert Run.load("r").status == "finished"


def test_an_interrupt_ends_the_four_stages(monkeypatch, tmp_path):
    begun = []

    def train(plan, data, *, out, **_):
        begun.append(plan.stage)
        status = "stopped" if plan.stage == "reward" else "finished"
        return SimpleNamespace(model_path=out / "model", status=status)

    monkeypatch.setattr(pipeline, "train", train)
    for name in ("_simulate", "report"):
        monkeypatch.setattr(pipeline, name, lambda *_: None)
    runs = pipeline.train_all("tiny", lab.load_data(ROWS), out=tmp_path / "all")
    assert begun == list(runs) == ["sft", "reward"]


# ---------------------------------------------------------------------------------------- diverged


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "kto", "rloo", "grpo", "ppo"])
def test_models_7_nan_in_the_starting_weights_is_said_before_training(stage, whole, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(whole / "model", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][0, 0] = math.nan
    save_file(weights, file, metadata={"format": "pt"})
    sizes = {"num_mini_batches": 1} if stage == "ppo" else {}
    sizes |= {"response_length": 4} if stage in ("ppo", "rloo", "grpo") else {}
    plan = lab.plan(stage, tmp_path / "model", **SHORT, **sizes)
    by_length = {"reward_funcs": lambda completions, **_: [0.0] * len(completions)}
    more = by_length if stage in ("ppo", "rloo", "grpo") else {}
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinity") as error:
        lab.train(plan, whole / "rows.json", out=tmp_path / "r", quiet=True, **more)
    assert "\n" not in str(error.value) and not (tmp_path / "r").exists()


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "kto", "rloo", "grpo"])
def test_models_7_a_loss_that_is_no_number_ends_the_run(stage, whole, tmp_path, monkeypatch):
    """A weight becomes NaN after the first step, as it does where a rate is far too high."""
    from rlhf_lab.trainers.trl import Watch

    ends = Watch.on_step_end

    def poisoned(self, args, state, control, model=None, **more):
        next(iter(model.parameters())).data.fill_(math.nan)
        return ends(self, args, state, control, **more)

    monkeypatch.setattr(Watch, "on_step_end", poisoned)
    online = stage in ("rloo", "grpo")
    more = {"reward_funcs": lambda completions, **_: [float(len(c)) for c in completions]}
    sizes = {"response_length": 4, "num_generations": 2, "steps_per_generation": 1}
    plan = lab.plan(stage, whole / "model", **SHORT, **(sizes if online else {}))
    with pytest.raises(ValueError, match=f"{STAGES[stage].title} diverged: ") as error:
        lab.train(
            plan, whole / "rows.json", out=tmp_path / "r", quiet=True, **more if online else {}
        )
    line = str(error.value)
    assert "\n" not in line and "learning_rate=" in line
    run = Run.load(tmp_path / "r")
    assert run.status == "failed" and "diverged" in run.summary["error"]
    assert not (tmp_path / "r" / "model").exists()
    assert all(m["loss"] != 0 for m in run.metrics if "loss" in m)


def test_models_19_bf16_on_a_cpu_is_what_was_asked_for(whole, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("of machines without a GPU")
    sizes = {"response_length": 4, "num_mini_batches": 1, "num_ppo_epochs": 1}
    plan = lab.plan("ppo", whole / "model", bf16=True, **SHORT, **sizes)
    assert plan.config().bf16 and plan.config().use_cpu
    by_length = {"reward_funcs": lambda completions, **_: [float(len(c)) for c in completions]}
    run = lab.train(plan, whole / "rows.json", out=tmp_path / "r", quiet=True, **by_length)
    assert run.status == "finished" and max(run.series("first_ratio_error")[1]) < 1e-5
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        lab.train(lab.plan("sft", fp16=True), whole / "rows.json", out=tmp_path / "s")
