"""The lengths of the bundled rows that ship beside the models are those of the rows.

pytest tests/data/test_story_lengths.py
"""

from __future__ import annotations

import subprocess
import sys

import pytest

import rlhf_lab as lab
from rlhf_lab.data.lengths import row_lengths, story_lengths
from rlhf_lab.planning import predict
from rlhf_lab.stages import STAGES, TRAINABLE


@pytest.fixture(scope="module")
def stories():
    return lab.load_data("stories")


@pytest.mark.parametrize("stage", TRAINABLE)
def test_they_are_those_of_the_rows(stage, stories):
    assert story_lengths(STAGES[stage].rows) == row_lengths(stage, lab.load("tiny"), stories)


def test_a_plan_of_the_bundled_model_loads_no_tokenizer():
    """plan.md 22: it took nine seconds, for an estimate of lengths."""
    code = (
        "import sys, rlhf_lab as lab\nfrom rlhf_lab.stages import STAGES\n"
        "[lab.plan(stage, 'tiny', hardware='h100').estimate for stage in STAGES]\n"
        "print(*{'transformers', 'torch', 'tokenizers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_a_run_on_the_stories_is_predicted_without_reading_them():
    """As if it had read them; another world's stories, of another seed, are read."""
    plan, unread = lab.plan("ppo", "tiny", hardware="h100"), lab.load_data("stories")
    assert list(predict(plan, unread).ledger) == list(plan.estimate.ledger)
    assert "train" not in vars(unread.prompts)
    other = lab.load_data("stories", seed=1)
    assert list(predict(plan, other).ledger) != list(plan.estimate.ledger)
    assert "train" in vars(other.prompts)
