"""The one list of stages: every part of every stage is there, every dotted path leads somewhere.

pytest tests/test_stages.py
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

import rlhf_lab as lab
from rlhf_lab import settings
from rlhf_lab.runs.ledger import PHASES, ROLES
from rlhf_lab.stages import ONLINE, STAGES, TRAINABLE, XRAYED, resolve

ROOT = Path(__file__).resolve().parents[1]
PATHS = [
    (name, part, getattr(spec, part))
    for name, spec in STAGES.items()
    for part in ("config", "train", "trainer", "tokenize", "estimate")
    if getattr(spec, part)
]


@pytest.mark.parametrize(("stage", "part", "path"), PATHS, ids=lambda v: str(v))
def test_every_dotted_path_leads_to_something_that_can_be_called(stage, part, path):
    assert callable(resolve(path)), f"{stage}.{part}"


@pytest.mark.parametrize("stage", TRAINABLE)
def test_a_stage_that_trains_has_all_of_its_parts(stage):
    spec = STAGES[stage]
    lacking = [
        p for p in ("config", "train", "tokenize", "charts", "defaults") if not getattr(spec, p)
    ]
    assert not lacking
    assert spec.loss_unit or spec.online
    assert spec.trainer or stage == "ppo"  # what is over TRL says which trainer
    assert spec.library_defaults["epochs"] > 0
    assert set(spec.phases) <= set(PHASES) and set(spec.roles) <= set(ROLES)


@pytest.mark.parametrize("stage", TRAINABLE)
def test_the_labs_settings_are_settings_of_its_trainer(stage):
    fields = {f.name for f in dataclasses.fields(resolve(STAGES[stage].config))}
    assert STAGES[stage].defaults.keys() <= fields
    assert lab.plan(stage, "tiny").trainer_settings == dict(STAGES[stage].defaults)


@pytest.mark.parametrize("stage", TRAINABLE)
def test_what_a_plan_takes_for_the_trainers_defaults_is_what_they_are(stage):
    names = {"epochs": "num_train_epochs", "samples_per_prompt": "num_generations", "beta": "beta"}
    fields = {f.name: f.default for f in dataclasses.fields(resolve(STAGES[stage].config))}
    wanted = STAGES[stage].library_defaults
    assert {k: fields[names[k]] for k in wanted} == dict(wanted)


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_planned_has_the_phases_and_roles_of_the_list(stage):
    ledger = lab.plan(stage, "tiny", hardware="h100").ledger
    assert {r.phase for r in ledger.filter(quantity="seconds")} <= set(STAGES[stage].phases)
    assert {r.role for r in ledger if r.role} <= set(STAGES[stage].roles)
    assert next(iter(STAGES[stage].roles)) in {r.role for r in ledger}


def test_the_lists_by_hand():
    assert ONLINE == tuple(s for s in TRAINABLE if STAGES[s].rows == "prompts")
    assert set(XRAYED) < set(TRAINABLE) == set(STAGES) - {"inference"}


def test_the_table_of_settings_is_that_of_the_installed_libraries():
    script = ROOT / ".ci" / "settings.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(json.loads((ROOT / "rlhf_lab" / "settings.json").read_text())) == {
        *("versions", "choices", "common", "model"),
        *TRAINABLE,
    }


def test_other_versions_are_asked_themselves(monkeypatch):
    table = settings.config_fields("dpo")
    monkeypatch.setattr(settings, "version", lambda name: "0.1")
    assert settings.config_fields("dpo").keys() == table.keys()


def test_the_list_is_plain_data():
    """It imports nothing of the package and nothing heavy: typos are refused at once."""
    code = "import sys, rlhf_lab.stages; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {m for m in loaded if m.startswith("rlhf_lab")} == {"rlhf_lab", "rlhf_lab.stages"}
    assert not loaded & {"torch", "transformers", "trl", "numpy", "pandas"}


def test_a_mistyped_setting_is_refused_without_importing_the_trainers():
    code = (
        "import sys, rlhf_lab as lab\n"
        "try: lab.train(lab.plan('dpo', 'tiny', learning_rat=1))\n"
        "except ValueError as error: print(error)\n"
        "print('trl' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    line, heavy = done.stdout.splitlines()
    assert line == "DPOConfig has no setting 'learning_rat'; did you mean 'learning_rate'?"
    assert heavy == "False False"
