"""The doors to the widgets: what a notebook calls, on real runs and data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import rlhf_lab as lab
from rlhf_lab import notebook
from rlhf_lab.ppo import texts
from rlhf_lab.runs.run import Run

pytestmark = pytest.mark.usefixtures("few_stories")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of PPO whose samples have figures of their tokens."""
    out = tmp_path_factory.mktemp("runs") / "ppo"
    plan = lab.plan(
        "ppo", "tiny", max_steps=2, per_device_train_batch_size=8, response_length=12, seed=0
    )
    return lab.train(plan, out=out, quiet=True)


def test_ppo_keeps_what_the_inspector_colours(run):
    rows = [r for r in run.samples if "tokens" in r and "when" not in r]
    assert {r["step"] for r in rows} == {1, 2} and len(rows) == 8
    for row in rows:
        tokens = row["tokens"]
        plain = [t for i, t in enumerate(tokens["text"]) if i not in tokens["special"]]
        assert "".join(plain) == row["response"]
        for name in ("logprob", "log_ratio", "value", "reward", "advantage", "return"):
            assert len(tokens[name]) == len(tokens["text"]), name
        # Rule 11: β·KL is taken off every token, and the score added to the last.
        beta = dict(zip(*run.series("kl_coef"), strict=True))[row["step"]]
        for reward, ratio in zip(tokens["reward"][:-1], tokens["log_ratio"][:-1], strict=True):
            assert reward == pytest.approx(-beta * ratio, abs=1e-3)
    assert all(x == 0 for r in rows if r["step"] == 1 for x in map(round, r["tokens"]["log_ratio"]))


def test_a_dashboard_of_a_folder(run):
    assert "2" in repr(lab.dashboard(run.folder)) and "reward" in repr(
        lab.dashboard(str(run.folder))
    )
    with pytest.raises(FileNotFoundError, match="no such folder"):
        lab.dashboard(run.folder / "nothing")


def test_inspecting_a_folder_and_scoring_what_has_no_figures(run):
    inspector = lab.inspect(run.folder)
    assert repr(inspector)
    held_out = next(r for r in run.samples if r.get("when") == "ppo")
    record = inspector._score(run, held_out)
    assert len(record["log_ratio"]) == len(record["text"])
    before = next(r for r in run.samples if r.get("when") == "sft")
    # Before training the policy is the reference.
    assert max(map(abs, inspector._score(run, before)["log_ratio"])) < 1e-5


def test_held_out_samples_are_of_prompts_that_were_not_trained_on(run):
    prompts = lab.load_data("stories").prompts
    shown = {r["prompt"] for r in run.samples if r.get("when") in ("sft", "ppo")}
    assert shown and shown <= {row["prompt"] for row in prompts.test}
    assert not shown & {row["prompt"] for row in prompts.train}


@pytest.mark.parametrize(
    ("stage", "when", "by"),
    [
        ("ppo", "sft", "reference"),
        ("ppo", "ppo", "policy"),
        ("sft", "base", "reference"),
        ("sft", "sft", "policy"),
    ],
)
def test_a_sample_is_scored_by_the_model_that_wrote_it(stage, when, by, monkeypatch):
    monkeypatch.setattr(notebook, "_models", lambda *_: ("policy", "reference", None))
    monkeypatch.setattr(texts, "score_tokens", lambda model, *_: model)
    run = SimpleNamespace(folder=Path(), stage=stage, config={"model": "tiny"})
    assert notebook._score(run, {"when": when, "prompt": "p", "response": "r"}) == by


def test_labelling_takes_the_datas_own_pairs(tmp_path):
    mine = lab.label("stories", n=3, out=tmp_path / "mine.jsonl")
    assert len(mine.pairs) == 3 and not (tmp_path / "mine.jsonl").exists()
    mine.answer("left")
    assert len(lab.label("stories", n=3, out=tmp_path / "mine.jsonl").preferences) == 1
    with pytest.raises(ValueError, match="has no pairs to label"):
        lab.label(
            [{"prompt": f"a {i}", "completion": "b"} for i in range(20)], out=tmp_path / "x.jsonl"
        )


def test_your_answers_are_data_and_what_you_took_back_is_not(tmp_path):
    file = tmp_path / "mine.jsonl"
    mine = lab.label("stories", n=14, out=file)
    for _ in range(13):
        mine.answer("left")
    mine.undo()
    assert len(mine.preferences) == 12
    read = lab.load_data(file)
    assert len(read.preferences.train) + len(read.preferences.test) == 12
    stories = lab.load_data("stories")
    yours = stories.with_preferences(mine.preferences)
    assert yours.preferences.train == mine.preferences
    assert yours.preferences.test == stories.preferences.test
    assert yours.accuracy_ceiling() == stories.accuracy_ceiling()
    with pytest.raises(ValueError, match="no preferences yet"):
        stories.with_preferences([])


def test_figures_of_a_run(run):
    assert lab.curves(run, metrics=["reward"]).data[0].y
    assert lab.compare(lab.plan("ppo", "tiny"), run).figure("seconds").data
    assert lab.stage_costs(run).data


def test_the_planner_opens_without_torch():
    code = (
        "import sys, rlhf_lab as lab; p = lab.planner(stage='ppo', model='Qwen/Qwen2.5-7B', "
        "hardware='h100'); print(repr(p)); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "Qwen2.5-7B" in done.stdout, done.stderr


def test_every_public_name_is_there():
    assert all(getattr(lab, name) is not None for name in lab.__all__)
    assert isinstance(lab.Run, type) and lab.Run is Run
