"""ZeRO-2 and ZeRO-3 on a CPU: what is saved is what one process has.

pytest tests/launch/test_zero.py        # runs where DeepSpeed is installed; benchmarks/zero.py
"""

import json
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CASES = [f"{how}, {stage}" for how in ("zero2", "zero3") for stage in ("sft", "dpo", "ppo")]


@pytest.mark.parametrize("case", CASES)
def test_what_was_measured(case):
    measured = json.loads((BENCHMARKS / "results" / "zero.json").read_text())
    found = measured[case]
    assert found["weights"] <= measured["tolerance"] < 0.1 * found["moved"]
    assert found["loss"] <= measured["tolerance"] and "gold_reward" in found["evaluated"]


def test_here(tmp_path, monkeypatch):
    if find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed: pip install deepspeed")
    spec = spec_from_file_location("zero", BENCHMARKS / "zero.py")
    spec.loader.exec_module(bench := module_from_spec(spec))
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "zero.json")
    monkeypatch.setattr("sys.argv", ["zero.py"])
    assert bench.main() == 0
