"""Starting a training in several processes, and who writes the run."""

import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from rlhf_lab import launching, planning, training
from rlhf_lab.charts.comparison import compare
from rlhf_lab.cli.main import _who, main
from rlhf_lab.data.load import Split, load_data
from rlhf_lab.launch import launcher, processes
from rlhf_lab.launch.launcher import ERROR_PREFIX, Hosts, command
from rlhf_lab.launch.processes import EVERYWHERE, STOP_FILE, Follower, place
from rlhf_lab.models.load import load
from rlhf_lab.runs.ledger import Ledger
from rlhf_lab.runs.run import Run
from rlhf_lab.widgets.dashboard import cost_line

OURS = ["-m", "rlhf_lab.cli", "train", "ppo"]


def test_who_am_i():
    assert place({}) == (0, 1)
    assert place({"RANK": "3", "WORLD_SIZE": "8"}) == (3, 8)


def test_on_a_cpu_torchrun_starts_what_accelerate_would_only_copy(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    line, env = command("", ["train", "ppo"], Hosts(4))
    assert line[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert line[3:] == ["--nproc-per-node=4", "--standalone", *OURS]
    threads = max(1, (os.cpu_count() or 1) // 4)
    expected = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    assert env == {**expected, "OMP_NUM_THREADS": str(threads)}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS" not in command("", [], Hosts(2))[1]
    line, _ = command("", [], Hosts(4, 2, "1", "host:99"))
    hosts = ["--nnodes=2", "--node-rank=1", "--master-addr=host", "--master-port=99"]
    assert line[3:8] == ["--nproc-per-node=2", *hosts]


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
    assert launcher.launch("", ["train", "ppo"], Hosts(2)) == code


LOOKS_FOR_UNUSED = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
model = DDP(torch.nn.Linear(2, 2), find_unused_parameters=True)
model(torch.ones(1, 2)).sum().backward()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("quiet", [False, True])
def test_quiet_processes_do_not_pass_on_torchs_warnings(quiet, monkeypatch, tmp_path, capsys):
    """DDP warns, once in each process, that it looks for unused parameters and there is none:
    transformers has it do so."""
    started = [sys.executable, "-c", LOOKS_FOR_UNUSED, str(tmp_path / "meet")], {}
    monkeypatch.setattr(launcher, "command", lambda *arguments: started)
    assert launcher.launch("", [], Hosts(1), quiet) == 0
    assert ("did not find any unused parameters" in capsys.readouterr().err) is not quiet


def test_an_interrupt_asks_the_processes_to_stop(monkeypatch, tmp_path, capfd):
    """They are not interrupted themselves; the second one ends them."""
    script = tmp_path / "waits.py"
    script.write_text(
        "import os, pathlib, sys, time\n"
        f"stop = pathlib.Path(os.environ['{STOP_FILE}'])\n"
        "print('started', file=sys.stderr, flush=True)\n"
        "while not stop.exists(): time.sleep(0.02)\n"
        "print('rlhf-lab: interrupted: x', file=sys.stderr, flush=True)\n"
        "time.sleep(60 if 'hangs' in sys.argv else 0)\n"
    )
    start = "from rlhf_lab.launch import launcher as l; import sys\n"
    start += "l.command = lambda *_: ([sys.executable, *sys.argv[1:]], {})\n"
    start += "sys.exit(l.launch('', [], l.Hosts(2)))"
    for more in ([], ["hangs"]):
        line = [sys.executable, "-c", start, str(script), *more]
        process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
        assert process.stderr.readline() == "started\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "rlhf-lab: interrupted: x\n"
        if more:
            process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


def test_an_error_says_whose_it_is(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "sft", "--set", "zzz=1"]) == 2
    assert capsys.readouterr().err.startswith("rlhf-lab: process 1 of 2: SFTConfig has no")
    error = ValueError("x")
    error.add_note(EVERYWHERE)
    assert _who(error) == ""


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


def test_of_several_ledgers_the_sum_of_work_and_who_holds_and_sends_most(monkeypatch):
    common = {"stage": "ppo", "source": "measured"}

    def costs(seconds: float, held: float, sent: float, flops: float) -> Ledger:
        ledger, at = Ledger(), {"phase": "backward", **common}
        for quantity, value in (("seconds", seconds), ("bytes", held), ("sent", sent), ("sent", 1)):
            ledger.add(quantity=quantity, value=value, **at)
        for role in ("policy", "value"):
            ledger.add(quantity="flops", value=flops, role=role, **at)
        ledger.add(quantity="flops", value=3 * flops, role="policy", phase="forward", **common)
        return ledger

    ranks = [costs(1, 30, 5, 100), costs(2, 10, 7, 200), costs(3, 20, 6, 400)]
    # Which one process alone has done: the teacher's rows of a part of the data, say.
    ranks[2].add(quantity="tokens", value=9, phase="score", role="reward", **common)
    monkeypatch.setattr(processes, "from_all", lambda mine: ranks)
    merged = processes.merged(ranks[0])
    found = [(r.quantity, r.value, r.rank) for r in merged if r.quantity not in ("flops", "tokens")]
    assert found == [("seconds", 1, 0), ("bytes", 30, 0), ("sent", 7, 1), ("sent", 1, 1)]
    assert merged.pivot("phase", "role", quantity="flops") == {
        "forward": {"policy": 3 * 700},
        "backward": {"policy": 700, "value": 700},
    }
    assert len(merged.filter(quantity="flops")) == 3
    (tokens,) = merged.filter(quantity="tokens")
    assert (tokens.value, tokens.phase, tokens.role, tokens.rank) == (9, "score", "reward", 0)


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
    # The same rows in all: two processes count what one does, and what their plan says of both.
    for quantity in ("flops", "tokens"):
        rows = [r.ledger.training(source="measured", quantity=quantity) for r in runs]
        of_one, of_two = (one.pivot("phase", "role") for one in rows)
        assert of_two.keys() == of_one.keys()
        for phase, roles in of_one.items():
            assert of_two[phase] == pytest.approx(roles, rel=0.1), (quantity, phase)
        planned = runs[1].ledger.training(source="predicted", quantity=quantity)
        assert planned.total() == pytest.approx(rows[1].total(), rel=0.1), quantity
    # In a ring of two each process sends as much as all its gradients, in every optimizer step.
    assert not runs[0].ledger.filter(quantity="sent")
    sent = {s: runs[1].ledger.filter(quantity="sent", source=s) for s in ("predicted", "measured")}
    numbers = sum(p.numel() for p in load(runs[1].model_path).base.parameters())
    value_model = numbers + load(runs[1].model_path).config.hidden_size  # of tied embeddings
    steps = sum(row["optimizer_steps"] for row in runs[1].metrics if "optimizer_steps" in row)
    by_hand = 4 * (numbers + value_model) * steps
    assert sent["measured"].total(phase="backward") == pytest.approx(by_hand, rel=1e-3)
    assert sent["predicted"].total() == pytest.approx(by_hand, rel=1e-3)
    table = str(compare(runs[1]))
    assert "by the process that sends most" in table and " sent" in cost_line(runs[1].ledger)
    assert "sent:" not in str(compare(runs[0])) and " sent" not in cost_line(runs[0].ledger)


def test_what_a_notebook_starts(tmp_path, few_stories, capfd):
    """A process' part, and what is said where all fail: a line, once."""
    plan = planning.plan("sft", "mini", max_steps=3, per_device_train_batch_size=4)
    job, how = tmp_path / "job", {"out": tmp_path / "run", "quiet": True}
    job.write_bytes(pickle.dumps((plan, few_stories, how)))
    training.run_job(str(job))
    assert Run.load(tmp_path / "run").status == "finished"
    broken = replace(few_stories, sft=Split([{"prompt": "x" * 9999, "completion": "y"}]))
    capfd.readouterr()
    with pytest.raises(RuntimeError, match="2 processes failed: its line is above"):
        training.train(plan, broken, out=tmp_path / "not", accelerate="ddp", processes=2)
    error = capfd.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith(ERROR_PREFIX)]
    assert len(lines) == 1 and "no row is left" in lines[0] and "elastic" not in error, error


def a_function(**_): ...


a_function.__module__ = "__main__"


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"background": True}, "trains in the foreground"),
        ({"should_stop": lambda: False}, "trains in the foreground"),
        ({"reward_funcs": a_function}, "a_function is of this notebook: put it into a module"),
    ],
)
def test_what_other_processes_cannot_have(how, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        training.train("grpo", accelerate="ddp", out=tmp_path / "run", **how)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["all", "--accelerate", "ddp"], "--accelerate is for one stage, not all"),
        (["ppo", "--processes", "2"], "--processes needs --accelerate"),
        (["ppo", "--accelerate", "ddp", "--set", "kl_ceof=1"], "kl_ceof"),
        (["ppo", "--accelerate", "nowhere.yaml"], "neither cpu, ddp, zero1"),
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


def test_a_config_for_deepspeed_needs_deepspeed(tmp_path, capsys, monkeypatch):
    """plan.md 12: a plan's own config ended in a traceback where DeepSpeed is not installed."""
    config = tmp_path / "acc.yaml"
    line = ["plan", "ppo", "--hardware", "h100", "--gpus", "8", "--sharding", "zero3"]
    assert main([*line, "--accelerate-config", str(config)]) == 0
    monkeypatch.setattr(launching, "find_spec", lambda name: None)
    assert main(["train", "sft", "--accelerate", str(config), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error == f"rlhf-lab: --accelerate {config} needs deepspeed: pip install deepspeed\n"
    config.write_text("distributed_type: [")
    with pytest.raises(ValueError, match="--accelerate .*acc.yaml, line 1 is not YAML"):
        launching.launched(planning.plan("sft"), str(config))
