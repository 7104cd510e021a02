"""The table of a plan, an x-ray and a run, by hand.

pytest tests/charts/test_comparison.py
"""

from types import SimpleNamespace

import rlhf_lab as lab
from rlhf_lab.planning import predict
from rlhf_lab.runs.ledger import Ledger, Row
from rlhf_lab.runs.run import Run


def with_ledger(value, source):
    """A plan, x-ray or run whose ledger has one row."""
    row = Row(
        stage="sft", role="policy", phase="forward", quantity="flops", value=value, source=source
    )
    return SimpleNamespace(ledger=Ledger([row]))


def test_compare_by_hand():
    (row,) = lab.compare(with_ledger(3e9, "predicted"), with_ledger(2e9, "measured")).rows
    assert row == {
        "phase": "forward",
        "quantity": "flops",
        "predicted": "3 GFLOP",
        "simulated": "–",
        "measured": "2 GFLOP",
        "predicted / real": "1.50",
    }


def test_two_plans_have_a_column_each():
    twice = lab.compare(with_ledger(3e9, "predicted"), with_ledger(7e9, "predicted"))
    assert [list(row.values()) for row in twice.rows] == [
        ["forward", "flops", "3 GFLOP", "7 GFLOP", "2.33"]
    ]
    named = lab.compare({"full": with_ledger(3e9, "predicted"), "lora": with_ledger(0, "measured")})
    assert list(named.rows[0]) == ["phase", "quantity", "full", "lora", "second / first"]


def test_a_plan_beside_its_run_shows_the_runs_prediction(tmp_path):
    """The run knows how long its rows were; the plan, which does not, took the longest."""
    rows = [{"prompt": f"say {i}", "completion": "yes " * (i % 7 + 1)} for i in range(40)]
    plan = lab.plan("sft", "tiny", hardware="h100")
    run = Run.create(tmp_path, stage="sft", model="tiny", settings=dict(plan.settings))
    run.save_ledger(predict(plan, lab.load_data(rows)).ledger)
    assert lab.compare(plan, run).ledger == run.ledger != plan.ledger
    other = lab.plan("sft", "tiny", hardware="h100", learning_rate=1e-4)
    assert lab.compare(other, run).ledger == other.ledger + run.ledger  # not trained from it


def test_bytes_of_a_run_are_those_of_its_tensors_whatever_the_process_took(tmp_path):
    runs = {}
    for name, tensors, process in (("plain", 500, 800), ("recomputed", 200, 860)):
        run = Run.create(tmp_path / name, stage="sft", model="tiny", settings={})
        common = {"stage": "sft", "role": "policy", "phase": "backward", "source": "measured"}
        run.save_ledger(Ledger([Row(**common, quantity="bytes", value=tensors * 2**20)]))
        run.finish(process_peak_bytes=process * 2**20, tensor_peak_bytes=tensors * 2**20)
        runs[name] = run
    compared = lab.compare(runs)
    (row,) = compared.rows
    assert (row["plain"], row["recomputed"], row["second / first"]) == (
        "500 MiB",
        "200 MiB",
        "0.40",
    )
    assert row["plain"] == f"{runs['plain'].peak / 2**20:g} MiB"
    assert "bytes: of tensors" in str(compared) and "of the whole run" in str(compared)


def test_flops_are_of_a_step_where_the_number_of_steps_is_not_known():
    unknown = lab.plan("sft", "Qwen/Qwen2.5-0.5B", hardware="h100")
    assert unknown.estimate.steps is None
    assert "tokens: of one step" in str(lab.compare(unknown, lab.plan("sft", "tiny")))
