"""Runs overlaid and the reward–KL frontier: their numbers, names and words against runs by hand.

pytest tests/charts/test_curves.py
"""

import json
import math
from types import SimpleNamespace

import pytest
from figure_kit import lines, table

from rlhf_lab.charts.cost_bars import sources, stage_costs
from rlhf_lab.charts.curves import curves
from rlhf_lab.charts.frontier import frontier
from rlhf_lab.runs.ledger import Ledger


def test_runs_lie_over_each_other_in_a_panel_for_each_metric(made):
    a = made("a", {s: {"reward": s / 8, "kl": s} for s in (1, 2, 3)}, kl_coef=0.1)
    b = made("b", {s: {"reward": -s / 8} for s in (1, 5)}, kl_coef=0.2)
    figure = curves(a, b)
    above, below = lines(figure), lines(figure, "y2")
    assert [t.name for t in above] == ["kl_coef=0.1", "kl_coef=0.2"]
    assert [t.name for t in below] == ["kl_coef=0.1"]
    for run, trace in ((a, above[0]), (b, above[1])):
        assert (list(trace.x), list(trace.y)) == tuple(map(list, run.series("reward")))
    # A run looks the same in all panels, is listed once, and differs in more than its colour.
    assert above[0].line == below[0].line and above[0].legendgroup == below[0].legendgroup
    assert [t.showlegend for t in (*above, *below)] == [True, True, False]
    assert above[0].line.color != above[1].line.color
    assert above[0].line.dash != above[1].line.dash
    assert above[0].marker.symbol != above[1].marker.symbol
    assert figure.layout.yaxis.title.text == "score of the reward model"
    assert figure.layout.yaxis2.title.text == "nats per response"
    assert [a.text for a in figure.layout.annotations] == ["proxy reward", "KL to the reference"]
    assert figure.layout.xaxis.title.text == figure.layout.xaxis2.title.text == "iteration"
    assert figure.layout.xaxis2.matches == "x"
    assert "reward, kl_coef=0.1: 0.125 at step 1, 0.375 at step 3" in figure.words


def test_runs_that_differ_in_their_seed_are_one_line_in_a_band(made):
    one = made("one", {1: {"kl": 1.0}, 2: {"kl": 4.0}, 3: {"kl": 9.0}}, seed=1)
    two = made("two", {1: {"kl": 2.0}, 2: {"kl": 8.0}}, seed=2)
    three = made("three", {1: {"kl": 6.0}, 2: {"kl": 3.0}, 3: {"kl": 9.0}}, seed=3)
    figure = curves(one, two, three)
    (mean,) = lines(figure)
    (band,) = (t for t in figure.data if t.fill)
    assert (list(mean.x), list(mean.y)) == ([1, 2], [3.0, 5.0])  # ends where the first run does
    assert list(mean.customdata) == ["(1 to 6)", "(3 to 8)"]
    corners = set(zip(band.x, band.y, strict=True))
    assert corners == {(1, 1.0), (2, 3.0), (1, 6.0), (2, 8.0)} and len(band.x) == 4
    assert mean.name == "ppo (3 seeds)" and not band.showlegend
    assert "3 at step 1, 5 at step 2 (seeds: 3 to 8)" in figure.words
    apart = curves(one, two, three, seeds=False)
    assert [t.name for t in lines(apart)] == ["one", "two", "three"]
    # The same seed twice is no spread over seeds.
    again = made("again", {1: {"kl": 1.0}}, seed=1)
    assert [t.name for t in lines(curves(one, again))] == ["one", "again"]


def test_a_run_is_called_after_what_tells_it_apart(made):
    logged = {1: {"loss": 1.0, "reward": 1.0}}
    ppo = [made(f"p{b}{s}", logged, kl_coef=b, seed=s) for b in (0.1, 0.2) for s in (0, 1)]
    dpo = made("d", logged, stage="dpo", beta=0.5)
    big = made("big", logged, model="small", kl_coef=0.1, lr=1, batch=2, steps=3)

    def names(*runs):
        return [t.name for t in lines(curves(*runs, metrics=["loss"]))]

    assert names(ppo[0]) == ["p0.10"]
    assert names(*ppo) == ["kl_coef=0.1 (2 seeds)", "kl_coef=0.2 (2 seeds)"]
    assert names(*ppo[:2], dpo) == ["ppo (2 seeds)", "dpo"]
    assert names(ppo[0], ppo[2], dpo) == ["ppo kl_coef=0.1", "ppo kl_coef=0.2", "dpo"]
    assert names({"mine": ppo[0], "yours": ppo[1]}) == ["mine", "yours"]
    some = made("some", logged, kl_coef=0.1, lr=1)
    assert names(ppo[0], some) == ["lr=default", "lr=1"]
    assert names(ppo[0], big) == ["p0.10", "big"]  # too much differs for a name
    assert curves(ppo[0], dpo, metrics=["loss"]).layout.xaxis.title.text == (
        "optimizer step (PPO: iteration)"
    )


def test_a_gap_stays_a_gap_and_the_last_value_of_a_step_counts(made):
    run = made("a", {1: {"kl": 1.0}, 2: {"kl": None}, 3: {"kl": 1e300}, 4: {"kl": 2.0}})
    run.log(4, kl=3.0)
    (trace,) = lines(curves(run))
    assert list(trace.y) == [1.0, None, None, 3.0] and not trace.connectgaps


def test_the_unit_of_a_loss_is_that_of_its_stages(made):
    sft, dpo = (made(s, {1: {"loss": 1.0}}, stage=s) for s in ("sft", "dpo"))
    assert curves(sft).layout.yaxis.title.text == "nats per token"
    assert curves(sft, dpo).layout.yaxis.title.text == "nats per token or pair"


def test_what_cannot_be_drawn_is_an_error_of_one_line(made):
    run = made("a", {1: {"kl": 1.0}})
    for wrong, message in (
        (lambda: curves(), "give a run"),
        (lambda: curves(run, metrics=["kk"]), "no metric 'kk'.*have: kl"),
        (lambda: curves(made("new", {})), "logged nothing"),
        (lambda: curves(Ledger()), "Ledger is not a run"),
        (lambda: curves(run, theme="pink"), "theme='pink': choose from both, light, dark"),
        (lambda: frontier(run), "no run has 'gold_reward' and 'kl'"),
        (lambda: sources(run), "no ledger has bytes"),
        (lambda: sources(run, quantity="parsecs"), "quantity='parsecs': .*choose from bytes"),
        (lambda: sources(3), "int has no ledger"),
        (
            lambda: stage_costs(table(), by="colour"),
            "by='colour': choose from role, phase, component",
        ),
    ):
        with pytest.raises(ValueError, match=message) as error:
            wrong()
        assert "\n" not in str(error.value)


def test_long_curves_are_thinned_and_keep_their_peaks(made):
    runs = [made(f"r{seed}", {}, seed=seed) for seed in range(8)]
    for seed, run in enumerate(runs):
        logged = [
            {
                "step": s,
                **{n: math.sin(s / 50 + seed) for n in ("reward", "gold_reward", "kl", "entropy")},
            }
            for s in range(1, 3001)
        ]
        logged[1233]["kl"] = 77.0 + seed
        (run.folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, logged)))
    apart, together = curves(*runs, seeds=False), curves(*runs)
    thin = lines(apart, "y3")
    for seed, trace in enumerate(thin):
        assert max(trace.y) == 77.0 + seed and trace.x[list(trace.y).index(max(trace.y))] == 1234
        assert (trace.x[0], trace.x[-1]) == (1, 3000)
    (band,) = (t for t in together.data if t.fill and t.yaxis == "y3")
    assert max(band.y) == 84.0
    for figure in (apart, together, frontier(*runs)):
        assert len(figure.to_json()) <= 60_000


def test_the_frontier_by_hand(made):
    path = {
        1: {"kl": 0.0, "gold_reward": 8.0},
        2: {"kl": 4.0, "gold_reward": 9.0},
        3: {"kl": 6.0},
        4: {"kl": 9.0, "gold_reward": 8.5},
    }
    ppo = made("ppo", path, summary={"kl": 9.5, "gold_reward": 8.4, "before/gold_reward": 8.0})
    dpo = made("dpo", {1: {"loss": 1.0}}, stage="dpo", summary={"kl": 2.25, "gold_reward": 9.1})
    sft = made("sft", {1: {"loss": 1.0}}, stage="sft", summary={"gold_reward": 8.1})
    best = SimpleNamespace(
        points=[
            SimpleNamespace(
                n=n,
                reward=n / 2,
                reward_error=0.5,
                gold_reward=8 + n / 4,
                gold_error=0.25,
                kl_bound=math.log(n) - (n - 1) / n,
            )
            for n in (1, 4)
        ]
    )
    figure = frontier(ppo, dpo, sft, best)
    walked, *ends, drawn, start = figure.data
    assert (list(walked.x), list(walked.y)) == ([0, 4, 9], [8, 9, 8.5])
    assert list(walked.customdata) == [1, 2, 4]
    sizes = list(walked.marker.size)
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert [(t.x[0], t.y[0], t.name) for t in ends] == [
        (9.5, 8.4, "ppo"),
        (2.25, 9.1, "dpo"),
        (0, 8.1, "sft"),
    ]
    assert walked.legendgroup == ends[0].legendgroup and not ends[0].showlegend
    assert list(drawn.x) == pytest.approx([0, 0.63629], rel=1e-5)  # ln 4 − 3/4
    assert list(drawn.y) == [8.25, 9.0] and list(drawn.error_y.array) == [0.25, 0.25]
    assert list(drawn.text) == ["n=1", "n=4"]
    assert figure.layout.xaxis.title.text == "KL to the reference (nats per response)"
    assert figure.layout.yaxis.title.text == "gold reward (points)"
    assert (list(start.x), list(start.y)) == ([0], [8])
    assert "ppo, held out: gold_reward 8.4 at 9.5 nats" in figure.words
    root = frontier(ppo, dpo, sft, best, root=True)
    assert list(root.data[0].x) == [0, 2, 3] and root.data[2].x[0] == 1.5
    assert "√nats" in root.layout.xaxis.title.text
    proxy = frontier(ppo, best, reward="reward", kl="kl")
    assert len(proxy.data) == 1 and list(proxy.data[0].y) == [0.5, 2.0]
    assert "ppo: no reward and kl" in proxy.words


def test_an_estimate_below_zero_has_a_root_of_zero(made):
    run = made("a", {1: {"kl": -0.01, "gold_reward": 1.0}, 2: {"kl": 1.0, "gold_reward": 2.0}})
    assert list(frontier(run, root=True).data[0].x) == [0, 1]
    assert list(frontier(run).data[0].x) == [-0.01, 1]


def test_seeds_walk_together_on_the_frontier_and_end_apart(made):
    runs = []
    for s in (1, 2):
        steps = {1: {"kl": s, "gold_reward": 1.0}, 2: {"kl": 4 * s, "gold_reward": 2 * s}}
        runs.append(made(f"s{s}", steps, seed=s, summary={"kl": s, "gold_reward": 2.0}))
    path, ends = frontier(*runs).data
    assert path.legendgroup == ends.legendgroup and path.showlegend is None and not ends.showlegend
    assert (list(path.x), list(path.y)) == ([1.5, 6.0], [1.0, 3.0])
    assert (list(ends.x), list(ends.y)) == ([1, 2], [2, 2])
