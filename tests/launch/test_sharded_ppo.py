"""PPO under FSDP2 and ZeRO: what a process holds is what was planned, and what its ledger says.

pytest tests/launch/test_sharded_ppo.py        # benchmarks/sharded_ppo.py measures
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml

from rlhf_lab import planning
from rlhf_lab.launch.launcher import Hosts, command
from rlhf_lab.launch.processes import sharding
from rlhf_lab.launching import launched
from rlhf_lab.ppo.config import PPOConfig
from rlhf_lab.ppo.make_sharding import make_sharding

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
    parts = bench.sharded.compared(bench.planned(case), row["measured"])
    for part, limit in bench.LIMITS.items():
        assert abs(parts[part]["error"]) <= limit, part
    found = row["measured"]
    # What a kernel allocates and frees inside itself the meter does not see.
    assert found["ledger"] == pytest.approx(found["peak"], rel=0.03)
    assert parts["gradients"]["measured"] > 0
    if case["layout"] == "four":  # policy, reference, reward and value model
        whole = bench.plan({**case, "ranks": 1, "sharding": "none"}).phases[-1].bytes
        most = sum(size for (_, part), size in whole.items() if part == "parameters")
        over = 1 if case["sharding"] in ("zero1", "zero2") else case["ranks"]
        assert found["parameters"] == pytest.approx(most / over, rel=0.01)


def test_how_processes_are_told():
    assert sharding({}) == "ddp"
    assert sharding({"ACCELERATE_USE_FSDP": "true"}) == "fsdp2"
    deepspeed = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    assert sharding(deepspeed) == "zero3"


@pytest.mark.parametrize("how", ["fsdp2", "zero1", "zero3"])
def test_on_cpus_the_processes_are_told_to_shard(how):
    made = launched(planning.plan("ppo", "mini"), how, 2, dry=True)
    assert made.sharding == made.plan.settings["sharding"] == how and not made.config
    _, env = command("", ["train", "ppo"], Hosts(2, sharding=made.sharding))
    assert env["ACCELERATE_USE_CPU"] == "true" and sharding(env) == how
    assert sharding(command("", [], Hosts(2))[1]) == "ddp"


@pytest.mark.parametrize(("stage", "empty"), [("ppo", False), ("sft", True)])
def test_every_process_loads_what_ppo_shards(stage, empty):
    """accelerate would have the others begin with weights of nothing, which it then sends."""
    made = launched(planning.plan(stage, "mini", hardware="h100"), "fsdp2", 2, dry=True)
    config = yaml.safe_load(made.config)["fsdp_config"]
    assert config["fsdp_cpu_ram_efficient_loading"] is empty


def test_what_cannot_be_is_refused_in_one_line(tmp_path, monkeypatch):
    args = PPOConfig(str(tmp_path), report_to="none")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(ValueError, match="no fsdp_offload_params"):
        make_sharding(args)
