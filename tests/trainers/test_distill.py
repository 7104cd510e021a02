"""Distillation: TRL's trainer, our tokens and positions, a divergence computed by hand, its plan.

pytest tests/trainers/test_distill.py
"""

from __future__ import annotations

import pytest
import torch

import rlhf_lab as lab
from rlhf_lab.cli.main import main
from rlhf_lab.data.tokenize import encode_prompt
from rlhf_lab.metering.meter import Meter
from rlhf_lab.trainers.distill import DistillationConfig, distillation_trainer, way
from rlhf_lab.trainers.trl import Watch, trl_settings
from rlhf_lab.widgets.planner_link import fragment_of

PROMPTS = ["w1 w2 w3", "w4", "w5 w6", "w7 w8 w9 w1"]


class Lesson:
    """A trainer on tiny random models; what it logged, and what the student had sampled."""

    def __init__(self, tiny, folder, kind="llama", **settings):
        settings = {
            "per_device_train_batch_size": 4,
            "max_steps": 1,
            "logging_steps": 1,
            "response_length": 6,
            "save_strategy": "no",
            **settings,
        }
        self.args = DistillationConfig(**trl_settings(settings, str(folder)))
        self.tokenizer = tiny.tokenizer()
        self.student, self.teacher = tiny.lm(0, kind), tiny.lm(1, kind)
        self.logged, self.sampled, self.expected = [], [], 0.0
        self.meter = Meter("distill")
        log = lambda step, **metrics: self.logged.append(metrics)  # noqa: E731
        rows = [{"prompt": p} for p in PROMPTS]
        self.trainer = distillation_trainer(
            self.student,
            self.teacher,
            self.tokenizer,
            rows,
            self.args,
            [Watch(self.meter, "student", log)],
            self.watch,
        )

    def watch(self, step, rows, ids):
        self.sampled += zip([row["prompt"] for row in rows], ids, strict=True)
        self.expected = self.divergence()
        return {}

    @torch.no_grad()
    def divergence(self) -> float:
        """Mean over tokens, one row at a time, from the definitions."""
        beta, found = self.args.beta, []
        for prompt, ids in self.sampled:
            asked = encode_prompt(self.tokenizer, prompt)
            p, q = (
                torch.log_softmax(
                    m(torch.tensor([asked + ids])).logits[0, len(asked) - 1 : -1]
                    / self.args.temperature,
                    -1,
                )
                for m in (self.student, self.teacher)
            )
            if beta == 0:
                each = q.exp() * (q - p)
            elif beta == 1:
                each = p.exp() * (p - q)
            else:
                mixed = (beta * q.exp() + (1 - beta) * p.exp()).log()
                each = beta * q.exp() * (q - mixed) + (1 - beta) * p.exp() * (p - mixed)
            found += each.sum(-1).tolist()
        return sum(found) / len(found)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_loss_is_the_divergence_of_what_was_sampled(beta, kind, tiny, tmp_path):
    """With absolute positions too, and prompts of unlike lengths (rule 5)."""
    lesson = Lesson(tiny, tmp_path, kind, beta=beta, temperature=0.8)
    lesson.trainer.train()
    assert len(lesson.sampled) == 4 and lesson.expected > 0.01
    assert lesson.logged[0]["loss"] == pytest.approx(lesson.expected, rel=1e-4)


def test_it_learns_and_the_teacher_does_not(tiny, tmp_path):
    lesson = Lesson(tiny, tmp_path, max_steps=30, learning_rate=0.02)
    before = [p.clone() for p in lesson.teacher.parameters()]
    lesson.trainer.train()
    assert lesson.logged[-1]["loss"] < 0.5 * lesson.logged[0]["loss"]
    for old, new in zip(before, lesson.teacher.parameters(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("bf16", [False, True])
def test_mixed_precision_reaches_both_models(bf16, tiny, tmp_path):
    """TRL 1.16 alone trains in fp32 here, whatever bf16 says."""
    lesson, seen = Lesson(tiny, tmp_path, bf16=bf16), set()
    for model in (lesson.student, lesson.teacher):
        layer = model.base_model.layers[0].mlp
        layer.register_forward_hook(lambda _, __, out: seen.add(out.dtype))
    lesson.trainer.train()
    assert seen == {torch.bfloat16 if bf16 else torch.float32}


def test_its_phases_and_roles_are_measured(tiny, tmp_path):
    lesson = Lesson(tiny, tmp_path)
    lesson.trainer.train()
    flops = {(r.phase, r.role) for r in lesson.meter.ledger() if r.quantity == "flops"}
    student = {(phase, "student") for phase in ("rollout", "forward", "backward")}
    assert flops == student | {("teacher", "teacher")}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta": 0.5, "lora_r": 4},
        {"bf16": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8},
    ],
    ids=str,
)
def test_the_plan_is_what_the_real_code_takes(settings):
    """Of the x-ray: FLOPs to the last one, the peak within 2 %."""
    lengths = {"prompt_length": 24, "response_length": 40}
    plan = lab.plan("distill", "mini", **{"per_device_train_batch_size": 16, **lengths, **settings})
    seen = lab.xray(plan).ledger
    for phase in ("teacher", "forward", "backward"):
        want = {"phase": phase, "quantity": "flops"}
        assert plan.ledger.total(**want) == seen.total(**want) > 0, phase
    assert plan.peak == pytest.approx(seen.peak(), rel=0.02)


def test_a_teacher_costs_what_its_size_says():
    """`small` has twelve times mini's weights, and about as many FLOPs a token."""
    small, mini = (lab.plan("distill", "tiny", teacher_model=name) for name in ("small", "mini"))
    for plan in (small, mini):
        assert plan.ledger.total(quantity="bytes", role="teacher", phase="teacher") > 0
    want = {"phase": "teacher", "quantity": "flops"}
    assert small.ledger.total(**want) > 5 * mini.ledger.total(**want)
    assert small.estimate.steps == mini.estimate.steps == 40


def test_no_change_forgets_the_teacher():
    """Not a remedy, not the planner's link, not a handle that has one; 4 bits are the student's."""
    plan = lab.plan("distill", "mini", teacher_model="tiny", hardware="h100")
    weights = {
        "component": "parameters",
        "role": "teacher",
        "phase": "teacher",
        "quantity": "bytes",
    }
    held = plan.ledger.total(**weights)
    more = plan.estimate.changed(optim="adamw_bnb_8bit", lora_r=4, load_in_4bit=True)
    assert more.ledger.total(**weights) == held > 0
    again = lab.plan("distill", plan.model, hardware="h100")
    assert again.ledger.total(**weights) == held
    assert "teacher_model=" in fragment_of({"model": plan.model, "hardware": "h100"})
    assert "no teacher is named" in lab.plan("distill", "small").warnings[0]
    larger = {"prompt_length": 8, "response_length": 8, "per_device_train_batch_size": 1}
    pair = {"teacher_model": "Qwen/Qwen2.5-7B", "hardware": "h100", **larger}  # more embeddings
    assert lab.xray(lab.plan("distill", "Qwen/Qwen2.5-0.5B", **pair)).ledger.peak() > 0


# ------------------------------------------------------------------------------------ a whole run


@pytest.fixture(scope="module")
def run(few_stories, tmp_path_factory):
    plan = lab.plan("distill", "mini", max_steps=3, logging_steps=1, per_device_train_batch_size=8)
    return lab.train(plan, few_stories, out=tmp_path_factory.mktemp("run"), quiet=True)


def test_a_run_says_how_far_the_student_came(run):
    s = run.summary
    assert {"teacher/gold_reward", "before/gold_reward", "way_to_teacher"} <= s.keys()
    assert way(8.0, 9.2, 10.0) == pytest.approx(0.6)
    assert way(8.0, 8.5, 7.0) is None and way(8.19, 8.31, 8.191) is None  # noise over nothing
    assert [m["episodes"] for m in run.metrics] == [8, 16, 24]
    assert {"loss", "gold_reward", "entropy", "response_length"} <= run.metrics[-1].keys()
    assert {row["when"] for row in run.samples if "when" in row} == {"sft", "teacher", "distill"}


def test_others_tokens_are_refused(tiny, few_stories, tmp_path):
    folder = tmp_path / "other"
    tiny.lm(0).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    plan = lab.plan("distill", "mini", teacher_model=folder)
    with pytest.raises(ValueError, match="cannot teach mini: its tokens are others"):
        lab.train(plan, few_stories, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_what_is_asked_of_it_is_one_line(capsys, tmp_path):
    assert main(["train", "distill", "--model", "small", "--out", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err
    assert "distill needs a teacher for small: give --teacher-model" in line
    assert line.count("\n") == 1 and not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="sft has no teacher model: leave teacher_model out"):
        lab.plan("sft", "tiny", teacher_model="small")
    with pytest.raises(ValueError, match="beta must be from 0 to 1, got 2"):
        lab.plan("distill", "tiny", beta=2).config()
