"""Runs of earlier versions: read, drawn and compared under the names of today.

Run: pytest tests/runs/test_renamed.py
"""

import json

from sample_runs import make

import rlhf_lab as lab
from rlhf_lab.runs.ledger import Ledger
from rlhf_lab.runs.run import Run

OLD = {
    "step": 1,
    "reward": 0.5,
    "kl": 0.1,
    "policy_loss": -0.25,
    "value_loss": 0.75,
    "policy_clip_fraction": 0.02,
    "value_clip_fraction": 0.3,
    "approx_kl": 0.002,
    "first_approx_kl": 1e-9,
}
"""A line of PPO's metrics as version 0.1 wrote it; of RLOO's, the next."""
OLD_RLOO = {"step": 1, "loss": 0.5, "response_clip_fraction": 0.125}
TODAY = {
    "step": 1,
    "reward": 0.5,
    "kl": 0.1,
    "pg_loss": -0.25,
    "vf_loss": 0.75,
    "clipfrac": 0.02,
    "vf_clipfrac": 0.3,
    "approxkl": 0.002,
    "first_approxkl": 1e-9,
}


def old_run(folder, stage, line) -> Run:
    """With samples and costs, as an earlier version left it on the disk."""
    run = make(folder, stage)
    (run.folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    costs = Ledger()
    costs.add(stage=stage, role="policy", quantity="seconds", value=2, source="measured")
    run.save_ledger(costs)
    return Run.load(run.folder)


def test_an_old_run_is_read_under_todays_names(tmp_path):
    assert old_run(tmp_path / "ppo", "ppo", OLD).metrics == [TODAY]
    rloo = old_run(tmp_path / "rloo", "rloo", OLD_RLOO)
    assert rloo.metric_names == ["loss", "response_clipfrac"]


def test_an_old_run_opens_in_dashboard_compare_and_inspector(tmp_path):
    run = old_run(tmp_path, "ppo", OLD)
    clipping = lab.dashboard(run).charts["clipping"].picture.words
    assert "policy clipped: last 0.02" in clipping and "values clipped: last 0.3" in clipping
    assert "approxkl" in repr(run.show()) and "approx_kl" not in repr(run.show())
    assert [row["measured"] for row in lab.compare(run).rows] == ["2 s"]
    assert "first at 3" in repr(lab.inspect(run))
    panels = lab.curves(run, metrics=["clipfrac", "pg_loss"]).layout.annotations
    assert [panel.text for panel in panels] == ["policy clipped", "policy loss"]


def test_an_old_run_is_gone_on_with_in_todays_names(tmp_path):
    run = old_run(tmp_path, "ppo", OLD)
    run.log(2, clipfrac=0.04)
    assert run.series("clipfrac") == ([1, 2], [0.02, 0.04])
    run.rewind(1)  # writes the metrics anew
    assert Run.load(run.folder).metrics == [TODAY]
