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


def test_the_first_ledger_that_knows_a_stage_from_a_source_counts():
    twice = lab.compare(with_ledger(3e9, "predicted"), with_ledger(7e9, "predicted"))
    assert [row["predicted"] for row in twice.rows] == ["3 GFLOP"]


def test_a_plan_beside_its_run_shows_the_runs_prediction(tmp_path):
    """The run knows how long its rows were; the plan, which does not, took the longest."""
    rows = [{"prompt": f"say {i}", "completion": "yes " * (i % 7 + 1)} for i in range(40)]
    plan = lab.plan("sft", "tiny", hardware="h100")
    run = Run.create(tmp_path, stage="sft", model="tiny", settings=dict(plan.settings))
    run.save_ledger(predict(plan, lab.load_data(rows)).ledger)
    assert lab.compare(plan, run).ledger == run.ledger != plan.ledger
    other = lab.plan("sft", "tiny", hardware="h100", learning_rate=1e-4)
    assert lab.compare(other, run).ledger == other.ledger  # not what this run was trained from
