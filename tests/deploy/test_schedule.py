"""An engine's schedule, read off the real engine, against one that is worked out by hand.

pytest tests/deploy/test_schedule.py
"""

import heapq
import json
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import numpy
import pytest

import rlhf_lab as lab
from rlhf_lab.charts.schedule import EMPTY, Batching, slot_chart
from rlhf_lab.deploy.schedule import Schedule, trace

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "continuous_batching.json"
LENGTHS = [5, 1, 2, 9, 1, 1, 4, 3, 7, 2, 1]
PROMPTS = [[1, 2, 3][: 1 + i % 3] for i in range(len(LENGTHS))]


def refilled(lengths, slots):
    """The rule in words: a request starts when a slot is free. → first and last step of each."""
    free, spans = [0] * slots, []
    for length in lengths:
        start = heapq.heappop(free)
        heapq.heappush(free, start + length)
        spans.append((start, start + length - 1))
    return spans


def batch_after_batch(lengths, slots):
    spans, start = [], 0
    for i in range(0, len(lengths), slots):
        batch = lengths[i : i + slots]
        spans += [(start, start + length - 1) for length in batch]
        start += max(batch)
    return spans


@pytest.fixture(scope="module")
def both(tiny):
    model = tiny.lm(0)
    return {static: trace(model, PROMPTS, LENGTHS, 3, static=static) for static in (True, False)}


@pytest.mark.parametrize("static, by_hand", [(True, batch_after_batch), (False, refilled)])
def test_every_request_runs_in_the_steps_worked_out_by_hand(both, static, by_hand):
    spans = by_hand(LENGTHS, 3)
    found = both[static]
    assert found.steps == tuple(
        tuple(i for i, (first, last) in enumerate(spans) if first <= step <= last)
        for step in range(max(last for _, last in spans) + 1)
    )
    assert found.tokens == sum(LENGTHS)
    assert found.busy == sum(LENGTHS) / (3 * len(found.steps))


@pytest.mark.parametrize("static", [True, False])
def test_no_slot_holds_two_requests_at_once(both, static):
    taken = Counter(
        (x.slot, step) for x in both[static].occupied for step in range(x.first, x.last + 1)
    )
    assert set(taken.values()) == {1} and len(taken) == sum(LENGTHS)
    assert {slot for slot, _ in taken} == {0, 1, 2}


def test_the_model_is_as_it_was(tiny):
    """Its attention is the engine's meanwhile."""
    model = tiny.lm(0)
    before = model.config._attn_implementation
    trace(model, PROMPTS[:2], [1, 2], 2)
    assert model.config._attn_implementation == before


def test_the_picture_shades_what_stands_empty():
    """Two slots, four steps: request 0 has one slot throughout, 1 and 2 share the other."""
    schedule = Schedule(2, ((0, 1), (0,), (0, 2), (0, 2)), seconds=2.0)
    assert [tuple(x) for x in schedule.occupied] == [(0, 0, 0, 3), (1, 1, 0, 0), (2, 1, 2, 3)]
    bars = [
        r
        for r in ET.fromstring(slot_chart(schedule, "static")).iter(
            "{http://www.w3.org/2000/svg}rect"
        )
        if r.get("style").startswith("fill:#") and not r.get("rx")
    ]
    shaded, taken = bars[:2], bars[2:]
    assert all(r.get("style") == f"fill:{EMPTY}" for r in shaded) and len(taken) == 3
    width = float(shaded[0].get("width"))
    shares = [float(r.get("width")) / width for r in taken]
    assert shares == pytest.approx([1, 1 / 4, 2 / 4], abs=0.01)
    assert [r[0].text for r in taken][2] == "request 2: 2 tokens, steps 3 to 4"


def test_the_figures_are_ratios_of_the_two():
    static = Schedule(2, ((0, 1), (0,), (0,), (2,)), seconds=2.0)
    continuous = Schedule(2, ((0, 1), (0, 2), (0,)), seconds=1.0)
    found = Batching(static, continuous)
    assert found.step_ratio == 3 / 4 and found.speedup == 2
    assert "0.75 of the steps, 2.00 times the rate" in found.text


@pytest.mark.parametrize("seed", range(3))
def test_the_committed_counts_are_those_of_the_rule(seed):
    """256 requests in 32 slots: what the engine did (benchmarks/continuous_batching.py)."""
    found = json.loads(RESULTS.read_text())["seeds"][seed]
    drawn = numpy.random.default_rng(seed).geometric(1 / 64, 256).clip(max=512).tolist()
    for name, by_hand in (("static", batch_after_batch), ("continuous", refilled)):
        assert found[name]["steps"] == max(last for _, last in by_hand(drawn, 32)) + 1
        assert found[name]["tokens"] == sum(drawn)
    assert found["continuous"]["steps"] <= 0.6 * found["static"]["steps"]


def test_what_cannot_be_is_refused_in_a_line():
    with pytest.raises(ValueError, match="slots, mean and longest are at least 1"):
        lab.continuous_batching("mini", slots=0)
    with pytest.raises(ValueError, match=r"longest=2000: with its prompt \d+, and the model takes"):
        lab.continuous_batching("mini", requests=2, longest=2000)
