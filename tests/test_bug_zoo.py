"""The arithmetic of `benchmarks/bug_zoo.py`, by hand: bands, what leaves them, limits.

pytest tests/test_bug_zoo.py
"""

import json
import sys
from pathlib import Path

import pytest

from rlhf_lab.exercises.specimens import SPECIMENS
from rlhf_lab.runs import health

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def zoo():
    sys.path.insert(0, str(FOLDER))
    import bug_zoo

    yield bug_zoo
    sys.path.remove(str(FOLDER))
    del sys.modules["bug_zoo"]


def test_a_band_is_four_deviations_wide_and_chance_alone_does_not_leave_it(zoo):
    healthy = [{"kl": [x, x, x]} for x in (1.0, 2.0, 3.0)]  # mean 2, deviation 1
    assert zoo.bands(healthy) == {"kl": [(-2.0, 6.0)] * 3}
    band = zoo.bands(healthy)["kl"]
    for values, left in {
        (2.0, 6.5, 7.0): 2,
        (2.0, 6.5, 2.0): None,  # once is chance
        (2.0, 2.0, -2.5): 3,  # nothing comes after it
        (6.5, 6.5, 2.0): 1,
        (None, 6.5, 6.5): 2,
    }.items():
        assert zoo.leaves({"kl": list(values)}, band, "kl") == left, values


def test_the_first_metric_is_the_one_that_four_of_five_seeds_leave_soonest(zoo):
    runs = {
        f"late_score/{seed}": {"metrics": {"kl_k3": [0, 0, 9, 9], "reward": [0, 9, 9, 9]}}
        for seed in range(5)
    }
    for seed in (0, 1):
        runs[f"late_score/{seed}"]["metrics"]["reward"] = [0, 0, 0, 0]
    band = {name: [(-1.0, 1.0)] * 4 for name in ("kl_k3", "reward")}
    assert zoo.first_metrics(runs, "late_score", band) == [(3, "kl_k3", 5)]
    runs["late_score/1"]["metrics"]["reward"] = [9, 9, 9, 9]
    assert zoo.first_metrics(runs, "late_score", band) == [(2, "reward", 4), (3, "kl_k3", 5)]


def test_a_limit_is_learned_from_the_worst_of_each_run_and_can_be_failed(zoo):
    def runs(*worst):
        return {"healthy runs": [[{"kl_per_token": x}, {"kl_per_token": 0.0}] for x in worst]}

    found = zoo.limit_of(health.CHECKS["kl_high"], runs(0.1, 0.2, 0.3))
    assert found["warn"] == pytest.approx(0.2 + 4 * 0.1)
    assert found["critical"] == pytest.approx(0.2 + 12 * 0.1)
    assert found["origin"] == "3 healthy runs: 0.1 to 0.3"
    assert zoo.limit_of(health.CHECKS["kl_high"], runs(0.1, 0.2)) is None  # too few to learn from
    never = {"healthy": [[{"reward": s * i} for i in range(9)] for s in (1, -1, 2)]}
    assert zoo.limit_of(health.CHECKS["reward_falls"], never) is None  # no run could fail it


def test_the_stored_results_are_of_these_specimens_and_settings(zoo):
    stored = json.loads(zoo.RESULTS.read_text("utf-8"))
    names = {key.split("/")[0] for key in stored["runs"]}
    assert names <= {*SPECIMENS, zoo.HEALTHY} and stored["size"] == zoo.SIZE
    for key, run in stored["runs"].items():
        lengths = {len(values) for values in run["metrics"].values()}
        assert lengths == {zoo.SIZE["max_steps"]} or run["error"], key
    rows = {row["specimen"]: row for row in stored["first"]}
    assert rows.keys() == SPECIMENS.keys()
