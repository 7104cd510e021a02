"""`report_to` through transformers' own callbacks: what TensorBoard is handed while PPO trains."""

import json
import sys
import types

import pytest
from transformers.integrations import integration_utils

import rlhf_lab as lab


class Writer:
    """SummaryWriter's three methods, taken down."""

    made: list = []

    def __init__(self, log_dir):
        self.log_dir, self.scalars, self.texts, self.closed = log_dir, {}, {}, False
        Writer.made.append(self)

    def add_text(self, name, text, step=None):
        self.texts[name] = text

    def add_scalar(self, name, value, step):
        self.scalars.setdefault(name, []).append((step, value))

    def flush(self): ...

    def close(self):
        self.closed = True


@pytest.fixture
def board(monkeypatch):
    """TensorBoard as far as transformers sees it."""
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setattr(Writer, "made", [])
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)


def test_every_metric_of_every_iteration_is_reported(make, board):
    trainer = make(report_to="tensorboard")
    history = trainer.train().log_history
    (writer,) = Writer.made
    assert writer.closed and writer.log_dir.startswith(trainer.args.output_dir)
    for name in ("kl", "score", "pg_loss", "learning_rate"):
        assert writer.scalars[f"train/{name}"] == [(h["step"], h[name]) for h in history]
    assert json.loads(writer.texts["args"])["kl_coef"] == trainer.args.kl_coef
    assert json.loads(writer.texts["model_config"])["model_type"] == "llama"


@pytest.mark.parametrize(
    "name, says",
    [
        ("tensorboard", "report_to='tensorboard' is not installed: pip install tensorboard"),
        ("tensorbord", "did you mean 'tensorboard'?"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused_before_anything_is_written(
    name, says, tmp_path, monkeypatch
):
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: False)
    with pytest.raises(ValueError) as error:
        lab.train(lab.plan("ppo", report_to=name), out=tmp_path / "run")
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_held_out_prompts_are_reported_apart(make, board):
    rows = [{"prompt": [4, 5, 6]}]
    settings = {"eval_strategy": "steps", "eval_steps": 2, "report_to": "tensorboard"}
    history = make(extra={"eval_dataset": rows}, **settings).train().log_history
    (writer,) = Writer.made
    logged = [(h["step"], h["eval_reward"]) for h in history if "eval_reward" in h]
    assert writer.scalars["eval/reward"] == logged != []


def test_nothing_is_reported_unasked(make, board):
    make().train()
    assert not Writer.made
