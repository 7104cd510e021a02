"""Names of methods that the lab calls otherwise, or has not.

pytest tests/test_method_names.py
"""

import re

import pytest

import rlhf_lab as lab
from rlhf_lab.display import METHODS, did_you_mean
from rlhf_lab.settings import WORDS, config_fields
from rlhf_lab.stages import STAGES


def test_what_is_named_is_there():
    """Each hint names a stage, and settings with values that the stage's trainer takes."""
    for name, hint in METHODS.items():
        stages = [word for word in re.findall("[a-z]+", hint) if word in STAGES]
        assert stages, name
        for setting, value in re.findall(r"(\w+)='(\w+)'", hint):
            assert setting in config_fields(stages[0])
            assert value in WORDS.get(f"{stages[0]}.{setting}", WORDS.get(setting, ())) or (
                lab.plan(stages[0], **{setting: value}).settings[setting] == value
            )
    assert not METHODS.keys() & STAGES.keys()


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("gspo", "^stage='gspo': GSPO is importance_sampling_level='sequence' of grpo; choose"),
        ("Dr. GRPO", "Dr. GRPO is loss_type='dr_grpo' of grpo; choose from sft, "),
        ("orpo", "the lab has no ORPO; dpo after sft is what is nearest; choose"),
        ("grpoo", "did you mean 'grpo'"),
    ],
)
def test_a_stage_by_a_methods_name(name, line):
    with pytest.raises(ValueError, match=line):
        lab.plan(name)


def test_a_loss_by_a_methods_name():
    assert "ipo" in did_you_mean("simpo", WORDS["dpo.loss_type"])  # by spelling alone
    with pytest.raises(ValueError, match="^loss_type='simpo': the lab has no SimPO; .*sigmoid"):
        lab.plan("dpo", loss_type="simpo")
    with pytest.raises(ValueError, match="^loss_type='gspo': GSPO is importance_sampling_level="):
        lab.plan("grpo", loss_type="gspo")


def test_on_the_command_line(capsys):
    from rlhf_lab.cli.main import main

    with pytest.raises(SystemExit):
        main(["plan", "simpo"])
    assert "the lab has no SimPO; dpo is what is nearest" in capsys.readouterr().err
