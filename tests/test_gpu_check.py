"""benchmarks/gpu_check.py on a CPU: its hand-written steps are those that the plans describe."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

from rlhf_lab.cost.hardware import CATALOGUE, hardware

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_check.py"


@pytest.fixture(scope="module")
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = sys.modules["gpu_check"] = importlib.util.module_from_spec(spec)
    path = sys.path[:]
    spec.loader.exec_module(module)
    sys.path[:] = path
    yield module
    del sys.modules["gpu_check"]


def run(gpu_check, monkeypatch, out, *cases, seconds=600):
    monkeypatch.setattr(gpu_check, "HERE", gpu_check.torch.device("cpu"))
    end = time.perf_counter() + seconds
    return gpu_check.check(hardware("laptop"), list(cases), end, out)["rows"]


@pytest.mark.parametrize("lora_r", [0, 4])
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
def test_bytes_and_flops_are_as_planned(gpu_check, monkeypatch, tmp_path, stage, lora_r):
    case = gpu_check.Case(stage, lora_r=lora_r, batch=2, prompt=24, response=8)
    (row,) = run(gpu_check, monkeypatch, tmp_path / "out.json", case)
    assert row["result"] == ""
    assert abs(row["errors"]["step"]["bytes"]) < 0.05
    assert abs(row["errors"]["step"]["flops"]) < 0.005
    for phase, predicted in row["predicted"].items():
        found = row["measured"][phase]
        assert found["bytes"] > 0 and found["seconds"] > 0, phase
        assert predicted["flops"] == pytest.approx(found["flops"] or 0, rel=0.005), phase
    saved = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert saved["summary"]["steps"]["bytes"]["cases"] == 1 and saved["versions"]["torch"]


def test_what_does_not_fit_is_left_out_and_says_so(gpu_check, monkeypatch, tmp_path):
    large = gpu_check.Case("sft", "meta-llama/Llama-2-7b-hf")
    (row,) = run(gpu_check, monkeypatch, tmp_path / "out.json", large)
    assert row["result"].startswith("skipped: needs ") and "measured" not in row
    (row,) = run(gpu_check, monkeypatch, tmp_path / "out.json", gpu_check.Case("sft"), seconds=1)
    assert row["result"].startswith("skipped: no time left")


def test_a_case_that_fails_does_not_end_the_run(gpu_check, monkeypatch, tmp_path):
    def fail(*_):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(gpu_check, "plain", fail)
    case = gpu_check.Case("sft")
    rows = run(gpu_check, monkeypatch, tmp_path / "out.json", case, case)
    assert [r["result"] for r in rows] == ["FAILED: RuntimeError('CUDA out of memory')"] * 2


@pytest.mark.parametrize("name", CATALOGUE)
def test_cases_of_every_device_have_a_plan(gpu_check, name):
    hw = hardware(name)
    cases = gpu_check.cases(hw)
    assert [c.stage for c in cases[:4]] == list(gpu_check.STAGES)
    fits = {c.stage for c in cases if c.plan(hw).peak <= gpu_check.ROOM * hw.memory}
    assert fits >= {"sft", "reward", "dpo"}
    assert "ppo" in fits or hw.memory < 18e9  # four models in fp32: too much for it
