"""PPO on two processes is PPO on one: the same numbers, logged once, saved once."""

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from ppo_kit import PROMPTS

from rlhf_lab.ppo import rollout

HERE = Path(__file__).resolve().parent
STEPS = 5  # of two minibatches each: ten optimizer steps
LAYOUTS = ("four", "shared", "adapters")
SHARDED = {
    "fsdp2": ("four", {}),
    "fsdp2, shared": ("shared", {}),
    "fsdp2, adapters": ("adapters", {}),
    "fsdp2, for every token": ("four", {"ds3_gather_for_generation": False}),
    "fsdp2, recomputed adapters": ("adapters", {"activation_checkpointing": True}),
}
"""By name the layout and settings of a training whose models are shared out over two processes."""
ZERO = {
    "zero1": ("four", {}),
    "zero2": ("four", {}),
    "zero3": ("four", {}),
    "zero2, shared": ("shared", {}),
    "zero3, adapters": ("adapters", {"activation_checkpointing": True}),
    "zero3, for every token": ("four", {"ds3_gather_for_generation": False}),
    "fsdp2": ("four", {}),
}
RESUMED = ("zero2", "zero3", "zero3, adapters", "fsdp2")
FP32 = {"dtype": "float32", "learning_rate": 1e-3}
"""DeepSpeed knows no fp64; at a higher rate AdamW makes much of what fp32 rounds."""


def job(
    folder,
    ranks,
    layout="four",
    resume=None,
    broken=False,
    sharding="ddp",
    dtype="float64",
    **more,
):
    """What one training in `ranks` processes needs to know; each takes `8 / ranks` rows a batch."""
    settings = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 8 // ranks // 2,
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
        **more,
    }
    folder.mkdir(parents=True)
    fields = {"settings": settings, "layout": layout, "resume": resume, "broken": broken}
    return {"out": str(folder / "output"), "sharding": sharding, "dtype": dtype, **fields}


def run(ranks, jobs):
    """Train each of the jobs in turn, all in the same processes. → by job, the output of each."""
    worker = [str(HERE.parent / "kit" / "two_processes.py"), json.dumps(list(jobs.values()))]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    start = [sys.executable, *(torchrun if ranks > 1 else [])]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    env["DS_ACCELERATOR"] = "cpu"
    done = subprocess.run([*start, *worker], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        name: [
            json.loads(Path(what["out"]).with_suffix(f".{rank}.json").read_text())
            for rank in range(ranks)
        ]
        for name, what in jobs.items()
    }


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Every training of this file: two processes first, then the same, and what goes on from their
    checkpoints, in one. → the folder, the outputs of two, the outputs of one."""
    root = tmp_path_factory.mktemp("distributed")
    jobs = {layout: job(root / "two" / layout, 2, layout) for layout in LAYOUTS}
    for name, (layout, more) in SHARDED.items():
        jobs[name] = job(root / "two" / name, 2, layout, sharding="fsdp2", **more)
    two = run(2, jobs | {"broken": job(root / "two" / "broken", 2, broken=True)})
    jobs = {layout: job(root / "one" / layout, 1, layout) for layout in LAYOUTS}
    for layout in LAYOUTS:
        saved = root / "two" / layout / "out" / "checkpoint-4"
        jobs[f"{layout}, resumed"] = job(root / "again" / layout, 1, layout, resume=str(saved))
    saved = root / "two" / "fsdp2" / "out" / "checkpoint-4"
    jobs["fsdp2, resumed"] = job(root / "again" / "fsdp2", 1, resume=str(saved))
    return root, two, run(1, jobs)


@pytest.fixture(params=[*LAYOUTS, *SHARDED])
def both(request, outputs):
    _, two, one = outputs
    layout = SHARDED.get(request.param, (request.param,))[0]
    return one[layout], two[request.param]


def test_parameters_after_ten_steps(both):
    (one,), two = both
    for name, weights in one["trained"].items():
        for rank in two:
            assert rank["trained"][name] == pytest.approx(weights, abs=1e-6)


def test_a_broken_split_is_seen(outputs):
    _, two, one = outputs
    (one,), (two, _) = one["four"], two["broken"]
    apart = max(
        abs(a - b) for n in one["trained"] for a, b in zip(one["trained"][n], two["trained"][n])
    )
    assert apart > 1e-3


def test_each_process_has_half_of_every_model(outputs):
    """Policy, reference, reward and value model; with adapters one base for all of them."""
    _, two, _ = outputs
    for name in SHARDED:
        ranks = two[name]
        assert sum(rank["here"] for rank in ranks) == ranks[0]["numbers"]
        assert ranks[0]["here"] == pytest.approx(ranks[0]["numbers"] / 2, rel=0.01)
    assert two["four"][0]["here"] == two["four"][0]["numbers"]
    assert two["fsdp2, adapters"][0]["numbers"] < 0.7 * two["fsdp2"][0]["numbers"]


def test_metrics_are_global_and_logged_once(both):
    (one,), (main, other) = both
    assert (main["ranks"], other["rank"]) == (2, 1)
    assert other["logged"] == []
    assert [set(line) for line in main["logged"]] == [set(line) for line in one["logged"]]
    for line, same in zip(one["logged"], main["logged"], strict=True):
        assert same == pytest.approx(line, abs=1e-6, nan_ok=True)
    assert any("eval_reward" in line for line in one["logged"])
    assert main["calls"] != one["calls"] and main["seed"] == other["seed"]  # half of the work each


@pytest.mark.parametrize("name", [*LAYOUTS, "fsdp2"])
def test_a_checkpoint_of_two_goes_on_in_one(name, outputs):
    root, _, ones = outputs
    (one,), (again,) = ones[SHARDED.get(name, (name,))[0]], ones[f"{name}, resumed"]
    saved = root / "two" / name / "out"
    assert {p.name for p in saved.iterdir()} == {"checkpoint-4", "checkpoint-5"}
    for line, same in zip(rest(one), again["logged"], strict=True):
        assert same == pytest.approx(line, abs=1e-6, nan_ok=True)


def rest(training):
    """What was logged after the fourth step: a training step, held-out prompts."""
    lines = [line for line in training["logged"] if line["step"] > 4]
    assert len(lines) == 2
    return lines


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    """The same under DeepSpeed: two processes, what goes on from their checkpoints in one, which
    has no DeepSpeed, and in four."""
    if find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed: pip install deepspeed")
    root = tmp_path_factory.mktemp("zero")
    jobs = {
        name: job(root / "two" / name, 2, layout, sharding=name.split(",")[0], **FP32, **more)
        for name, (layout, more) in ZERO.items()
    }
    two, one, four = run(2, jobs), {}, {}
    for layout in LAYOUTS:
        one[layout] = job(root / "one" / layout, 1, layout, **FP32)
    for name in RESUMED:
        layout, how = ZERO[name][0], name.split(",")[0]
        saved = {"resume": str(root / "two" / name / "out" / "checkpoint-4"), **FP32}
        one[name] = job(root / "again" / name, 1, layout, **saved)
        four[name] = job(root / "four" / name, 4, layout, sharding=how, **saved)
    return two, run(1, one), run(4, four)


@pytest.mark.parametrize("name", ZERO)
def test_zero_is_one_process(name, zero):
    two, one, _ = zero
    layout = ZERO[name][0]
    (one,), ranks = one[layout], two[name]
    for part, weights in one["trained"].items():
        assert ranks[0]["trained"][part] == pytest.approx(weights, abs=1e-4), part
    for line, same in zip(one["logged"], ranks[0]["logged"], strict=True):
        assert same == pytest.approx(line, abs=1e-4, nan_ok=True)
    share = 0.5 if name.startswith(("zero3", "fsdp2")) else 1  # reference and reward model too
    for rank in ranks:
        assert rank["here"] == pytest.approx(share * rank["numbers"], rel=0.01)


@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_of_zero_goes_on_in_one_and_in_four(name, zero):
    _, one, four = zero
    for goes_on in (one[name][0], four[name][0]):
        for line, same in zip(rest(one[ZERO[name][0]][0]), rest(goes_on), strict=True):
            assert same == pytest.approx(line, abs=1e-5, nan_ok=True)


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
    r = replace(r, engine_logprobs=r.logprobs - 0.1 * r.mask)
    halves = [_trimmed(r.rows(torch.arange(4))), _trimmed(r.rows(torch.arange(4, 8)))]
    shapes = [(h.ids.shape[1] - h.responses.shape[1], h.responses.shape[1]) for h in halves]
    assert shapes[0] != shapes[1]

    class Other:
        """Answers as two processes do: with what the other one would have sent."""

        num_processes = 2

        def gather(self, x):
            return torch.tensor(shapes) if x.shape == (1, 2) else x

    parts = [rollout.gather_rollout(Other(), half, 15) for half in halves]
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
        found += rollout.shard_rows(Rank, rows).tolist()
    assert sorted(found) == rows.tolist()
