"""Prompts that are answered leave room for the longest answer, as the training cuts it.

Run with: python -m pytest tests/trainers/test_prompt_room.py
"""

import pytest

import rlhf_lab as lab
from rlhf_lab.data.lengths import planned_lengths
from rlhf_lab.data.rows_left import response_limit
from rlhf_lab.stages import ONLINE, TRAINABLE
from rlhf_lab.trainers.prepare import prepare

ROOM = 16


@pytest.fixture(scope="module")
def data():
    words = "the old fox and the small lantern went to the cave where it rained all night "
    return lab.load_data(
        [{"prompt": words[: 3 * i] + "\n", "completion": f"It ended {i}."} for i in range(1, 40)]
    )


@pytest.mark.parametrize("given", [{}, {"response_length": 40}])
@pytest.mark.parametrize("stage", [s for s in ONLINE if s in TRAINABLE])
def test_a_plan_knows_where_its_trainer_cuts(stage, given):
    plan = lab.plan(stage, "mini", **given)
    assert plan.config().response_length == response_limit(plan.settings)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_no_answer_passes_the_context(stage, data):
    """SFT answers held-out prompts too, with as many tokens as its plan says."""
    model = lab.load("mini")
    plan = lab.plan(stage, model, response_length=model.context - ROOM)
    ready = prepare(plan, data, plan.config())
    sizes = [len(row["prompt_ids"]) for row in ready.prompts]
    every = [len(model.tokenizer(row["prompt"]).input_ids) for row in data.prompts.test]
    assert sorted(sizes) == sorted(n for n in every if n <= ROOM) != sorted(every)
    if stage == "ppo":  # and the plan counts with the rows that are left
        assert planned_lengths(stage, model, data, plan.settings)["rows"] == len(ready.train)
