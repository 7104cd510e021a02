"""An optimizer that trains beside the average which is the model, as schedule-free ones do."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer

import rlhf_lab as lab


class Averaging(torch.optim.SGD):
    """Polyak's mean of the weights behind each step, which `eval` puts into the model."""

    def __init__(self, parameters, **settings):
        super().__init__(parameters, **settings)
        self.behind_steps = []
        type(self).made = self

    def weights(self):
        return [p for group in self.param_groups for p in group["params"]]

    def step(self, closure=None):
        super().step(closure)
        self.behind_steps.append([p.detach().clone() for p in self.weights()])

    def mean(self):
        return [torch.stack(each).mean(0) for each in zip(*self.behind_steps, strict=True)]

    @torch.no_grad()
    def show(self, values):
        for p, value in zip(self.weights(), values, strict=True):
            p.copy_(value)

    def eval(self):
        self.show(self.mean())

    def train(self):
        if self.behind_steps:
            self.show(self.behind_steps[-1])


def sums(values):
    return sorted(float(value.detach().double().sum()) for value in values)


def test_the_model_that_is_saved_is_the_one_that_is_evaluated(tmp_path, monkeypatch):
    def choose(args, model=None):
        return Averaging, {"lr": args.learning_rate}

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(choose))
    data = lab.load_data("stories").first(4, test=2)
    plan = lab.plan(
        "sft", lab.load("tiny"), max_steps=3, per_device_train_batch_size=2, learning_rate=0.5
    )
    run = lab.train(plan, data, out=tmp_path / "run", quiet=True)
    stored = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    mean, last = sums(Averaging.made.mean()), sums(Averaging.made.behind_steps[-1])
    assert len(Averaging.made.behind_steps) == 3
    assert mean != pytest.approx(last, abs=1e-2)
    assert sums(stored.parameters()) == pytest.approx(mean, abs=1e-3)
