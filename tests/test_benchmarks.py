"""The arithmetic of `benchmarks/ppo_vs_trl.py`, by hand: its tables are worth what this is."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    """The benchmark's modules, by name."""
    before, path = set(sys.modules), sys.path[:]
    sys.path.insert(0, str(FOLDER))
    import ppo_parity
    import ppo_vs_trl
    import ppo_vs_trl_gold
    import ppo_vs_trl_lab
    import ppo_vs_trl_rate
    import ppo_vs_trl_report

    yield {
        "parity": ppo_parity,
        "all": ppo_vs_trl,
        "gold": ppo_vs_trl_gold,
        "lab": ppo_vs_trl_lab,
        "rate": ppo_vs_trl_rate,
        "report": ppo_vs_trl_report,
    }
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name.startswith("ppo_"):
            del sys.modules[name]


def curve(*points):
    return [dict(zip(("seconds", "gold", "kl"), p, strict=True)) for p in points]


def test_the_time_to_a_gold_reward_lies_on_a_line(bench):
    reach = bench["gold"].time_to_reach
    found = curve((0, 8.0, 0.0), (10, 9.0, 1.0), (20, 9.5, 2.0))
    assert reach(found, 8.5, kl=3) == 5
    assert reach(found, 9.25, kl=3) == 15
    assert reach(found, 9.25, kl=1.5) == math.inf  # too far out when it is there
    assert reach(found, 9.6, kl=3) == math.inf
    assert reach(found, 8.0, kl=3) == 0
    back = curve((0, 8.0, 0.0), (10, 9.0, 4.0), (20, 9.0, 2.0))
    assert reach(back, 8.5, kl=3) == 20  # no line through a point that does not count


def test_compiling_has_a_price_once_and_pays_only_where_it_saves(bench):
    def runs(firsts, seconds):
        fast = [{"first": x, "seconds": seconds, "iterations": 10} for x in firsts]
        return {"ours": [{"seconds": 20.0, "iterations": 10}], "ours, torch_compile": fast}

    of = bench["all"].compiling_of
    paid = {"iteration / without": 0.8, "seconds, from an empty cache": 8.0}
    assert of(runs([10, 2, 2], 16.0), False) == pytest.approx(paid | {"break-even, iterations": 20})
    assert of(runs([2.0, 2.1, 2.1], 16.0), True) == {"iteration / without": 0.8}
    for nothing in (runs([2.0, 2.1, 2.1], 16.0), runs([10, 2, 2], 24.0)):  # spent, saved
        assert "break-even, iterations" not in of(nothing, False)


def test_settings_are_chosen_within_the_kl(bench):
    best = bench["gold"].best
    ends = [{"gold": 9.0, "kl": 1.0}, {"gold": 9.4, "kl": 2.5}, {"gold": 9.9, "kl": 9.0}]
    assert best(ends, kl=3) == 1 and best(ends, kl=10) == 2
    assert best(ends, kl=0.5) == 0  # none is: the nearest


def test_both_sides_choose_from_one_grid_with_the_labs_own_point(bench):
    gold = bench["gold"]
    assert gold.recommended() in gold.GRID
    assert len(gold.GRID) == len({json.dumps(c) for c in gold.GRID})


def test_flops_that_an_update_needs_against_pytorchs_counter(bench, tiny):
    """One row of 5 + 3 tokens; the counter takes all n² pairs of them."""
    model = tiny.lm(0, "llama")
    model.set_attn_implementation("eager")  # which is made of products that the counter knows
    config = model.config.to_dict()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden = model.model(torch.full((1, 8), 5)).last_hidden_state
        model.lm_head(hidden[:, -3:])
    rate = bench["rate"]
    head = config["vocab_size"]
    assert rate.forward_flops(config, [(5, 3)], head, causal=False) == counter.get_total_flops()
    less = 4 * config["num_hidden_layers"] * config["hidden_size"] * (8 * 8 - 8 * 9 // 2)
    whole = counter.get_total_flops()
    assert rate.forward_flops(config, [(5, 3)], head) == whole - less
    value = whole - less - 2 * config["hidden_size"] * 3 * (head - 1)
    assert rate.update_flops(config, [(5, 3)], 4) == 3 * 4 * (whole - less + value)


def test_curves_that_differ_are_named_by_their_line(bench, tmp_path):
    whole, resumed = tmp_path / "a", tmp_path / "b"
    whole.write_text('{"kl": 1}\n{"kl": 2}\n')
    resumed.write_text('{"kl": 1}\n{"kl": 2}\n')
    assert bench["lab"].difference(whole, resumed) == ""
    resumed.write_text('{"kl": 1}\n{"kl": 3}\n')
    assert bench["lab"].difference(whole, resumed).startswith("line 2")
    resumed.write_text('{"kl": 1}\n')
    assert "no such line" in bench["lab"].difference(whole, resumed)


def test_chance_by_enumeration(bench):
    """Two against two: of six ways to divide 1, 2, 3, 4 two part them as far."""
    assert bench["parity"].permutation_test([1, 2], [3, 4]) == pytest.approx(2 / 6)
    assert bench["parity"].permutation_test([1, 4], [2, 3]) == 1


def test_a_target_that_is_never_reached_is_missed(bench):
    target = bench["report"].target
    assert target("x", 1.5, 1.5, at_least=True)["met"]
    assert not target("x", math.inf, 0.5, at_least=False)["met"]
    assert target("x", math.inf, 0.5, at_least=False)["figure"] is None
