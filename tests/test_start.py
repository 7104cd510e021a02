"""What a process imports before it does what it was asked: nothing that it does not need.

pytest tests/test_start.py
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from templates import chat_tokenizer
from transformers import Trainer

import rlhf_lab as lab
from rlhf_lab.data.chat import _ids
from rlhf_lab.models.compiled_later import compiled_later

DASHBOARD = """
import rlhf_lab as lab, rlhf_lab.training
from rlhf_lab.widgets.dashboard import Dashboard
Dashboard("ppo", "tiny")
"""
PPO = """
import rlhf_lab as lab
from rlhf_lab.launch.launcher import prepare_process
lab.plan("ppo").config()
import rlhf_lab.trainers.ppo
prepare_process()
"""
HEAVY = {
    DASHBOARD: {"torch", "transformers", "trl", "plotly", "pandas", "numpy"},
    PPO: {"trl", "datasets", "pandas", "transformers.trainer", "torch._inductor.compile_fx"},
}


@pytest.mark.parametrize("code", HEAVY, ids=["the dashboard", "PPO"])
def test_what_is_imported_before_training(code, tmp_path):
    """A notebook shows the dashboard first of all; and PPO needs no TRL, nor what TRL needs."""
    code += f"import sys\nprint(sorted({HEAVY[code]} & set(sys.modules)))"
    run = {"capture_output": True, "text": True, "cwd": tmp_path}
    done = subprocess.run([sys.executable, "-c", code], **run)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_a_function_is_compiled_when_it_is_called(monkeypatch):
    """bitsandbytes compiles as it is imported; what a call gives is what it gives otherwise."""
    compiled = []

    def compile_now(model, **how):
        compiled.append(how)
        return lambda x: ("compiled", model(x))

    monkeypatch.setattr(torch, "compile", compile_now)
    with compiled_later():
        double = torch.compile(lambda x: 2 * x, dynamic=False)
        assert not compiled
        torch.compile(torch.nn.Identity())
        assert compiled == [{}], "a module is compiled at once"
    assert torch.compile is compile_now
    assert double(3) == double(3) == ("compiled", 6)
    assert compiled == [{}, {"dynamic": False}], "once, not at every call"


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
def test_the_optimizer_is_that_of_every_trainer(optim, tmp_path):
    args = lab.PPOConfig(str(tmp_path), optim=optim, adam_beta1=0.8, learning_rate=1e-4)
    assert args.optimizer() == Trainer.get_optimizer_cls_and_kwargs(args)


def test_ids_are_those_of_a_call():
    """Whatever an earlier call left in the library below, or a class does with its texts."""
    tokenizer = chat_tokenizer("", begins=True)
    text = "Who?</s> Nobody."
    for special in (True, False):
        whole = tokenizer(text, add_special_tokens=special).input_ids
        assert _ids(tokenizer, text, special) == whole
        cut = tokenizer(text, truncation=True, max_length=3, padding="max_length").input_ids
        assert len(cut) == 3 and tokenizer._tokenizer.truncation
        assert _ids(tokenizer, text, special) == whole
    tokenizer.split_special_tokens = True
    assert _ids(tokenizer, text, False) == tokenizer(text, add_special_tokens=False).input_ids
    assert len(_ids(tokenizer, text, False)) > len(whole)

    class Shouts(type(tokenizer)):
        def __call__(self, text, **how):
            return super().__call__(text.upper(), **how)

    tokenizer.__class__ = Shouts
    assert (
        _ids(tokenizer, "a", False)
        == tokenizer._tokenizer.encode("A", add_special_tokens=False).ids
    )
