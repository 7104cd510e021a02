"""TRL's stages on two processes: the same weights as on one, data made once, one run, one end.

pytest tests/trainers/test_processes.py
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trl_processes
from trl_processes import LOSSES

from rlhf_lab.runs.run import Run

MEANS_OF_MEANS = {"dpo with sft", "grpo, bnpo"}
"""Losses that are a mean of the means of micro-batches, whatever number of tokens these have: by
themselves, on one process as on several."""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """All that two processes did: the folder, and the output of each."""
    folder = tmp_path_factory.mktemp("two")
    script = Path(trl_processes.__file__)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*start, str(script), str(folder)], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture
def alone(tmp_path):
    """The same training in this process."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield lambda name, **how: trl_processes.train(name, 1, tmp_path, **how)
    torch.set_default_dtype(before)


def apart(one, other):
    """The largest difference of a parameter."""
    return max(
        abs(a - b) for n in one["weights"] for a, b in zip(one["weights"][n], other["weights"][n])
    )


@pytest.mark.parametrize("name", LOSSES)
def test_parameters_are_those_of_one_process(name, two, alone):
    """Two processes of 2 rows, twice, or one of 2 rows, four times: the same 8 rows a step, whose
    answers are of unlike lengths. KTO's KL is that of all rows that pass at once, so it wants twice
    the rows instead; `bnpo`'s micro-batches are drawn anew on each process."""
    ranks = [output["equal"][name] for output in two[1]]
    assert apart(*ranks) == 0 and ranks[1]["logged"] == ranks[0]["logged"]
    narrow, wide = alone(name), alone(name, rows=4)
    if name != "grpo, bnpo":
        assert apart(wide if name == "kto with its KL" else narrow, ranks[0]) < 1e-6
    if name != "kto with its KL":
        assert (apart(narrow, wide) > 1e-4) == (name in MEANS_OF_MEANS)


def test_half_of_the_rows_give_others(two, alone):
    assert apart(alone("sft", passes=2), two[1][0]["equal"]["sft"]) > 1e-4


def test_two_processes_make_one_run(two):
    folder, outputs = two
    for stage in ("reward", "grpo"):
        run = Run.load(folder / stage)
        assert run.status == "finished" and (run.model_path / "model.safetensors").is_file()
        assert not (run.folder / "trainer").exists()
        steps, losses = run.series("loss")
        assert steps == [1, 2, 3, 4] and losses[-1] != losses[0]
        memory = run.ledger.filter(source="measured", quantity="bytes")
        assert len({row.rank for row in memory}) == 1 and memory.peak() > 0
        assert run.summary["tensor_peak_bytes"] == memory.peak()
    assert Run.load(folder / "grpo").metrics[-1]["episodes"] == 2 * 8  # two batches of each


def test_a_checkpoint_of_two_goes_on_in_one(two, tmp_path):
    """With as many rows in a step: other ones are refused."""
    shutil.copytree(two[0] / "sft", tmp_path / "sft")
    says = "processes was 8 there and is 4 now"
    with pytest.raises(ValueError, match=says):
        trl_processes.run("sft", tmp_path, rows=4, resume=True)
    assert trl_processes.run("sft", tmp_path, rows=8, resume=True) == "finished"
    assert trl_processes.run("sft", tmp_path / "whole", rows=8) == "finished"
    runs = [Run.load(tmp_path / name) for name in ("sft", "whole/sft")]
    (steps, losses), (same_steps, expected) = (run.series("loss") for run in runs)
    assert steps == same_steps == [1, 2, 3, 4]
    assert losses == pytest.approx(expected, abs=1e-5)
    # What both had done by then is in the sum, and in no process twice.
    done, whole = (r.ledger.filter(source="measured", quantity="tokens") for r in runs)
    assert done.total(phase="forward") == whole.total(phase="forward") > 0


def test_what_one_process_wants_all_do(two):
    folder, outputs = two
    assert [output["asked"] for output in outputs] == [[True, False]] * 2
    run = Run.load(folder / "sft")
    assert run.status == "stopped" and run.last_step == 2 and "before/loss" not in run.summary
    assert (run.model_path / "model.safetensors").is_file()
    said = "no rows, ['an error of every process']"
    assert [output["error"] for output in outputs] == [said, said]
