"""One colour, one meaning: the table, and that every chart takes its colours from it.

pytest tests/charts/test_colours.py
"""

import re

import pytest

import rlhf_lab as lab
from rlhf_lab.charts.colours import COLOURS_OF, NEUTRAL, part_colour
from rlhf_lab.charts.cost_bars import stage_costs
from rlhf_lab.charts.memory import memory_chart, role_memory_chart
from rlhf_lab.charts.views import time_stacks
from rlhf_lab.runs.ledger import COMPONENTS, PHASES, ROLES
from rlhf_lab.stages import STAGES
from rlhf_lab.widgets.planner_view import memory_picture, time_picture


@pytest.fixture(scope="module")
def plan():
    return lab.plan("ppo", "tiny", hardware="h100")


def fills(picture) -> dict[str, set[str]]:
    """Part → its colours, of every block: "forward, policy logits: 3" is of the part "logits"."""
    found: dict[str, set[str]] = {}
    pattern = r'class="block".*?fill:(.*?);stroke.*?<title>[^,]*, (.*?): '
    for colour, part in re.findall(pattern, picture, re.S):
        found.setdefault(part.split()[-1], set()).add(colour)
    return found


def test_every_part_has_a_colour_and_kinds_share_none_but_a_role_with_its_own_pass():
    for kind, names in (("role", ROLES), ("phase", PHASES), ("component", COMPONENTS)):
        assert set(names) <= COLOURS_OF[kind].keys()
        assert NEUTRAL not in COLOURS_OF[kind].values()
    of_stages = [(kind, spec) for spec in STAGES.values() for kind in ("role", "phase")]
    in_one_chart = [(kind, getattr(spec, f"{kind}s")) for kind, spec in of_stages]
    for kind, names in (*in_one_chart, ("component", COMPONENTS)):
        assert len({part_colour(kind, n) for n in names}) == len(names)
    roles, components = (set(COLOURS_OF[k].values()) for k in ("role", "component"))
    own = {"reference", "value", "score", "teacher"}
    phases = {c for n, c in COLOURS_OF["phase"].items() if n not in own}
    assert not roles & components and not phases & roles and not phases & components
    assert part_colour("phase", "score") == part_colour("role", "reward")
    assert part_colour("component", "kv cache") == COLOURS_OF["component"]["kv_cache"]


def test_every_chart_takes_its_colours_from_the_table_and_says_of_what(plan):
    for kind, picture in (
        ("component", memory_chart(plan.ledger)),
        ("component", memory_picture(plan.estimate)),
        ("role", role_memory_chart(plan.ledger)),
        ("role", time_picture(plan.estimate)),
        ("phase", time_stacks(plan.ledger)),
    ):
        found = fills(picture)
        assert found and f">{kind}:</text>" in picture
        for part, colours in found.items():
            assert colours == {part_colour(kind, part)}, (kind, part)
    figure = stage_costs(plan)
    assert figure.layout.legend.title.text == "phase"
    listed = {t.name: t.marker.color for t in figure.data if t.type == "bar" and t.y[0] is None}
    for phase in ("rollout", "backward"):
        assert listed[phase] == part_colour("phase", phase)
