"""`resume`: a run whose process was killed goes on to the figures that it would have had."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from rlhf_lab import planning, training
from rlhf_lab.cli import main
from rlhf_lab.runs.run import Run

SMALL = {
    "per_device_train_batch_size": 8,
    "response_length": 16,
    "max_steps": 6,
    "save_steps": 2,
    "num_mini_batches": 2,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "seed": 0,
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A few of the bundled prompts, so that evaluation takes no time."""
    from rlhf_lab.data.load import load_data

    rows = [{"prompt": p["prompt"]} for p in load_data("stories").prompts.train[:64]]
    file = tmp_path_factory.mktemp("data") / "prompts.json"
    file.write_text(json.dumps(rows))
    return file


def arguments(data, out, *more):
    settings = [
        x for k, v in SMALL.items() if k not in ("max_steps", "seed") for x in ("--set", f"{k}={v}")
    ]
    return [
        "train",
        "ppo",
        "--steps",
        "6",
        "--data",
        str(data),
        "--out",
        str(out),
        "--quiet",
        *settings,
        *more,
    ]


@pytest.fixture(scope="module")
def whole(prompts, tmp_path_factory):
    """A run that nobody disturbed."""
    return training.train(
        planning.plan("ppo", "tiny", **SMALL),
        prompts,
        quiet=True,
        out=tmp_path_factory.mktemp("runs") / "whole",
    )


def lines(folder):
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def same(run, other):
    """Metrics, samples and final figures to the last digit; costs are measured anew."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (run.folder / name).read_bytes() == (other.folder / name).read_bytes()
    costs = ("seconds", "tokens_per_second", "tensor_peak_bytes", "process_peak_bytes")
    one, two = ({k: v for k, v in r.summary.items() if k not in costs} for r in (run, other))
    assert one == two and "kl" in one


def flops(run):
    rows = (r for r in run.ledger if (r.quantity, r.source) == ("flops", "measured"))
    return {(r.phase, r.role): r.value for r in rows}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal here")
def test_killed_and_resumed(prompts, whole, tmp_path, capsys):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "rlhf_lab.cli", *arguments(prompts, out)]
    # Sums are rounded alike with the same number of threads only.
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=env)
    until = time.time() + 120
    while lines(out) < 5:
        assert time.time() < until and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert Run.load(out).status == "interrupted"
    assert main.main(arguments(prompts, out, "--resume")) == 0
    run = Run.load(out)
    assert run.status == "finished" and not (out / "trainer").exists()
    same(run, whole)
    assert flops(run) == flops(whole)  # of the whole training, not of its last part


def test_stopped_and_resumed(prompts, whole, tmp_path):
    out, plan = tmp_path / "run", planning.plan("ppo", "tiny", **SMALL)
    stopped = training.train(
        plan, prompts, quiet=True, out=out, should_stop=lambda: lines(out) >= 3
    )
    assert stopped.status == "stopped" and (out / "model").is_dir()
    same(training.train(plan, prompts, quiet=True, out=out, resume=True), whole)


def test_what_is_there_decides(prompts, whole, tmp_path, capsys):
    plan = planning.plan("ppo", "tiny", **SMALL)
    before = (whole.folder / "run.json").read_bytes()
    again = training.train(plan, prompts, quiet=True, out=whole.folder, resume=True)
    assert again.folder == whole.folder  # finished: as it is
    assert (whole.folder / "run.json").read_bytes() == before
    fresh = training.train(plan, prompts, quiet=True, out=tmp_path / "new", resume=True)
    same(fresh, whole)  # nothing there: training begins


@pytest.mark.parametrize("quiet", [False, True])
def test_a_folder_that_is_not_there_is_said_to_be_new(quiet, prompts, tmp_path, capsys):
    out, plan = tmp_path / "typo", planning.plan("ppo", "tiny", **SMALL)
    training.prepared(plan, prompts, None, {}, None, out, False, True, quiet)
    line = f"ppo: nothing to resume in {out}: starting anew\n"
    assert capsys.readouterr().out == ("" if quiet else line)


@pytest.mark.parametrize(
    ("stage", "changes", "how", "says"),
    [
        ("ppo", {"learning_rate": 0.5}, {}, "learning_rate was 0.0005 there and is 0.5 now"),
        ("ppo", {"kl_target": 3.0}, {}, "kl_target was None there and is 3.0 now"),
        ("ppo", {}, {"out": None}, "resume needs the run's folder"),
        ("ppo", {}, {"overwrite": True}, "say one of them"),
    ],
)
def test_what_cannot_be_resumed(prompts, whole, stage, changes, how, says):
    settings = SMALL if stage == "ppo" else {}
    before = {p: p.read_bytes() for p in whole.folder.iterdir() if p.is_file()}
    with pytest.raises(ValueError, match=says):
        training.train(
            planning.plan(stage, "tiny", **{**settings, **changes}),
            prompts,
            quiet=True,
            **{"out": whole.folder, "resume": True, **how},
        )
    assert before == {p: p.read_bytes() for p in whole.folder.iterdir() if p.is_file()}


def test_other_rows_of_the_same_name_are_refused(prompts, whole, tmp_path):
    (other := tmp_path / prompts.name).write_text(prompts.read_text().replace("a", "e"))
    with pytest.raises(ValueError, match="rows was '.* sha256 .*' there and is '.*' now"):
        plan = planning.plan("ppo", "tiny", **SMALL)
        training.train(plan, other, quiet=True, out=whole.folder, resume=True)


def test_the_command_line_refuses_in_one_line(prompts, capsys):
    assert main.main(["train", "all", "--data", str(prompts), "--out", "x", "--resume"]) == 2
    assert "--resume is for one stage" in capsys.readouterr().err
