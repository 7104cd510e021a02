"""The charts of every stage.

pytest tests/charts/test_views.py
"""

import pytest

from rlhf_lab.charts.views import CHARTS, charts_of
from rlhf_lab.stages import STAGES


@pytest.mark.parametrize("stage", STAGES)
def test_every_chart_that_a_stage_names_is_there(stage):
    assert set(STAGES[stage].charts) <= set(CHARTS)
    titles = [chart.title for chart in charts_of(stage)]
    assert len(set(titles)) == len(titles) > 0  # a dashboard finds its charts by their titles


def test_every_chart_belongs_to_a_stage_and_an_unknown_stage_shows_its_loss():
    assert {name for spec in STAGES.values() for name in spec.charts} == set(CHARTS)
    assert charts_of("distillation") == (CHARTS["loss"],)
