"""PPO on two processes is PPO on one: the same numbers, logged once, saved once."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from ppo_kit import PROMPTS

from rlhf_lab.ppo import distributed, rollout

HERE = Path(__file__).resolve().parent
STEPS = 5  # of two minibatches each: ten optimizer steps


def run(folder, ranks, layout="four", resume=None, broken=False, rows=8, **settings):
    """Train in `ranks` processes of `rows / ranks` rows each. → the output of each."""
    settings = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": rows // ranks // 2,
        "gradient_accumulation_steps": 2,
        "num_mini_batches": 2,
        "num_ppo_epochs": 1,
        "response_length": 8,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "temperature": 0.7,
        "report_to": "none",
        "save_steps": 2,
        "normalize_scores": True,
        "whiten_rewards": True,
        "kl_target": 0.1,
        "kl_horizon": 100,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "missing_eos_penalty": 1.0,
        "layout": layout,
        "use_cpu": True,
        **settings,
    }
    folder.mkdir(exist_ok=True)
    out, job = (
        folder / "output",
        {"settings": settings, "layout": layout, "resume": resume, "broken": broken},
    )
    worker = [str(HERE.parent / "kit" / "two_processes.py"), str(out), json.dumps(job)]
    start = (
        [sys.executable]
        if ranks == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
        ]
    )
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*start, *worker], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(out.with_suffix(f".{r}.json").read_text()) for r in range(ranks)]


@pytest.fixture(scope="module", params=["four", "shared", "adapters"])
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return run(folder / "one", 1, request.param), run(folder / "two", 2, request.param), folder


def test_parameters_after_ten_steps(both):
    (one,), two, _ = both
    for name, weights in one["trained"].items():
        for rank in two:
            assert rank["trained"][name] == pytest.approx(weights, abs=1e-6)


def test_a_broken_split_is_seen(tmp_path):
    (one,) = run(tmp_path / "one", 1)
    two = run(tmp_path / "broken", 2, broken=True)[0]
    apart = max(
        abs(a - b) for n in one["trained"] for a, b in zip(one["trained"][n], two["trained"][n])
    )
    assert apart > 1e-3


def test_metrics_are_global_and_logged_once(both):
    (one,), (main, other), _ = both
    assert (main["ranks"], other["rank"]) == (2, 1)
    assert other["logged"] == []
    assert [set(line) for line in main["logged"]] == [set(line) for line in one["logged"]]
    for line, same in zip(one["logged"], main["logged"], strict=True):
        assert same == pytest.approx(line, abs=1e-6, nan_ok=True)
    assert any("eval_reward" in line for line in one["logged"])
    assert main["calls"] != one["calls"] and main["seed"] == other["seed"]  # half of the work each


def test_a_checkpoint_of_two_goes_on_in_one(both, request):
    (one,), _, folder = both
    layout = (
        "four"
        if "value.score.weight" in one["trained"]
        else ("adapters" if any("lora" in n for n in one["trained"]) else "shared")
    )
    saved = folder / "two" / "out"
    assert {p.name for p in saved.iterdir()} == {"checkpoint-4", "checkpoint-5"}
    (again,) = run(folder / "again", 1, layout, resume=str(saved / "checkpoint-4"))
    rest = [line for line in one["logged"] if line["step"] > 4]
    assert len(rest) == 2  # a training step, held-out prompts
    for line, same in zip(rest, again["logged"], strict=True):
        assert same == pytest.approx(line, abs=1e-6, nan_ok=True)


def _trimmed(r):
    """As if these rows had been alone: without the columns that are padding in all of them."""
    p = r.ids.shape[1] - r.responses.shape[1]
    left = int(r.attention[:, :p].any(0).long().argmax())
    right = int(r.mask.any(0).sum())
    sizes = {"ids": slice(left, p + right), "attention": slice(left, p + right)}
    return rollout.Rollout(
        **{n: x[:, sizes.get(n, slice(right))] if x.dim() == 2 else x for n, x in vars(r).items()}
    )


def test_a_rollout_put_together(make, monkeypatch):
    """Two processes whose prompts and responses differ in length, by hand."""
    r, *_ = make().make_rollout(torch.arange(len(PROMPTS)), 0, 0.05)
    halves = [_trimmed(r.rows(torch.arange(4))), _trimmed(r.rows(torch.arange(4, 8)))]
    shapes = [(h.ids.shape[1] - h.responses.shape[1], h.responses.shape[1]) for h in halves]
    assert shapes[0] != shapes[1]

    class Other:
        """Answers as two processes do: with what the other one would have sent."""

        num_processes = 2

        def gather(self, x):
            return torch.tensor(shapes) if x.shape == (1, 2) else x

    parts = [distributed.gather_rollout(Other(), half, 15) for half in halves]
    for name in (f.name for f in fields(r)):
        whole = torch.cat([getattr(p, name) for p in parts])
        assert torch.equal(whole, getattr(r, name))


def test_every_row_has_one_process():
    rows = torch.arange(12)

    class Rank:
        num_processes = 3

    found = []
    for rank in range(3):
        Rank.process_index = rank
        found += distributed.shard_rows(Rank, rows).tolist()
    assert sorted(found) == rows.tolist()
