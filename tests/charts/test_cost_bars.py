"""Costs as bars and as series: their numbers, colours and size against ledgers written by hand.

pytest tests/charts/test_cost_bars.py
"""

import json
import math
from types import SimpleNamespace

import pytest
from figure_kit import MIB, blocks, table, tops

from rlhf_lab.charts.cost_bars import scaling, sources, stage_costs
from rlhf_lab.charts.frame import COLOURS
from rlhf_lab.charts.stacked_bars import FILL
from rlhf_lab.runs.ledger import PHASES, ROLES, Ledger
from rlhf_lab.stages import STAGES


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
    assert [e[2] for e in edges] == ["rgba(91,79,191,0.3)", "rgba(91,79,191,0.6)"]


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


def test_an_infinite_cost_is_written_and_not_drawn():
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
    def thing(name, seconds, *sources):
        ledger = Ledger()
        for source in sources:
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

    online = [*STAGES["ppo"].phases]
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
