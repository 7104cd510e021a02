"""The roof: plans, runs and the command line, each stage for two steps on the bundled model.

pytest tests/test_planning.py
"""

import json
import subprocess
import sys
import warnings
from functools import cache

import pytest

import rlhf_lab as lab
from rlhf_lab import pipeline, stages
from rlhf_lab.cli.main import main
from rlhf_lab.stages import TRAINABLE

STAGES = ("sft", "reward", "ppo", "dpo")
SHORT = {"max_steps": 2, "seed": 0}


@pytest.fixture(autouse=True, scope="module")
def data(few_stories):
    return few_stories


def train(stage, data, folder, **settings):
    return lab.train(lab.plan(stage, "tiny", **SHORT, **settings), data, out=folder, quiet=True)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """`trained(stage)`: a run of two steps, made once; nobody writes into it."""
    return cache(lambda stage: train(stage, data, tmp_path_factory.mktemp("runs") / stage))


# ------------------------------------------------------------------------------------------ plans


def test_a_plan_is_the_defaults_and_what_you_say():
    plan = lab.plan("dpo", "tiny", beta=0.3)
    assert plan.settings["beta"] == 0.3 and plan.settings["learning_rate"] > 0
    assert plan.config().beta == 0.3
    assert plan.lora == {}
    adapters = {"target_modules": "all-linear", "r": 8, "lora_alpha": 16}
    assert lab.plan("dpo", "tiny", lora_r=8).lora == adapters
    assert lab.plan("dpo", "tiny", lora_r=8, lora_alpha=4).lora == adapters | {"lora_alpha": 4}


def test_a_plan_of_a_file_on_the_command_line_is_that_of_the_data(tmp_path, capsys):
    rows = [{"question": "a b", "good": " c" * (9 + i), "bad": "d"} for i in range(20)]
    (file := tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fields = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    words = [x for ours, theirs in fields.items() for x in ("--field", f"{ours}={theirs}")]
    assert main(["plan", "dpo", "--data", str(file), *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    plan = lab.plan("dpo", "tiny", data=lab.load_data(file, fields=fields))
    assert found["peak_bytes"] == plan.peak and found["steps"] == plan.estimate.steps
    assert plan.settings["rows"] < 20 and plan.peak != lab.plan("dpo", "tiny").peak


def test_a_bundled_model_is_known_by_its_folder():
    from rlhf_lab.models.load import small_models_folder

    handle = lab.load(small_models_folder() / "mini")
    assert handle.name == "mini" and handle.paths == lab.load("mini").paths


@pytest.mark.parametrize("stage", ["dpo", "ppo", "grpo"])
def test_a_plan_of_the_bundled_stories_is_the_same_with_and_without_the_data(stage):
    """The page said 38.3 s before the run and 37.5 s in it: scoring 32 rows was planned for 64."""
    stored, counted = (lab.plan(stage, "tiny", data=data).estimate for data in (None, "stories"))
    assert stored.seconds_of == counted.seconds_of and stored.peak == counted.peak


def test_a_plan_shows_the_models_of_its_other_roles():
    """By name where they are bundled: a page shows no folder of this machine."""
    distil = lab.plan("distill", "mini", teacher_model="small")
    draft = lab.plan("inference", "small", draft_model="mini", accepted=0.5)
    assert "teacher_model='small'" in repr(distil) and "teacher_model" in distil._repr_html_()
    assert "draft_model='mini'" in repr(draft) and "/" not in repr(draft)
    assert "_model=" not in repr(lab.plan("ppo", "tiny"))
    assert "reward_model='Qwen/" in repr(lab.plan("ppo", "tiny", reward_model="Qwen2.5-0.5B"))


def test_a_renamed_setting_of_the_libraries_does_not_warn_the_user():
    """TRL passes transformers a name that it has renamed: nothing that a user could change."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        lab.plan("reward", "tiny").config()
    assert not [w for w in seen if "deprecated" in str(w.message)]


@pytest.mark.parametrize(
    ("stage", "settings", "says"),
    [
        ("pop", {}, "stage='pop': did you mean 'ppo'"),
        ("ppo", {"kl_coeff": 1}, "did you mean 'kl_coef'"),
        ("sft", {"learning_rat": 1}, "did you mean 'learning_rate'"),
        ("ppo", {"num_mini_batches": 5}, "does not split"),
        ("ppo", {"temperature": 0.0}, "temperature"),
    ],
)
def test_a_wrong_plan_is_refused_in_one_line(stage, settings, says):
    with pytest.raises(ValueError, match=says) as error:
        lab.plan(stage, "tiny", **settings).config()
    assert "\n" not in str(error.value)


def test_an_unknown_model_is_refused_in_one_line():
    with pytest.raises(ValueError, match="no model 'tinny'") as error:
        lab.plan("sft", "tinny")
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("stage", TRAINABLE)
def test_a_stage_trains_and_its_run_reads_back(stage, trained):
    """Settings, metrics, measured ledger, samples and a model that plain transformers loads."""
    from transformers import AutoConfig

    run = lab.Run.load(trained(stage).folder)
    assert run.status == "finished" and run.stage == stage
    assert run.config["settings"]["max_steps"] == 2
    assert max(m["step"] for m in run.metrics) == 2, "the last step is logged, whichever it is"
    assert AutoConfig.from_pretrained(run.model_path).vocab_size == 1024
    rows = run.ledger.filter(source="measured", stage=stage)
    assert {r.quantity for r in rows} == {"seconds", "flops", "tokens", "bytes"}
    assert 0 < rows.total(quantity="seconds", phase="optimizer") < 60
    if stage != "reward":
        assert run.samples and 0 <= run.summary["gold_reward"] <= 10


def test_ppo_logs_what_it_must(trained):
    run = trained("ppo")
    names = set(run.metric_names)
    assert names >= {
        "reward",
        "gold_reward",
        "gold/mood",
        "kl",
        "kl_k2",
        "kl_k3",
        "entropy",
        "clipfrac",
        "vf_clipfrac",
        "explained_variance",
        "response_length",
    }
    assert abs(run.series("kl")[1][0]) < 1e-4, "before any update the policy is the reference"
    assert max(run.series("first_ratio_error")[1]) < 1e-5
    roles = {r.role for r in run.ledger.filter(quantity="seconds")}
    assert roles >= {"policy", "reference", "reward", "value"}


@pytest.mark.parametrize("stage", ["reward", "ppo", "grpo"])  # one that reads, two that write
def test_the_same_seed_gives_the_same_metrics(stage, data, trained, tmp_path):
    """Times and memory aside, two runs agree to the last digit."""
    one, two = trained(stage).metrics, train(stage, data, tmp_path / "again").metrics
    assert one and json.dumps(one) == json.dumps(two)


def test_stopping_keeps_what_there_is(data, tmp_path):
    run = lab.train(
        lab.plan("ppo", "tiny", max_steps=50),
        data,
        out=tmp_path / "r",
        quiet=True,
        should_stop=lambda: True,
    )
    assert run.status == "stopped" and len(run.metrics) == 1
    assert (run.model_path / "model.safetensors").is_file()


def test_a_run_is_not_overwritten_unasked(data, tmp_path):
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    with pytest.raises(OSError, match="r"):
        train("sft", data, folder)


@pytest.mark.parametrize("stage", ["ppo", "rloo", "grpo"])
def test_without_a_reward_model_it_says_what_to_do(stage, data, tmp_path):
    model = lab.load("tiny")
    model = type(model)("bare", {"base": model.paths["base"]})
    with pytest.raises(ValueError, match=f"{stage.upper()} needs a reward model"):
        lab.train(lab.plan(stage, model), data, out=tmp_path / "r")
    assert not (tmp_path / "r").exists()


# ----------------------------------------------------------------------------------- command line


def test_all_four_stages_from_one_command(tmp_path, capsys):
    out = tmp_path / "all"
    assert main(["train", "all", "--steps", "2", "--out", str(out), "--quiet"]) == 0
    table = capsys.readouterr().out
    assert all(stage in table for stage in STAGES) and "of at most" in table
    page = (out / "report.html").read_text()
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "")


def test_somebodys_own_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "_simulate", lambda *_: None)  # as in the test above
    rows = [
        {
            "instruction": f"Name number {i}.",
            "input": "",
            "output": f"It is {i}.",
            "chosen": f"It is {i}.",
            "rejected": f"Leave me alone, {i}.",
        }
        for i in range(60)
    ]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    args = ["train", "all", "--data", str(tmp_path / "mine.json"), "--steps", "2", "--quiet"]
    assert main([*args, "--out", str(tmp_path / "all")]) == 0
    printed = capsys.readouterr().out
    assert "60 rows" in printed and "gold" not in printed.lower().replace("gold reward", "")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--model", "nope"], "no model 'nope'"),
        (["--data", "nope.json"], "no data file"),
        (["--set", "beta"], "NAME=VALUE"),
        (["--set", "betta=1"], "did you mean 'beta'"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(args, says, tmp_path, capsys):
    code = main(["train", "dpo", "--out", str(tmp_path / "r"), *args])
    printed = capsys.readouterr().err
    assert code == 2 and says in printed and printed.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_stages_are_listed(capsys):
    assert main(["list", "stages"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines] == list(stages.STAGES)
    assert "student, teacher" in next(line for line in lines if line.startswith("distill"))


def test_lengths_that_packing_made_are_not_called_yours():
    own = {"prompt_length": 20, "response_length": 40, "rows": 100, "max_length": 128}
    for packing, source in ((False, "yours"), (True, "packed, yours")):
        found = lab.plan("sft", "tiny", packing=packing, **own).assumptions
        assert next(a for a in found if a.what == "lengths").source == source


def test_help_reads_well():
    out = subprocess.run(
        [sys.executable, "-m", "rlhf_lab", "train", "--help"], capture_output=True, text=True
    )
    assert out.returncode == 0 and "examples:" in out.stdout and "--reward-model" in out.stdout
