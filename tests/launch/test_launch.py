"""Starting a training in several processes, and who writes the run."""

import json
import os
import subprocess
import sys

import pytest

from rlhf_lab import training
from rlhf_lab.cli.main import main
from rlhf_lab.data.load import load_data
from rlhf_lab.launch import launcher
from rlhf_lab.launch.launcher import ERROR_PREFIX, Follower, command, place
from rlhf_lab.runs.run import Run

OURS = ["-m", "rlhf_lab.cli", "train", "ppo"]


def test_who_am_i():
    assert place({}) == (0, 1)
    assert place({"RANK": "3", "WORLD_SIZE": "8"}) == (3, 8)


def test_on_a_cpu_torchrun_starts_what_accelerate_would_only_copy(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    line, env = command("ddp", ["train", "ppo"], processes=4)
    assert line[:4] == [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    assert line[4:] == ["--nproc-per-node=4", *OURS]
    threads = max(1, (os.cpu_count() or 1) // 4)
    assert env == {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(threads)}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS" not in command("ddp", [])[1]


def test_on_gpus_accelerate_does(tmp_path):
    from accelerate.commands.launch import launch_command_parser

    line, env = command("ddp", ["train", "ppo"], gpus=8)
    assert line[-4:] == OURS and env == {}
    parsed = launch_command_parser().parse_args(line[3:])
    assert (parsed.multi_gpu, parsed.num_processes, parsed.module) == (True, 8, True)
    assert command("ddp", [], processes=2, gpus=8)[0][5] == "2"
    with pytest.raises(ValueError, match="--processes 9: there are 8 GPUs"):
        command("ddp", [], processes=9, gpus=8)
    file = tmp_path / "mine.yaml"
    file.write_text("distributed_type: MULTI_GPU\n")
    line, _ = command(str(file), ["train", "ppo"], gpus=8)
    assert launch_command_parser().parse_args(line[3:]).config_file == str(file)
    with pytest.raises(ValueError, match="--accelerate zzz: neither ddp nor a file"):
        command("zzz", [])


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("", 0),
        ("raise SystemError", 1),
        (f"import sys; sys.exit('{ERROR_PREFIX}no such setting')", 2),
        (f"import sys; sys.stderr.write('{ERROR_PREFIX}slow\\n')", 0),
    ],
)
def test_the_exit_code_is_that_of_the_processes(program, code, monkeypatch):
    started = [sys.executable, "-c", program], {}
    monkeypatch.setattr(launcher, "command", lambda *arguments: started)
    assert launcher.launch("ddp", ["train", "ppo"]) == code


def test_a_follower_writes_nothing(tmp_path):
    run = Run.create(tmp_path / "run", stage="ppo", model="tiny", settings={})
    before = {p: p.read_bytes() for p in run.folder.iterdir()}
    follower = Follower(run.folder)
    follower.log(1, kl=2.0)
    follower.sample(1, [{"response": "x"}])
    follower.save_ledger(run.ledger)
    follower.rewind(0)
    follower.finish("failed", error="x")
    assert before == {p: p.read_bytes() for p in run.folder.iterdir()}
    assert follower.status == "running" and Run.writes and not follower.writes
    writing = {"log", "sample", "save_ledger", "rewind", "finish"}
    assert writing <= vars(Follower).keys()


def test_the_command_line_trains_in_two_processes(tmp_path):
    rows = [{"prompt": p["prompt"]} for p in load_data("stories").prompts.train[:64]]
    data = tmp_path / "prompts.json"
    data.write_text(json.dumps(rows))
    same = [
        "train",
        "ppo",
        "--steps",
        "2",
        "--data",
        str(data),
        "--quiet",
        "--set",
        "response_length=16",
        "--set",
        "num_mini_batches=2",
    ]

    def start(*more):
        return subprocess.run(
            [sys.executable, "-m", "rlhf_lab.cli", *same, *more],
            text=True,
            capture_output=True,
            timeout=300,
        )

    two = ["--set", "per_device_train_batch_size=4", "--accelerate", "ddp", "--processes", "2"]
    done = start("--out", str(tmp_path / "two"), *two)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("run: ") == 1
    one = ["--out", str(tmp_path / "one"), "--set", "per_device_train_batch_size=8"]
    assert main([*same, *one]) == 0
    runs = [Run.load(tmp_path / name) for name in ("one", "two")]
    for a, b in zip(*(r.metrics for r in runs), strict=True):
        # float32: what is added up in another order differs in the last digits
        assert b == pytest.approx(a, rel=5e-3, abs=5e-3, nan_ok=True)
    assert runs[1].status == "finished" and (runs[1].model_path / "config.json").is_file()
    assert len(runs[0].samples) == len(runs[1].samples)
    again = start("--out", str(tmp_path / "two"), *two)
    assert again.returncode == 2
    errors = [line for line in again.stderr.splitlines() if line.startswith("rlhf-lab: ")]
    assert len(errors) == 1 and "already holds a run" in errors[0]
    assert "elastic" not in again.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sft", "--accelerate", "ddp"], "--accelerate is for PPO, not sft"),
        (["ppo", "--processes", "2"], "--processes needs --accelerate"),
        (["ppo", "--accelerate", "ddp", "--set", "kl_ceof=1"], "kl_ceof"),
        (["ppo", "--accelerate", "nowhere.yaml"], "neither ddp nor a file"),
    ],
)
def test_what_cannot_be_started(arguments, says, capsys):
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1, error


def test_several_processes_need_a_folder(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="in a folder that all of them know"):
        training.train("ppo")
