"""PPO under FSDP2: what a process holds is what was planned for it, and what its ledger says.

pytest tests/launch/test_sharded_ppo.py        # benchmarks/sharded_ppo.py measures
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from rlhf_lab.launch.processes import sharding

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ROWS = json.loads((BENCHMARKS / "results" / "sharded_ppo.json").read_text())["rows"]


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("sharded_ppo", BENCHMARKS / "sharded_ppo.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    sys.path.remove(str(BENCHMARKS))
    return module


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["case"])
def test_what_was_measured_is_what_is_planned_today(bench, row):
    case = next(case for case in bench.cases() if bench.name(case) == row["case"])
    parts = bench.compared(case, row["measured"])
    for part, limit in bench.LIMITS.items():
        assert abs(parts[part]["error"]) <= limit, part
    found = row["measured"]
    assert found["ledger"] == pytest.approx(found["peak"], rel=0.01)
    assert parts["gradients"]["measured"] > 0
    if case["layout"] == "four":  # policy, reference, reward and value model
        whole = bench.plan({**case, "ranks": 1}).phases[-1].bytes
        most = sum(size for (_, part), size in whole.items() if part == "parameters")
        assert found["parameters"] == pytest.approx(most / case["ranks"], rel=0.01)


def test_weights_are_whole_while_responses_are_sampled():
    """Once a rollout: all of the policy; for every token: a layer at a time."""
    by_case = {row["case"]: row["measured"] for row in ROWS}
    once, each = (by_case[f"fsdp2, 2 ranks, four, 2×2 rows of 16+16{end}"] for end in ENDS)
    layers = 7 * 442_752 * 4  # all of them but the one that runs
    assert once["rollout"] - each["rollout"] == pytest.approx(layers, rel=0.15)
    assert each["sent"] > 2 * once["sent"]


ENDS = ("", ", gathered for every token")


def test_how_processes_are_told():
    assert sharding({}) == "ddp"
    assert sharding({"ACCELERATE_USE_FSDP": "true"}) == "fsdp2"
    deepspeed = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    assert sharding(deepspeed) == "zero3"
