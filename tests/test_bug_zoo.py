"""The arithmetic of `benchmarks/bug_zoo.py`, by hand: bands, what leaves them, limits.

pytest tests/test_bug_zoo.py
"""

import json
import math
import sys
from pathlib import Path

import pytest

from rlhf_lab.exercises.specimens import SPECIMENS
from rlhf_lab.runs import health

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def zoo():
    sys.path.insert(0, str(FOLDER))
    import bug_zoo_reading

    yield bug_zoo_reading
    sys.path.remove(str(FOLDER))
    del sys.modules["bug_zoo_reading"]


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
    everything = zoo.first_metrics(runs, "late_score", band, 1e-9)
    assert everything == [(2, "reward", 3), (3, "kl_k3", 5)]
    runs["late_score/1"]["metrics"]["reward"] = [9, 9, 9, 9]
    assert zoo.first_metrics(runs, "late_score", band) == [(2, "reward", 4), (3, "kl_k3", 5)]


def test_a_limit_is_learned_from_the_worst_of_each_run_and_can_be_failed(zoo):
    def runs(*worst):
        return {
            "healthy runs": [[{"first_ratio_error": x}, {"first_ratio_error": 0.0}] for x in worst]
        }

    found = zoo.limit_of(health.CHECKS["ratio_at_step_0"], runs(0.1, 0.2, 0.3))
    assert found["warn"] == pytest.approx(0.2 + 3.5 * 0.1)
    assert found["critical"] == pytest.approx(0.2 + 10.5 * 0.1)
    assert found["origin"] == "3 healthy runs: 0.1 to 0.3"
    too_few = zoo.limit_of(health.CHECKS["ratio_at_step_0"], runs(0.1, 0.2))
    assert too_few is None
    # Of two sources the one that is farther out gives the mean, both the deviation within them.
    both = {"near": runs(0.1, 0.2, 0.3)["healthy runs"], "far": runs(1.0, 1.0)["healthy runs"]}
    found = zoo.limit_of(health.CHECKS["ratio_at_step_0"], both)
    assert found["warn"] == pytest.approx(1.0 + 3.5 * math.sqrt(0.02 / 3), rel=1e-3)
    never = {"healthy": [[{"reward": s * i} for i in range(9)] for s in (1, -1, 2)]}
    assert zoo.limit_of(health.CHECKS["reward_falls"], never) is None  # no run could fail it


def test_the_stored_results_are_of_these_specimens_and_settings(zoo):
    stored = json.loads(zoo.RESULTS.read_text("utf-8"))
    names = {key.split("/")[0] for key in stored["runs"]}
    assert names <= {*SPECIMENS, zoo.HEALTHY} and stored["size"] == zoo.SIZE
    ways = {"": {}, **zoo.WIDER, **zoo.JUDGED}
    for key, run in stored["runs"].items():
        setting = [*key.split("/"), ""][2]
        lengths = {len(values) for values in run["metrics"].values()}
        assert lengths == {{**zoo.SIZE, **ways[setting]}["max_steps"]} or run["error"], key
    assert stored["first"] == zoo.tables(stored["runs"])
    assert stored["strays"] == zoo.strays(stored["runs"])


def test_what_the_package_ships_is_what_the_runs_say(zoo):
    runs = json.loads(zoo.RESULTS.read_text("utf-8"))["runs"]
    assert json.loads(zoo.LIMITS.read_text("utf-8")) == zoo.learned(runs)
    assert json.loads(zoo.CURVES.read_text("utf-8")) == zoo.curves_of(runs)
    assert zoo.CURVES.stat().st_size < 200_000


def test_the_judgement_is_that_of_runs_that_no_limit_saw_and_stands_in_the_docs(zoo):
    stored = json.loads(zoo.RESULTS.read_text("utf-8"))
    learned = {(zoo.HEALTHY, s) for s in (*zoo.LEARNING, *zoo.WIDER_SEEDS)}
    learned |= {(name, s) for name in SPECIMENS for s in zoo.SEEDS}
    judged = [key.split("/") for key in stored["runs"] if key.split("/")[-1] in zoo.JUDGED]
    assert len(judged) >= 60 and not {(name, int(seed)) for name, seed, _ in judged} & learned
    assert stored["judged"] == zoo.confusion(stored["runs"])
    assert stored["judged_by_specimen"] == zoo.by_specimen(stored["runs"])
    page = (FOLDER.parent / "docs" / "health.md").read_text("utf-8")
    for row in stored["judged"]:
        assert f"| {' | '.join(row.values())} |" in page, row
    page, hidden = " ".join(page.split()), 0
    for row in stored["first"]:
        said = f"`{row['specimen']}` (a metric leaves on {row['seeds']} seeds at most)"
        assert (said in page) == (row["first metric"] == "none"), row
        hidden += row["first metric"] == "none"
    assert f"{len(SPECIMENS) - hidden} of {len(SPECIMENS)} show" in page
    strays = sum(map(bool, stored["strays"].values()))
    assert f"Of {len(stored['strays'])} healthy runs {strays} left the band" in page
