"""TRL's stages go on from a checkpoint to the curves and weights that they would have had.

pytest tests/trainers/test_resume.py            # random SIGKILLs: benchmarks/resume.py
"""

import shutil

import pytest

import rlhf_lab as lab
from rlhf_lab.runs.run import WHOLE, Run
from rlhf_lab.trainers import job as jobs
from rlhf_lab.trainers.checkpoint import Checkpoints, steps_of_a_generation

OWN = {
    "grpo": {"response_length": 8, "num_generations": 2},
    "reward": {"train_sampling_strategy": "group_by_length"},
    "dpo": {
        "train_sampling_strategy": "group_by_length",
        "sync_ref_model": True,
        "ref_model_sync_steps": 4,
        "learning_rate": 1e-3,
    },
}
COMPARED = ("metrics.jsonl", "samples.jsonl", "evaluation.jsonl", "model/model.safetensors")
MOMENTS = ("in step 7", "while it writes a checkpoint", "when training is over")


def plan(stage, **more):
    settings = {"per_device_train_batch_size": 4, "save_steps": 2, "logging_steps": 3}
    settings |= OWN.get(stage, {})
    return lab.plan(stage, "mini", seed=0, max_steps=10, **{**settings, **more})


@pytest.fixture(scope="module")
def trained(few_stories, tmp_path_factory):
    """`trained(stage)`: a run that nobody disturbed, and copies of its folder at some moments: what
    a process that is killed there leaves behind."""
    done = {}

    def train(stage):
        if stage in done:
            return done[stage]
        root = tmp_path_factory.mktemp(stage)
        with pytest.MonkeyPatch.context() as patch:

            def snapshot(owner, name, moment, when=lambda *_: True):
                original = getattr(owner, name)

                def first_a_copy(*args, **kwargs):
                    if when(*args) and not (root / moment).exists():
                        shutil.copytree(root / "whole", root / moment)
                    return original(*args, **kwargs)

                patch.setattr(owner, name, first_a_copy)

            at = lambda step: lambda _, args, state, *more: state.global_step == step  # noqa: E731
            snapshot(Checkpoints, "on_step_end", MOMENTS[0], at(7))
            snapshot(Checkpoints, "on_save", MOMENTS[1], at(8))
            snapshot(jobs.Job, "whole", MOMENTS[2])
            whole = lab.train(plan(stage), few_stories, out=root / "whole", quiet=True)
        done[stage] = root, whole
        return done[stage]

    return train


CASES = [*(("sft", moment) for moment in MOMENTS)]
CASES += [("reward", MOMENTS[0]), ("grpo", MOMENTS[1]), ("dpo", MOMENTS[0])]


@pytest.mark.parametrize(("stage", "moment"), CASES)
def test_killed_and_resumed(stage, moment, trained, few_stories, tmp_path):
    root, whole = trained(stage)
    killed = Run.load(shutil.copytree(root / moment, tmp_path / "run"))
    assert killed.status == "interrupted" and 0 < killed.last_step <= 10
    if moment == MOMENTS[1]:  # it is there, and does not count
        assert (killed.folder / "trainer" / "checkpoint-8").is_dir()
    step = {"grpo": 4, "sft": 6, "reward": 6, "dpo": 6}[stage] if moment != MOMENTS[2] else 8
    assert killed.checkpoints[0].name == f"checkpoint-{step}"
    run = lab.train(plan(stage), few_stories, out=killed.folder, quiet=True, resume=True)
    for name in COMPARED:
        assert (run.folder / name).exists() == (whole.folder / name).exists()
        if (whole.folder / name).exists():
            assert (run.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
    assert len(run.metrics) > 4 and run.status == "finished"
    assert not (run.folder / "trainer").exists()
    passes = {r.phase: r.value for r in whole.ledger.filter(source="measured", quantity="tokens")}
    again = {r.phase: r.value for r in run.ledger.filter(source="measured", quantity="tokens")}
    assert again == passes  # of the whole training, not of its last part


def test_a_line_of_metrics_ends_at_each_checkpoint(trained):
    _, whole = trained("sft")
    assert whole.series("loss")[0] == [1, 2, 3, 4, 6, 8, 9, 10]  # 1: the lab logs the first step


def test_before_the_first_checkpoint_a_run_begins_anew(trained, few_stories, tmp_path):
    root, whole = trained("sft")
    shutil.copytree(root / MOMENTS[0], out := tmp_path / "run")
    for path in out.glob(f"trainer/checkpoint-*/{WHOLE}"):
        path.unlink()
    assert "start again" in Run.load(out).what_is_left()
    run = lab.train(plan("sft"), few_stories, out=out, quiet=True, resume=True)
    assert (out / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()
    assert len(run.evaluation) == len(whole.evaluation)


def test_stopped_and_resumed(few_stories, tmp_path):
    """A stop makes a checkpoint of its own."""
    out, steps = tmp_path / "run", []
    stop = lambda: steps.append(1) or len(steps) >= 3  # noqa: E731
    much = {"save_steps": 500}
    stopped = lab.train(plan("sft", **much), few_stories, out=out, quiet=True, should_stop=stop)
    assert stopped.status == "stopped" and stopped.checkpoints[0].name == "checkpoint-3"
    run = lab.train(plan("sft", **much), few_stories, out=out, quiet=True, resume=True)
    assert run.status == "finished" and run.series("loss")[0] == [1, 3, 6, 9, 10]


@pytest.mark.parametrize(("settings", "steps"), [({}, 4), ({"gradient_accumulation_steps": 2}, 2)])
def test_checkpoints_of_online_stages_lie_between_generations(settings, steps):
    assert steps_of_a_generation(plan("grpo", **settings).config()) == steps
    assert steps_of_a_generation(plan("dpo", **settings).config()) == 1
