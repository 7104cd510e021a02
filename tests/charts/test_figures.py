"""Studied figures: their numbers against runs and ledgers written by hand, their words, their size.

pytest tests/charts/test_figures.py
"""

import html
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import plotly.io as pio
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlhf_lab.charts.bars import FILL
from rlhf_lab.charts.figures import curves, frontier, scaling, sources, stage_costs
from rlhf_lab.charts.frame import COLOURS
from rlhf_lab.charts.plotly_style import MIME, THEMES, Figure, kept, safe, unit_of
from rlhf_lab.runs.ledger import PHASES, ROLES, Ledger
from rlhf_lab.runs.run import Run

MIB = 2**20
HOSTILE = '<script>alert(1)</script> <img src=x onerror="go()"> &lt;b&gt; $x$ %{y} \x1b[31m\x00'


@pytest.fixture
def made(tmp_path):
    """Make a run: `made("a", metrics, seed=1, stage="ppo", summary=…, **settings)`."""

    def make(name, metrics, stage="ppo", model="tiny", seed=0, summary=None, **settings):
        run = Run.create(
            tmp_path / name,
            stage=stage,
            model=model,
            data="stories",
            seed=seed,
            settings={"seed": seed, **settings},
        )
        for step, line in metrics.items():
            run.log(step, **line)
        run.finish(**(summary or {}))
        return run

    return make


def lines(figure, axis="y"):
    """Traces of a panel that are lines, not bands."""
    return [t for t in figure.data if t.type == "scatter" and t.yaxis == axis and not t.fill]


# ------------------------------------------------------------------------------------------ curves


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


def test_a_gap_stays_a_gap_and_a_later_word_counts(made):
    run = made("a", {1: {"kl": 1.0}, 2: {"kl": None}, 3: {"kl": 1e300}, 4: {"kl": 2.0}})
    run.log(4, kl=3.0)
    (trace,) = lines(curves(run))
    assert list(trace.y) == [1.0, None, None, 3.0] and not trace.connectgaps


def test_loss_is_in_what_the_stages_say(made):
    sft, dpo = (made(s, {1: {"loss": 1.0}}, stage=s) for s in ("sft", "dpo"))
    assert curves(sft).layout.yaxis.title.text == "nats per token"
    assert curves(sft, dpo).layout.yaxis.title.text == "nats per token or pair"


def test_what_cannot_be_drawn_is_said_in_a_line(made):
    run = made("a", {1: {"kl": 1.0}})
    for wrong, message in (
        (lambda: curves(), "give a run"),
        (lambda: curves(run, metrics=["kk"]), "no metric 'kk'.*have: kl"),
        (lambda: curves(made("new", {})), "logged nothing"),
        (lambda: curves(Ledger()), "Ledger is not a run"),
        (lambda: curves(run, theme="pink"), "theme='pink': choose from both, light, dark"),
        (lambda: frontier(run), "no run has 'gold_reward' and 'kl'"),
        (lambda: sources(run), "no ledger has bytes"),
        (lambda: sources(run, quantity="parsecs"), "quantity='parsecs': choose from bytes"),
        (lambda: sources(3), "int has no ledger"),
        (lambda: stage_costs(table(), by="colour"), "by='colour': choose from component"),
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


@given(
    st.lists(st.one_of(st.none(), st.floats(-1e9, 1e9)), min_size=1, max_size=300),
    st.integers(4, 60),
)
@example([0.0] * 10 + [None] + [0.0] * 10, 4)
def test_thinning_keeps_ends_extremes_and_gaps(column, at_most):
    found = kept(column, at_most=at_most)
    assert found == sorted(set(found)) and {0, len(column) - 1} <= set(found)
    assert len(found) <= max(at_most, 3 * (at_most // 2) + 2)
    real, left = [[v for v in c if v is not None] for c in (column, [column[i] for i in found])]
    if real:
        assert (min(left), max(left)) == (min(real), max(real))
    assert (None in column) == any(column[i] is None for i in found)


# ---------------------------------------------------------------------------------------- frontier


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
    assert [t.textposition for t in ends] == ["top left", "bottom center", "top center"]
    assert [(t.x[0], t.y[0], t.text[0]) for t in ends] == [
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


# ------------------------------------------------------------------------------------------- costs


def table(*rows, stage="ppo", quantity="bytes", source="predicted", **common):
    """A ledger; a row is (phase, role, component, value, low, high, rank) or less."""
    ledger = Ledger()
    names = ("phase", "role", "component", "value", "low", "high", "rank")
    for row in rows or [("forward", "policy", "parameters", MIB)]:
        ledger.add(
            stage=stage,
            quantity=quantity,
            source=source,
            **common,
            **dict(zip(names, row, strict=False)),
        )
    return ledger


def blocks(figure):
    """{(what hovering says before the colon, part): (bottom, height)} of all bars."""
    found = {}
    for t in figure.data:
        if t.type == "bar" and t.y[0] is not None:
            for said, base, y in zip(t.customdata, t.base, t.y, strict=True):
                found[said.split(":")[0], t.name] = (base, y)
    return found


def tops(figure):
    return {t.name: t for t in figure.data if t.type == "scatter" and t.mode == "markers"}


def test_predicted_simulated_and_measured_by_hand():
    plan = table(
        ("forward", "policy", "parameters", 4 * MIB, 3 * MIB, 6 * MIB),
        ("forward", "value", "parameters", 2 * MIB, 1 * MIB, 3 * MIB),
        ("forward", "policy", "activations", 10 * MIB, 9 * MIB, 11 * MIB),
        ("optimizer", "policy", "optimizer", 8 * MIB),
    )
    xray = table(("forward", "policy", "parameters", 5 * MIB), source="simulated")
    run = table(
        ("forward", "policy", "activations", 8 * MIB),
        ("evaluation", "policy", "activations", 99 * MIB),
        source="measured",
    )
    figure = sources(plan, xray, run, table(("forward", "policy", "logits", MIB)))
    assert blocks(figure) == {
        ("forward, predicted", "parameters"): (0, 6),
        ("forward, simulated", "parameters"): (0, 5),
        ("forward, predicted", "activations"): (6, 10),
        ("forward, measured", "activations"): (0, 8),
        ("optimizer, predicted", "optimizer"): (0, 8),
    }
    predicted = tops(figure)["predicted"]
    assert list(predicted.y) == [16, 8]
    assert list(predicted.error_y.array) == [4, 0]  # 20 − 16
    assert list(predicted.error_y.arrayminus) == [3, 0]  # 16 − 13
    assert not tops(figure)["measured"].error_y.array
    assert predicted.customdata[0].split("<br>") == [
        "forward, predicted: 16 MiB (13 MiB to 20 MiB)",
        "2.00 × measured",
    ]
    assert figure.layout.yaxis.title.text == "memory at each phase's peak (MiB)"
    assert figure.layout.xaxis.title.text == "phase of ppo"
    assert list(figure.layout.xaxis.ticktext) == ["forward", "optimizer"]
    assert (
        "forward: predicted 16 MiB (13 MiB to 20 MiB); simulated 5 MiB; measured 8 MiB; "
        "predicted 2.00 × measured"
    ) in figure.words
    # Bars of a cluster stand side by side, the surer the fuller.
    edges = sorted(
        (t.x[0] + t.offset[0], t.width[0], t.marker.color)
        for t in figure.data
        if t.type == "bar" and t.y[0] is not None and t.name == "parameters"
    )
    assert edges[0][0] + edges[0][1] <= edges[1][0]
    assert [e[2] for e in edges] == ["rgba(0,114,178,0.3)", "rgba(0,114,178,0.6)"]


def test_processes_share_the_seconds_and_the_worst_one_sets_the_memory():
    seconds = table(
        ("forward", "policy", "", 3.0, None, None, 0),
        ("forward", "policy", "", 5.0, None, None, 1),
        quantity="seconds",
    )
    found = blocks(sources(seconds, quantity="seconds"))
    assert found == {("forward, predicted", "policy"): (0, 4)}
    memory = table(
        ("forward", "policy", "activations", 3 * MIB, None, None, 0),
        ("forward", "policy", "activations", 5 * MIB, None, None, 1),
    )
    assert blocks(sources(memory))["forward, predicted", "activations"] == (0, 5)
    flops = table(
        ("forward", "policy", "", 3e9, None, None, 0),
        ("forward", "policy", "", 5e9, None, None, 1),
        quantity="flops",
    )
    assert blocks(sources(flops, quantity="flops")) == {("forward, predicted", "policy"): (0, 8)}


def test_stages_stand_apart_and_a_phase_is_found_in_each():
    sft = table(("forward", "policy", "", 2.0), stage="sft", quantity="seconds")
    dpo = table(("forward", "policy", "", 3.0), stage="dpo", quantity="seconds")
    figure = sources(sft, dpo, quantity="seconds")
    assert list(figure.layout.xaxis.ticktext) == ["sft<br>forward", "dpo<br>forward"]


def test_what_is_not_known_is_said_and_not_drawn():
    ledger = table(
        ("forward", "policy", "", math.inf),
        ("backward", "policy", "", 2.0, 1.0, math.inf),
        quantity="seconds",
    )
    figure = sources(ledger, quantity="seconds")
    assert blocks(figure) == {("backward, predicted", "policy"): (0, 2)}
    assert list(tops(figure)["predicted"].error_y.array) == [0]
    assert "forward: predicted ∞" in figure.words
    json.loads(figure.to_json(), parse_constant=pytest.fail)


def test_the_card_is_drawn_where_it_is_near():
    def plan(memory):
        hardware = SimpleNamespace(name="a <card>", memory=memory)
        return SimpleNamespace(
            ledger=table(("forward", "policy", "parameters", 10 * MIB)),
            estimate=SimpleNamespace(hardware=hardware),
        )

    (line,) = sources(plan(16 * MIB)).layout.shapes
    assert line.y0 == line.y1 == 16
    assert not sources(plan(1000 * MIB)).layout.shapes


def test_what_stages_cost():
    sft = table(
        ("forward", "policy", "", 1.0),
        ("backward", "policy", "", 2.0),
        stage="sft",
        quantity="seconds",
        source="measured",
    )
    ppo = table(
        ("rollout", "policy", "", 30.0),
        ("value", "value", "", 3.0),
        ("evaluation", "policy", "", 50.0),
        quantity="seconds",
        source="measured",
    )
    figure = stage_costs(sft, ppo)
    assert blocks(figure) == {
        ("sft, measured", "forward"): (0, 1),
        ("sft, measured", "backward"): (1, 2),
        ("ppo, measured", "rollout"): (0, 30),
        ("ppo, measured", "value"): (30, 3),
    }
    labels = next(t for t in figure.data if t.type == "scatter" and t.mode == "text")
    assert list(labels.text) == ["3 s", "33 s"]
    by_role = stage_costs(sft, ppo, by="role")
    assert blocks(by_role)["sft, measured", "policy"] == (0, 3)
    money = table(("", "", "", 3.5), quantity="money")
    assert stage_costs(money, quantity="money").layout.yaxis.title.text == "money (USD)"


def test_memory_of_a_stage_is_that_of_its_worst_moment():
    run = table(
        ("forward", "policy", "parameters", 4 * MIB),
        ("forward", "value", "logits", MIB),
        ("backward", "policy", "parameters", 4 * MIB),
        source="measured",
    )
    assert blocks(stage_costs(run, quantity="bytes")) == {
        ("ppo, measured", "policy"): (0, 4),
        ("ppo, measured", "value"): (4, 1),
    }


def test_a_plan_and_its_run_share_a_cluster_and_a_second_run_has_its_own():
    def thing(name, seconds, *said):
        ledger = Ledger()
        for source in said:
            ledger.extend(
                table(("forward", "policy", "", seconds), quantity="seconds", source=source)
            )
        return SimpleNamespace(name=name, ledger=ledger)

    plan, xray = thing("", 9.0, "predicted"), thing("", 8.0, "simulated")
    run = thing("mine", 5.0, "predicted", "measured")
    assert blocks(stage_costs(plan, xray, run, by="role")) == {
        ("ppo, predicted", "policy"): (0, 9),
        ("ppo, simulated", "policy"): (0, 8),
        ("ppo, measured", "policy"): (0, 5),
    }
    other = thing("other", 6.0, "predicted", "measured")
    assert list(stage_costs(run, other).layout.xaxis.ticktext) == ["ppo<br>mine", "ppo<br>other"]
    named = stage_costs({"full": plan, "LoRA": thing("", 4.0, "predicted")})
    assert list(named.layout.xaxis.ticktext) == ["full", "LoRA"]


def test_a_part_keeps_its_colour_and_no_two_phases_of_ppo_look_alike():
    def colours(figure):
        return {t.name: t.marker.color for t in figure.data if t.type == "bar" and t.y[0] is None}

    online = PHASES[:9]
    all_of_them = stage_costs(
        table(*((p, "policy", "", 1.0) for p in online), quantity="flops"), quantity="flops"
    )
    found = {p: c for p, c in colours(all_of_them).items() if p in online}
    assert len(set(found.values())) == len(online) == 9
    alone = stage_costs(table(("optimizer", "policy", "", 1.0), quantity="flops"), quantity="flops")
    assert colours(alone)["optimizer"] == found["optimizer"]
    roles = stage_costs(
        table(*(("forward", r, "", 1.0) for r in ROLES), quantity="flops"),
        quantity="flops",
        by="role",
    )
    assert {colours(roles)[r] for r in ROLES} <= set(COLOURS)


def test_units_read_well():
    assert unit_of("bytes", 3 * 2**30) == ("GiB", 2**30)
    assert unit_of("bytes", 100) == ("B", 1)
    assert unit_of("seconds", 5 * 3600) == ("hours", 3600)
    assert unit_of("seconds", 0.02) == ("milliseconds", 1e-3)
    assert unit_of("flops", 3e13) == ("TFLOP", 1e12)
    assert unit_of("tokens", 2e6) == ("M tokens", 1e6)
    assert unit_of("money", 2e6) == ("USD", 1)


def test_how_cost_grows():
    series = SimpleNamespace(
        axis="model",
        exponent=lambda quantity, source: 1.04,
        points=[{"x": 1e6, "flops predicted": 2e12}, {"x": 4e6, "flops predicted": 8e12}],
    )
    figure = scaling(series, x_title="model (parameters)")
    (trace,) = figure.data
    assert (list(trace.x), list(trace.y)) == ([1e6, 4e6], [2, 8])
    assert trace.name == "predicted, exponent 1.04"
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    assert figure.layout.yaxis.title.text == "arithmetic (TFLOP)"
    with pytest.raises(ValueError, match="no money"):
        scaling(series, "money")


# ------------------------------------------------------------------------------- text, looks, size


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


@given(st.text(max_size=60))
def test_safe_text_is_shown_letter_by_letter(text):
    shown = safe(text, 80)
    assert not set("<>$%{}\n") & set(shown)
    line = " ".join(text.split())
    assert html.unescape(shown) == "".join(c if c.isprintable() else "\ufffd" for c in line)
    assert len(html.unescape(safe(text, 10))) <= 10


def test_hostile_names_are_only_names(made):
    run = made(
        "x",
        {1: {"kl": 1.0, HOSTILE: 2.0, "gold_reward": 1.0}},
        model=HOSTILE,
        summary={"kl": 1.0, "gold_reward": 1.0},
    )
    ledger = SimpleNamespace(ledger=table())
    figures = [
        curves({HOSTILE: run}, metrics=["kl", HOSTILE]),
        frontier({HOSTILE: run}),
        frontier({HOSTILE: run}, reward=HOSTILE),
        stage_costs({HOSTILE: ledger}, quantity="bytes"),
        curves(run, made("y", {1: {"kl": 2.0}}, model="tiny"), metrics=["kl"]),
    ]
    for figure in figures:
        bundle = json.loads(figure.to_json())
        for trace in bundle["data"]:
            trace.pop("legendgroup", None)  # a key, never shown
        bundle["layout"].pop("meta")  # the words, plain text
        for text in strings(bundle):
            assert "<script" not in text and "<img" not in text and "$x$" not in text
            assert "%{y}" not in text and "\x1b" not in text and "\x00" not in text
        assert "\x1b" not in figure.words and "\x00" not in figure.words
    names = [t.name for t in lines(figures[0])]
    assert html.unescape(names[0]).startswith("<script>alert(1)</script>")


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_ink_reads_on_light_and_dark_paper():
    assert contrast("#000000", "#FFFFFF") == pytest.approx(21)
    for paper in ("#FFFFFF", "#111111"):
        assert contrast(THEMES["both"][0], paper) >= 4.2
    assert contrast(THEMES["light"][0], "#FFFFFF") >= 7
    assert contrast(THEMES["dark"][0], "#111111") >= 7
    figure = stage_costs(table(), quantity="bytes")
    assert figure.layout.font.color == THEMES["both"][0]
    assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0,0,0,0)"
    dark = stage_costs(table(), quantity="bytes", theme="dark")
    assert dark.layout.font.color == THEMES["dark"][0]


def test_a_notebook_gets_data_and_words_and_no_copy_of_plotly(monkeypatch):
    figure = stage_costs(table(), quantity="bytes")
    for default in ("plotly_mimetype", "plotly_mimetype+notebook", "vscode"):
        monkeypatch.setattr(pio.renderers, "default", default)
        bundle = figure._repr_mimebundle_()
        assert set(bundle) == {MIME, "text/plain"}
        assert bundle["text/plain"] == figure.words == repr(figure)
        assert len(json.dumps(bundle)) < 10_000
    seen = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: seen.append(data))
    figure._ipython_display_()
    figure.show()
    assert seen == [bundle, bundle]
    monkeypatch.setattr(pio.renderers, "default", "json")  # someone else's way
    assert set(figure._repr_mimebundle_()) == {"application/json"}
    assert repr(Figure()).startswith("Figure(")


def test_the_largest_figure_of_costs_is_small():
    ledger = Ledger()
    for source in FILL:
        for phase in PHASES[:9]:
            for role in ROLES[:4]:
                for component in (
                    "parameters",
                    "gradients",
                    "optimizer",
                    "activations",
                    "logits",
                    "kv_cache",
                    "workspace",
                    "communication",
                ):
                    ledger.extend(
                        table((phase, role, component, 1e9 / 3, 1e9 / 4, 1e9 / 2), source=source)
                    )
    assert len(sources(ledger).to_json()) <= 60_000
    assert len(sources(ledger, by="role").to_json()) <= 60_000


def test_no_torch_for_a_figure():
    code = "import sys, rlhf_lab.charts.figures; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
