"""Distillation: TRL's trainer, our tokens and positions, a divergence computed by hand, its plan.

pytest tests/trainers/test_distill.py
"""

from __future__ import annotations

import math
import random

import pytest
import torch

import rlhf_lab as lab
from rlhf_lab.cli.main import main
from rlhf_lab.data.tokenize import encode_prompt
from rlhf_lab.metering.meter import Meter
from rlhf_lab.ppo.logprobs import logprobs_and_entropy
from rlhf_lab.runs.json_files import read_lines
from rlhf_lab.trainers import distill
from rlhf_lab.trainers.distill import (
    DistillationConfig,
    distillation_trainer,
    sparse_divergence,
    way,
)
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
        self.answers = answers(self.args) if self.args.distill_from != "student" else None
        self.trainer = distillation_trainer(
            self.student,
            None if self.answers else self.teacher,
            self.tokenizer,
            rows,
            self.args,
            [Watch(self.meter, log)],
            self.watch,
            self.answers,
        )

    def watch(self, step, rows, ids):
        self.sampled += zip([row["prompt"] for row in rows], ids, strict=True)
        self.expected = self.divergence()
        return {}

    @torch.no_grad()
    def divergence(self) -> float:
        """Mean over tokens, one row at a time, from the definitions."""
        if self.answers:
            return self.divergence_from_answers()
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

    def divergence_from_answers(self) -> float:
        """Sums over classes: the teacher's tokens, and all others as one."""
        found = []
        for prompt, answer in zip(PROMPTS, self.answers, strict=True):
            asked = encode_prompt(self.tokenizer, prompt)
            logits = self.student(torch.tensor([asked + answer["ids"]])).logits[0]
            p = torch.softmax(logits[len(asked) - 1 : -1] / self.args.temperature, -1).tolist()
            tops = zip(p, answer["top_ids"], answer["top_logprobs"], strict=True)
            for mine, tokens, theirs in tops:
                classes = [(math.exp(q), mine[token]) for token, q in zip(tokens, theirs)]
                rest = [1 - sum(column) for column in zip(*classes)]
                classes += [tuple(rest)] if rest[0] > 1e-9 else []
                found.append(sum(q * math.log(q / p) for q, p in classes))
        return sum(found) / len(found)


def answers(args):
    """What a teacher could have answered to PROMPTS, in answers of unlike lengths."""
    draw, ways = random.Random(0), args.distill_from == "logits"
    found = []
    for length in (5, 2, 6, 1):
        ids = [draw.randrange(4, 12) for _ in range(length)]
        tops = [draw.sample(range(12), 3) if ways else [token] for token in ids]
        logs = [[math.log(draw.uniform(0.05, 0.3)) if ways else 0.0 for _ in top] for top in tops]
        found.append({"ids": ids, "top_ids": tops, "top_logprobs": logs})
    return found


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_loss_is_the_divergence_of_what_was_sampled(beta, kind, tiny, tmp_path):
    """With absolute positions too, and prompts of unlike lengths (rule 5)."""
    lesson = Lesson(tiny, tmp_path, kind, beta=beta, temperature=0.8)
    lesson.trainer.train()
    assert len(lesson.sampled) == 4 and lesson.expected > 0.01
    assert lesson.logged[0]["loss"] == pytest.approx(lesson.expected, rel=1e-4)


@pytest.mark.parametrize("answers_of", ["samples", "logits"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_loss_on_answers_is_theirs_by_hand(answers_of, kind, tiny, tmp_path):
    """Two passes a step too: every token counts once, whatever the lengths of their pass."""
    half = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    lesson = Lesson(tiny, tmp_path, kind, distill_from=answers_of, temperature=0.8, **half)
    lesson.trainer.train()
    assert len(lesson.sampled) == 4 and lesson.expected > 0.01
    assert lesson.logged[0]["loss"] == pytest.approx(lesson.expected, rel=1e-4)


def test_the_divergence_of_the_likeliest_tokens():
    """All tokens: KL(teacher, student) itself; few: less, never below 0; one that is certain:
    cross-entropy. Gradients against PyTorch's own."""
    draw = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(7, 11, generator=draw) for _ in "ab")
    q, p = torch.log_softmax(teacher, -1), torch.log_softmax(logits, -1)
    whole = torch.nn.functional.kl_div(p, q, reduction="none", log_target=True).sum(-1)
    for k in (1, 3, 11):
        log_q, ids = q.topk(k)
        given = logits.clone().requires_grad_()
        logprobs, _ = logprobs_and_entropy(given * 1, ids, 1.0)
        found = sparse_divergence(logprobs, log_q)
        again = logits.clone().requires_grad_()
        plain = sparse_divergence(torch.log_softmax(again, -1).gather(-1, ids), log_q)
        found.sum().backward(), plain.sum().backward()
        assert torch.allclose(found, plain, atol=1e-6)
        assert torch.allclose(given.grad, again.grad, atol=1e-6)
        assert (found >= -1e-6).all() and (found <= whole + 1e-5).all()
    assert torch.allclose(found, whole, atol=1e-5)
    token = ids[:, :1]
    sure = sparse_divergence(p.gather(-1, token), torch.zeros(7, 1))
    assert torch.allclose(sure, -p.gather(-1, token)[:, 0])


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


@pytest.mark.parametrize(
    "more",
    [
        {"distill_from": "samples"},
        {"distill_from": "logits", "gradient_accumulation_steps": 2},
        {"distill_from": "logits", "lora_r": 4},
    ],
    ids=str,
)
def test_a_student_alone_costs_what_the_real_code_takes(more):
    """The x-ray is of training, where the teacher is gone."""
    own = {"prompt_length": 24, "response_length": 40, "per_device_train_batch_size": 16}
    plan = lab.plan("distill", "mini", **own, **more)
    seen = lab.xray(plan).ledger
    for phase in ("forward", "backward"):
        want = {"phase": phase, "quantity": "flops"}
        assert plan.ledger.total(**want) == seen.total(**want) > 0
        want["quantity"] = "bytes"
        assert plan.ledger.total(**want) == pytest.approx(seen.total(**want), rel=0.02)
        assert not plan.ledger.total(role="teacher", **want)


def test_the_teacher_is_asked_once():
    """A second epoch doubles what the student costs, and asks for nothing."""
    for kind in ("samples", "logits"):
        one, two = (
            lab.plan("distill", "mini", distill_from=kind, rows=640, num_train_epochs=n)
            for n in (1, 2)
        )
        passes, more = (p.ledger.filter(quantity="flops") for p in (one, two))
        assert passes.total(role="teacher") == more.total(role="teacher") > 0
        assert 2 * passes.total(role="student") == more.total(role="student") > 0
        assert bool(passes.total(phase="teacher")) == (kind == "logits")


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


@pytest.fixture(scope="module")
def taught(few_stories, tmp_path_factory):
    """From stored distributions; when it has answered twice the process is interrupted."""
    how = {"max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 8}
    plan = lab.plan("distill", "mini", distill_from="logits", loss_top_k=5, **how)
    folder, asked, ask = tmp_path_factory.mktemp("run"), [], distill._ask

    def interrupted(job, model, rows, numbers):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(numbers)
        return ask(job, model, rows, numbers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "_ask", interrupted)
        stopped = lab.train(plan, few_stories, out=folder / "run", quiet=True)
        assert stopped.status == "stopped" and len(read_lines(folder / "run/teacher/0.jsonl")) == 16
        with pytest.raises(ValueError, match="teacher_model"):
            other = lab.plan("distill", plan.model, teacher_model="tiny", **plan.settings)
            lab.train(other, few_stories, out=folder / "run", resume=True, quiet=True)
        patch.setattr(distill, "_ask", lambda *a: asked.append(a[3]) or ask(*a))
        run = lab.train(plan, few_stories, out=folder / "run", resume=True, quiet=True)
    return run, asked


def test_answers_are_asked_for_once_and_stay_in_the_run(taught, few_stories):
    run, asked = taught
    assert [n for numbers in asked for n in numbers] == list(range(32))
    stored = read_lines(run.folder / "teacher" / "0.jsonl")
    assert [row["row"] for row in stored] == list(range(32))
    row, model = stored[17], lab.load("small")
    assert row["response"] == model.tokenizer.decode(row["ids"], skip_special_tokens=True)
    prompt = encode_prompt(model.tokenizer, row["prompt"])
    with torch.no_grad():
        logits = model.sft(torch.tensor([prompt + row["ids"]])).logits[0, len(prompt) - 1 : -1]
    values, tokens = torch.log_softmax(logits, -1).topk(5)
    assert torch.allclose(torch.tensor(row["top_logprobs"]), values, atol=1e-4)
    assert (torch.tensor(row["top_ids"]) == tokens).float().mean() > 0.99  # ties apart


def test_a_student_of_answers_is_measured_as_it_is(taught):
    """Its sampling is none, and the gold reward of the teacher's texts is not called its own."""
    run, _ = taught
    flops = {(r.phase, r.role) for r in run.ledger.filter(source="measured", quantity="flops")}
    student = {("forward", "student"), ("backward", "student")}
    assert flops == student | {("rollout", "teacher"), ("teacher", "teacher")}
    backward = run.ledger.filter(source="measured", phase="backward")
    assert not backward.total(role="teacher", quantity="bytes")
    assert {"loss", "entropy", "response_length", "episodes"} <= run.metrics[-1].keys()
    assert "gold_reward" not in run.metrics[-1] and "way_to_teacher" in run.summary
    assert {row.get("when") for row in run.samples} == {"sft", "teacher", "distill"}


def test_others_tokens_are_refused(tiny, few_stories, tmp_path):
    folder = tmp_path / "other"
    tiny.lm(0).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    plan = lab.plan("distill", "mini", teacher_model=folder)
    with pytest.raises(ValueError, match="cannot teach mini: its tokens are others"):
        lab.train(plan, few_stories, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("stage", "prompts"), [("distill", 64), ("rloo", 32)])
def test_prompts_that_fill_no_generation_are_refused(stage, prompts, few_stories, tmp_path):
    """TRL leaves them out: the run was "finished" after no step."""
    plan = lab.plan(stage, "mini", max_steps=1, per_device_train_batch_size=64)
    kept = few_stories.first(8)
    with pytest.raises(ValueError, match=f"8 prompts cannot fill a generation of {prompts}, and"):
        lab.train(plan, kept, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_what_is_asked_of_it_is_one_line(capsys, tmp_path):
    assert main(["train", "distill", "--model", "small", "--out", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err
    assert "distill needs a teacher for small: give --teacher-model" in line
    assert line.count("\n") == 1 and not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="sft has no teacher model: leave teacher_model out"):
        lab.plan("sft", "tiny", teacher_model="small")
    with pytest.raises(ValueError, match="beta must be 0 or more, at most 1, got 2"):
        lab.plan("distill", "tiny", beta=2)
    with pytest.raises(ValueError, match="distill_from='sample': did you mean 'samples'. choose"):
        lab.plan("distill", "tiny", distill_from="sample")
    with pytest.raises(ValueError, match="loss_top_k must be above 0, got 0"):
        lab.plan("distill", "tiny", loss_top_k=0)
    with pytest.raises(ValueError, match="distils from what the student writes alone"):
        lab.plan("distill", "tiny", distill_from="samples").trl_config()
