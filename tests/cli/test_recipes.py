"""The 7B recipes: read by us and by TRL, accepted by --dry-run, their data mapped by name.

pytest tests/cli/test_recipes.py
"""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from peft import LoraConfig

import rlhf_lab as lab
from rlhf_lab.cli.config_files import as_flags
from rlhf_lab.cli.main import main
from rlhf_lab.data.load import from_rows
from rlhf_lab.stages import ONLINE, STAGES, TRAINABLE, resolve

ROOT = Path(__file__).parents[2]
RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.yaml"))}
KINDS = ("full", "lora", "qlora")
TRAINED = [stage for stage in TRAINABLE if stage != "distill"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the reward recipes have run, as far as a plan can see."""
    folder = tmp_path_factory.mktemp("seven")
    model = yaml.safe_load(RECIPES["reward-full"].read_text())["model_name_or_path"]
    for kind in KINDS:
        run = folder / "runs" / f"reward-{kind}"
        lab.load(model).config.save_pretrained(run / "model")
        if kind != "full":
            LoraConfig(task_type="SEQ_CLS", r=16).save_pretrained(run / "adapter")
    return folder


def test_every_stage_has_its_recipes():
    """Distillation has none: its teacher is somebody's choice."""
    assert set(RECIPES) == {f"{stage}-{kind}" for stage in TRAINED for kind in KINDS}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_accepted_as_it_is_written(name, place, tmp_path, monkeypatch, capsys):
    """The command in its second line, looked at: accelerate takes what would be started."""
    file, (stage, kind) = RECIPES[name], name.split("-")
    command = shlex.split(file.read_text().splitlines()[1].removeprefix("# rlhf-lab "))
    assert command[:4] == ["train", stage, "--config", f"recipes/{name}.yaml"]
    monkeypatch.chdir(place if stage in ONLINE else tmp_path)
    line = ["train", stage, "--config", str(file), *command[4:], "--hardware", "h100", "--dry-run"]
    code = main(line)
    out, error = capsys.readouterr()
    assert code == 0, error
    started, _, head, *config = out.splitlines()
    args = launch_command_parser().parse_args(shlex.split(started)[3:])
    given = yaml.safe_load(file.read_text())
    assert args.num_processes == given["num_processes"] == (8 if kind == "full" else 1)
    made = yaml.safe_load("\n".join(config))
    assert made["distributed_type"] == ("FSDP" if kind == "full" else "NO")
    assert made["mixed_precision"] == "bf16"
    words = args.training_script_args
    assert words[0] == "train" and stage in words
    assert not {"--config", "--accelerate", "--processes"} & set(words)  # it would launch again
    assert words[words.index("--data") + 1] == given["dataset_name"]
    assert ("--reward-model" in words) == (stage in ONLINE)
    assert f"learning_rate={given['learning_rate']!r}" in words and head == "# accelerate.yaml"


@pytest.mark.parametrize("name", [n for n in RECIPES if not n.startswith("ppo")])
def test_trl_reads_a_recipe(name):
    """Its own parser leaves nothing over but what its launcher takes first."""
    import importlib

    from trl import ModelConfig, ScriptArguments, TrlParser

    stage = name.split("-")[0]
    script = ScriptArguments
    if stage in ONLINE:
        module = importlib.import_module(f"trl.scripts.{stage}")
        script = getattr(module, f"{stage.upper()}ScriptArguments")
    parser = TrlParser((script, resolve(STAGES[stage].config), ModelConfig))
    *parsed, rest = parser.parse_args_and_config(
        ["--config", str(RECIPES[name]), "--use_cpu", "--bf16", "False", "--output_dir", "x"],
        return_remaining_strings=True,
    )
    given = yaml.safe_load(RECIPES[name].read_text())
    assert rest[::2] == ["--accelerate_config", "--num_processes"]
    data, settings, model = parsed
    assert data.dataset_name == given["dataset_name"]
    assert (model.use_peft, model.load_in_4bit) == ("lora" in name, "qlora" in name)
    assert settings.learning_rate == given["learning_rate"]


def test_figures_are_the_planners():
    """`python .ci/recipes.py` mends what this finds."""
    script = ROOT / ".ci" / "recipes.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def said(role, text):
    return {"role": role, "content": text}


def pair(i, **more):
    """A row of a pair as messages."""
    asked = f"Question {i}?"
    answers = {
        kind: [said("user", asked), said("assistant", f"{kind} {i}")]
        for kind in ("chosen", "rejected")
    }
    return {"prompt": asked, **answers, **more}


ROWS = {
    "HuggingFaceH4/ultrafeedback_binarized": lambda i: {
        **pair(i, prompt_id=f"{i:x}", score_chosen=8.0, score_rejected=6.5),
        "messages": pair(i)["chosen"],
    },
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": lambda i: pair(i, id=f"a_{i}", source="mix"),
    "allenai/tulu-3-sft-mixture": lambda i: {
        "id": f"a_{i}",
        "messages": [said("user", f"Question {i}?"), said("assistant", f"chosen {i}")],
        "source": "mix",
    },
    "trl-lib/tldr": lambda i: {
        "prompt": f"POST: Question {i}?\n\nTL;DR:",
        "completion": f" chosen {i}",
    },
    "Anthropic/hh-rlhf": lambda i: {
        kind: "\n\nHuman: Hello.\n\nAssistant: Hello!"
        f"\n\nHuman: Question {i}?\n\nAssistant: {kind} {i}"
        for kind in ("chosen", "rejected")
    },
}
"""One row of each data set in the columns that its card shows."""


@pytest.mark.parametrize("stage", TRAINED)
def test_the_recipes_data_are_mapped_by_name(stage):
    """What a stage learns from is there, every answer in its place."""
    name = yaml.safe_load(RECIPES[f"{stage}-full"].read_text())["dataset_name"]
    data = from_rows([ROWS[name](i) for i in range(40)], name)
    rows = getattr(data, STAGES[stage].rows).train
    assert len(rows) >= 20
    for row in rows:
        asked = str(row["prompt"])
        number = asked.split("Question ")[1].split("?")[0]
        for column in STAGES[stage].columns or ():
            if column in ("chosen", "rejected"):
                assert f"{column} {number}" in str(row[column])
            elif column == "completion":
                good = row.get("label", True)
                assert f"{'chosen' if good else 'rejected'} {number}" in str(row[column])
        assert "chosen" not in asked and "rejected" not in asked
    if name == "Anthropic/hh-rlhf":
        assert "Hello!" in str(rows[0]["prompt"])  # the earlier turn


def test_a_file_that_train_cannot_follow_is_refused(tmp_path):
    file = tmp_path / "x.yaml"
    for text, says in [
        ("model_name_or_path: tiny\nbeta: 0.1\nnonsense: 3", "has no setting 'nonsense'"),
        ("streaming: true\nmodel_name_or_path: tiny", "train does not know streaming"),
        ('# rlhf-lab: {"stage": "sft"}\nmodel_name_or_path: tiny', "is for sft, not dpo"),
        ("distributed_type: 'NO'\nnum_processes: 1", "is accelerate's, to plan only"),
    ]:
        file.write_text(text)
        with pytest.raises(ValueError, match=says):
            as_flags(file, "dpo")


def test_flags_win_over_the_file_and_sharding_is_a_config(tmp_path):
    plan = lab.plan(
        "dpo", "tiny", hardware="h100", gpus=4, sharding="zero3", offload="all", beta=0.3
    )
    file = tmp_path / "x.yaml"
    file.write_text(plan.trl_config() + "dataset_train_split: t\nmax_steps: 7\n")
    flags = as_flags(file, "dpo")
    assert flags[flags.index("--accelerate") + 1] == "zero3-offload"
    assert flags[flags.index("--processes") + 1] == "4" and "beta=0.3" in flags
    assert not any(word.startswith(("gpus", "sharding", "offload")) for word in flags)
