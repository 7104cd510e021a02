"""`lab.clone`: a PPO run from one of its checkpoints again, with nothing changed or with something.

pytest tests/test_cloning.py
"""

import shutil
from dataclasses import replace

import pytest

import rlhf_lab as lab
from rlhf_lab.cli import main
from rlhf_lab.data.load import Split
from rlhf_lab.runs.lock import release
from rlhf_lab.runs.run import Run

SMALL = {"per_device_train_batch_size": 8, "response_length": 8, "num_mini_batches": 2}
FILES = ("metrics.jsonl", "samples.jsonl", "evaluation.jsonl", "model/model.safetensors")


def plan(**more):
    steps = {"max_steps": 4, "save_steps": 1, "save_total_limit": None, "seed": 3}
    return lab.plan("ppo", "mini", **{**SMALL, **steps, **more})


@pytest.fixture(scope="module")
def parent(few_stories, tmp_path_factory):
    """A finished run that kept its checkpoints."""
    return lab.train(plan(), few_stories, out=tmp_path_factory.mktemp("runs") / "it", quiet=True)


def contents(run):
    return {p: p.read_bytes() for p in run.folder.rglob("*") if p.is_file()}


def lines(run, upto):
    return [line for line in run.metrics if line["step"] <= upto]


def test_unchanged_it_is_the_run_itself(parent, few_stories, tmp_path):
    before = contents(parent)
    same = lab.clone(parent.folder, 2, data=few_stories, out=tmp_path / "same", quiet=True)
    for name in FILES:
        assert (same.folder / name).read_bytes() == (parent.folder / name).read_bytes(), name
    assert same.config["settings"] == parent.config["settings"] and same.last_step == 4
    assert same.config["clone"] == {"run": str(parent.folder), "step": 2, "changed": {}}
    assert f"cloned from {parent.folder} at step 2" in same.show().text
    assert contents(parent) == before  # a run is never written to


def test_a_changed_setting_holds_from_the_checkpoint_on(parent, few_stories, tmp_path):
    """β and the rate are in the checkpoint too: those of the clone take their place."""
    changed = {"kl_coef": 0.5, "learning_rate": 2e-3}
    how = {"data": few_stories, "out": tmp_path / "other", "quiet": True}
    other = lab.clone(parent, **changed, **how)  # from the newest checkpoint before the last: 3
    assert other.config["clone"] == {"run": str(parent.folder), "step": 3, "changed": changed}
    assert lines(other, 3) == lines(parent, 3)
    assert [line["kl_coef"] for line in other.metrics] == [0.15, 0.15, 0.15, 0.5]
    # Linear from the peak to 0 in four iterations: a quarter is left at the fourth (2e-3 / 4).
    assert other.series("learning_rate")[1][-1] == pytest.approx(5e-4)
    # It samples what the run sampled, and then learns otherwise.
    assert other.series("kl")[1][-1] == parent.series("kl")[1][-1]
    assert other.series("grad_norm")[1][-1] != parent.series("grad_norm")[1][-1]
    figure = lab.curves(parent, other, metrics=["kl_coef"])
    assert [line.name for line in figure.data] == [
        "learning_rate=0.0005, kl_coef=0.15",
        "learning_rate=0.002, kl_coef=0.5",
    ]
    assert [list(line.y) for line in figure.data] == [[0.15] * 4, [0.15, 0.15, 0.15, 0.5]]


def test_another_reward_scores_what_was_written_before_too(parent, few_stories, tmp_path):
    how = {"data": few_stories, "out": tmp_path / "gold", "quiet": True}
    parent.claim()  # it is live: its process holds the folder
    try:
        gold = lab.clone(parent, 3, rewards=["gold"], **how)
    finally:
        release(parent.folder, parent._lock)
    assert lines(gold, 3) == lines(parent, 3)
    here, there = ({r["when"]: r for r in run.evaluation} for run in (gold, parent))
    assert here["sft"]["ids"] == there["sft"]["ids"]
    assert "reward" in there["sft"] and "reward" not in here["sft"]  # no reward model any more
    last = gold.metrics[-1]
    assert last["reward"] == last["gold_reward"] != parent.metrics[-1]["reward"]


def test_a_clone_that_was_killed_goes_on_as_a_clone(parent, few_stories, tmp_path):
    """Before its first checkpoint there is only that of the run it was cloned from, with the old
    settings in it."""
    out = tmp_path / "killed"
    how = {"data": few_stories, "out": out, "quiet": True}
    whole = lab.clone(parent, 2, kl_coef=0.5, **how).metrics
    for own in (3, 4):
        shutil.rmtree(out / "trainer" / f"checkpoint-{own}")
    killed = Run.load(out)
    killed.rewind(3)  # and so it is running, and nobody has its lock
    again = lab.train(plan(kl_coef=0.5), few_stories, out=out, resume=True, quiet=True)
    assert again.metrics == whole and again.config["clone"]["step"] == 2


def test_a_sick_run_is_cloned_sick_or_healed(few_stories, tmp_path):
    short = {"max_steps": 2, "save_steps": 1}
    out = tmp_path / "sick"
    sick = lab.train(plan(**short), few_stories, specimen="reward_sign", out=out, quiet=True)
    same, healed = (
        lab.clone(sick, data=few_stories, out=tmp_path / name, quiet=True, **how)
        for name, how in {"same": {}, "healed": {"specimen": None}}.items()
    )
    assert same.metrics == sick.metrics and same.config["specimen"] == "reward_sign"
    assert "specimen" not in healed.config and healed.config["clone"]["changed"] == {
        "specimen": None
    }
    assert lines(healed, 1) == lines(sick, 1) and healed.metrics[-1] != sick.metrics[-1]


REFUSED = [
    ({"step": 7}, "it has no checkpoint to go on from at step 7: choose from 0, 1, 2, 3 "),
    ({"step": 4}, "=4 leaves nothing to train after step 4 of it: choose from 0, 1, 2, 3 "),
    (
        {"step": 3, "max_steps": 3},
        "=3 leaves nothing .* 3 of it: choose from 0, 1, 2 .or give",
    ),
    ({"layout": "shared"}, "layout is that of the checkpoint: to change it, clone from step 0"),
    ({"optim": "adafactor"}, "optim is that of the checkpoint"),
    ({"value_model": "tiny"}, "value_model is that of the checkpoint"),
    ({"model": "tiny"}, "leave model out"),
    ({"kl_coeff": 1}, "no setting 'kl_coeff'"),
    ({"specimen": "flu"}, "flu"),
    ({"out": "."}, "is the run itself"),
]


@pytest.mark.parametrize(("how", "line"), REFUSED)
def test_what_a_clone_cannot_be(how, line, parent, few_stories, tmp_path, monkeypatch):
    monkeypatch.chdir(parent.folder)
    before = contents(parent)
    with pytest.raises(ValueError, match=line) as error:
        lab.clone(parent, data=few_stories, **{"out": tmp_path / "new", **how})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists() and contents(parent) == before


def test_what_the_run_had_must_be_given_again(parent, few_stories, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(parent.folder, folder)
    run = Run.load(folder)
    run._write_config({**run._config_file.read(), "reward_funcs": ["short"]})
    with pytest.raises(ValueError, match="reward_funcs of yours: give them again"):
        lab.clone(run, out=tmp_path / "new")
    with pytest.raises(ValueError, match="learned from stories: not your data"):
        lab.clone(parent, data=[{"prompt": f"say {i}"} for i in range(20)], out=tmp_path / "new")
    with pytest.raises(ValueError, match="it learned from other rows than this stories has: among"):
        lab.clone(parent, data=replace(few_stories, prompts=Split()), out=tmp_path / "new")
    with pytest.raises(ValueError, match="cannot be cloned"):
        lab.clone(Run.create(tmp_path / "sft", stage="sft", model="mini", settings={}))


def test_on_the_command_line(parent, tmp_path, capsys):
    line = ["train", "ppo", "--clone", f"{parent.folder}@9", "--out", str(tmp_path / "new")]
    assert main.main(line) == 2
    assert "no checkpoint to go on from at step 9" in capsys.readouterr().err
    assert main.main([*line, "--resume"]) == 2 and main.main([*line, "--model", "small"]) == 2
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------ what a run says of its models


def short(run):
    """As a reward function has them."""


OTHERS = [
    ({"reward_model": "tiny"}, {}),
    ({"value_model": "tiny"}, {}),
    ({}, {"reward_funcs": short}),
]


@pytest.mark.parametrize(("models", "functions"), OTHERS)
def test_a_run_goes_on_with_its_own_models_and_functions(models, functions, parent, few_stories):
    """Neither another reward model nor another value model is taken silently."""
    name = next(iter({**models, **functions}))
    how = {"out": parent.folder, "resume": True, "quiet": True}
    with pytest.raises(ValueError, match=f"cannot resume .*: {name} was None there"):
        lab.train(plan(**models), few_stories, **functions, **how)


def test_a_bundled_model_is_recorded_wherever_the_lab_is(tmp_path, few_stories):
    stop = {"should_stop": lambda: True, "quiet": True}
    run = lab.train(plan(reward_model="tiny"), few_stories, out=tmp_path / "run", **stop)
    assert run.config["models"] == {"reward": "tiny/reward"}
    stopped = lab.clone(run, 0, data=few_stories, out=tmp_path / "clone", **stop)
    assert stopped.config["models"] == {"reward": "tiny/reward"}
    with pytest.raises(ValueError, match="reward_model was 'tiny/reward' there and is None now"):
        lab.train(plan(), few_stories, out=run.folder, resume=True, quiet=True)
