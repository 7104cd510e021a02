"""The picture of memory: heights, colours and words against a ledger written by hand."""

import xml.etree.ElementTree as ET
from types import SimpleNamespace

import pytest

from rlhf_lab.charts.colours import part_colour
from rlhf_lab.charts.memory import MIB, memory_chart, peaks
from rlhf_lab.runs.ledger import Ledger

SVG = "{http://www.w3.org/2000/svg}"


def ledger(*sources, phases=("forward", "optimizer")):
    made = Ledger()
    for source in sources:
        for phase in phases:
            for role, component, size in (
                ("policy", "activations", 6),
                ("policy", "parameters", 2),
                ("value", "parameters", 1),
            ):
                made.add(
                    stage="ppo",
                    role=role,
                    phase=phase,
                    component=component,
                    quantity="bytes",
                    value=size * MIB,
                    source=source,
                )
    return made


def blocks(svg):
    return [r for r in ET.fromstring(svg).iter(f"{SVG}rect") if r.get("class") == "block"]


def title(block):
    return block.find(f"{SVG}title").text


def test_a_colour_is_a_component_and_a_block_is_a_role():
    found = blocks(memory_chart(ledger("predicted", phases=("forward",))))
    assert [title(b) for b in found] == [
        "forward, policy parameters: 2",
        "forward, value parameters: 1",
        "forward, policy activations: 6",
    ]
    fills = [b.get("style").split(";")[0] for b in found]
    assert fills[0] == fills[1] != fills[2]
    assert fills[0] == f"fill:{part_colour('component', 'parameters')}"
    heights = [float(b.get("height")) for b in found]
    assert heights[2] / heights[0] == pytest.approx(3, rel=0.02)


def test_a_component_keeps_its_colour_whatever_else_is_there():
    alone = Ledger()
    alone.add(
        stage="ppo",
        role="policy",
        phase="rollout",
        component="kv_cache",
        quantity="bytes",
        value=MIB,
        source="predicted",
    )
    both = ledger("predicted")
    both.extend(alone)
    last = {title(b): b.get("style").split(";")[0] for b in blocks(memory_chart(both))}
    (one,) = blocks(memory_chart(alone))
    assert last["rollout, policy kv_cache: 1"] == one.get("style").split(";")[0]


def test_sources_stand_side_by_side_under_their_letters():
    svg = memory_chart(ledger("measured", "predicted"))
    texts = [t.text for t in ET.fromstring(svg).iter(f"{SVG}text")]
    assert "Memory at each phase's peak: P predicted, M measured" in texts
    assert (texts.count("P"), texts.count("M"), texts.count("forward")) == (2, 2, 1)
    # Legend: each component once, in the ledger's order.
    assert [t for t in texts if t in ("parameters", "activations")] == ["parameters", "activations"]
    left = {title(b): float(b.get("x")) for b in blocks(svg)}
    places = [
        left[f"{at}, value parameters: 1"]
        for at in ("forward P", "forward M", "optimizer P", "optimizer M")
    ]
    assert places == sorted(places) and len(set(places)) == 4


def test_a_card_far_larger_than_what_is_used_does_not_press_the_bars_flat():
    near, far = ([(n * MIB, "memory of a card")] for n in (20, 2000))
    assert "memory of a card: 20" in memory_chart(ledger("predicted"), near)
    assert "memory of a card" not in memory_chart(ledger("predicted"), far)


def test_nothing_is_a_picture_too():
    assert "no data yet" in memory_chart(Ledger())


def test_peaks_beside_each_other_by_role_or_component():
    """Of a run what was measured; the memory of a plan's device is a line."""
    card = SimpleNamespace(kind="gpu", memory=12 * MIB, name="card")
    plan = SimpleNamespace(ledger=ledger("predicted"), hardware=card)
    run = SimpleNamespace(ledger=ledger("predicted", "measured"))
    by_role = peaks({"one": plan, "other": run})
    assert [title(b) for b in blocks(by_role)] == [
        *("one, policy: 8", "one, value: 1"),
        *("other, policy: 8", "other, value: 1"),
    ]
    assert "memory of card: 12" in by_role.words and "memory of card" not in peaks(run)
    parts = [title(b) for b in blocks(peaks(run, by="component"))]
    assert parts == ["ppo, parameters: 3", "ppo, activations: 6"]
    with pytest.raises(ValueError, match="by='phase': choose from role, component"):
        peaks(plan, by="phase")
    with pytest.raises(ValueError, match="two are called 'ppo'"):
        peaks(plan, run)
    with pytest.raises(ValueError, match="no bytes in its ledger"):
        peaks({"empty": Ledger()})
