"""Distillation: a student learns a teacher's distribution on what it writes itself, thin over TRL.

TRL's DistillationTrainer: of every token that the student has sampled, the divergence of its
distribution from the teacher's (generalised Jensen-Shannon, Agarwal et al., 2306.13649). `beta` 0
is KL(teacher, student), 1 is KL(student, teacher); between them a mixture of both is compared with.

That is `distill_from="student"`. From the teacher's own answers, which it gives once, before
training, so that it need not stay in memory: "samples", cross-entropy; "logits", divergence over
its likeliest tokens. A run keeps them (`teacher/0.jsonl`, of other processes 1, …), to be read, and
to go on with.

What is ours: prompts' tokens, stop tokens and lengths as in every stage that samples, positions
counted from the mask, vocabularies compared token by token, and the gold reward of what is sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import trl
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl.trainer.utils import pad

from ..data.reward_sources import gold_metrics
from ..data.schema import Example
from ..data.tokenize import prompt_text, row_prompt_ids
from ..display import check_choice
from ..launch.processes import from_all, once, place
from ..ppo.logprobs import AnyModel, language_head, logprobs_and_entropy, top_logprobs
from ..ppo.rollout import response_hidden_states, shape_of
from ..ppo.texts import sample_ids, which_ended
from ..runs.json_files import append_lines, read_lines
from ..runs.progress import with_progress
from ..stages import Setting
from .diverged import broken_weight, diverged
from .evaluate import padded_answers
from .job import Figures, Job, before_and_after, evaluate_policy, run_trainer
from .online import (
    METRIC_NAMES,
    OwnSampling,
    ResponseLength,
    SamplingWatch,
    prompt_table,
    read_responses,
)
from .trl import Rows, make_trainer

if TYPE_CHECKING:
    from ..planning import TrainerArgs

Sampled = Callable[[int, Rows, list[list[int]]], dict[str, float]]
"""`(step, rows, responses as ids)` → metrics of what was sampled."""
WAYS = ("student", "samples", "logits")


@dataclass
class DistillationConfig(ResponseLength, trl.DistillationConfig):
    """TRL's DistillationConfig, with PPO's name for the length of a response."""

    distill_from: str = field(
        default="student",
        metadata={"help": "What is learned from: student, or the teacher's samples or logits."},
    )
    loss_top_k: int = field(
        default=16,
        metadata={"help": "Of logits: likeliest tokens of the teacher; all others are one."},
    )

    def __post_init__(self) -> None:
        check_choice("distill_from", self.distill_from, WAYS)
        if self.loss_top_k < 1:
            raise ValueError(f"loss_top_k must be 1 or more, got {self.loss_top_k}")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be from 0 to 1, got {self.beta}")
        super().__post_init__()


class DistillationTrainer(OwnSampling, trl.DistillationTrainer):  # type: ignore[misc]
    """TRL's DistillationTrainer with our conventions. `sampled`: called with each generation;
    `answers`: the teacher's, by the number of the prompt, in place of samples and of its model."""

    teacher_model: AnyModel

    def __init__(
        self,
        *args: Setting,
        sampled: Sampled | None = None,
        answers: Rows | None = None,
        **kwargs: Setting,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.sampled, self.answers = sampled, answers
        self.keep_conventions(self.model, self.teacher_model)

    def _compute_loss(self, *args: Setting, **kwargs: Setting) -> tuple[Tensor, ...]:
        """TRL 1.16 calls trunks past the forward method that accelerate has wrapped, so that bf16
        and fp16 would be fp32 here without a word."""
        of_answers = super()._compute_loss if self.answers is None else self._answers_loss
        with self.accelerator.autocast():
            loss: tuple[Tensor, ...] = of_answers(*args, **kwargs)
        return loss

    def _answers_loss(
        self, student: AnyModel, inputs: Example, num_items_in_batch: Tensor | None
    ) -> tuple[Tensor, ...]:
        """→ loss, sum of entropies, number of tokens, as TRL's own."""
        ids, attention = (
            torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1)
            for x in ("ids", "mask")
        )
        mask = inputs["completion_mask"].flatten()
        hidden = self._get_last_hidden_state(student, ids, attention, len(mask) // len(ids))
        hidden, tokens, teacher = (
            x.flatten(0, 1) for x in (hidden, inputs["top_ids"], inputs["top_logprobs"])
        )
        logits = language_head(student, hidden)
        logprobs, entropy = logprobs_and_entropy(logits, tokens, self.temperature)
        loss, count = (sparse_divergence(logprobs, teacher) * mask).sum(), mask.sum()
        items = count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return loss / items, (entropy * mask).sum().detach(), count

    def _generate_and_score_completions(self, inputs: Rows) -> Example:
        self.inputs = inputs
        if name := broken_weight(self.model):  # there is nothing to sample from
            raise diverged("distill", self.args, f"{name} holds NaN or infinity")
        output: Example = super()._generate_and_score_completions(inputs)
        for name in ("top_ids", "top_logprobs") if self.answers is not None else ():
            tops, to = [torch.tensor(x[name]) for x in self._answered()], self.args
            output[name] = pad(tops, 0, "right", to.pad_to_multiple_of).to(to.device)
        return output

    def _answered(self) -> Rows:
        """The teacher's answers to the prompts at hand."""
        return [self.answers[row["row"]] for row in self.inputs] if self.answers else []

    def _generate_single_turn(self, *args: Setting, **kwargs: Setting) -> list[list[int]]:
        ids: list[list[int]] = [answer["ids"] for answer in self._answered()]
        ids = ids or super()._generate_single_turn(*args, **kwargs)
        if self.sampled is not None:
            metrics = self._metrics["train" if self.model.training else "eval"]
            for name, value in self.sampled(self.state.global_step + 1, self.inputs, ids).items():
                metrics[name].append(value)
        return ids


class WhatIsSampled:
    """Metrics of the student's responses, and four of them for the record. `rows`: those that a
    row of TRL's table counts."""

    def __init__(self, job: Job, rows: Rows) -> None:
        self.tokenizer, self.meter, self.run = job.tokenizer, job.meter, job.run
        self.length, self.rows = int(job.args.response_length), rows
        self.stored = job.args.distill_from != "student"  # these are no texts of the student
        self.functions, self.episodes = {} if self.stored else gold_metrics(job.data), 0

    def __call__(self, step: int, inputs: Rows, ids: list[list[int]]) -> dict[str, float]:
        rows = [self.rows[row["row"]] for row in inputs]
        self.episodes += len(rows)
        if self.stored:
            return {}
        with self.meter.phase("evaluation"):
            ended = which_ended(self.tokenizer, ids, self.length)
            means, samples = read_responses(self.tokenizer, rows, ids, self.functions)
            self.run.sample(step, samples)
        return means | {"stopped": sum(ended) / len(ended)}

    def metric_names(self, _: TrainingArguments) -> dict[str, str]:
        return METRIC_NAMES | {name: name for name in self.functions}


def distillation_trainer(
    student: AnyModel,
    teacher: AnyModel | None,
    tokenizer: Tokenizer,
    train: Rows,
    args: TrainerArgs,
    callbacks: list[TrainerCallback],
    sampled: Sampled | None = None,
    answers: Rows | None = None,
) -> Trainer:
    """TRL's trainer. `train`: rows with a `prompt`, `answers`: to them, where there is no teacher
    any more."""
    rows = prompt_table(student, tokenizer, train)
    more: dict[str, Setting] = {"teacher_model": teacher, "sampled": sampled, "answers": answers}
    return make_trainer("distill", student, tokenizer, rows, [], args, callbacks, **more)


def teacher_answers(job: Job, teacher: AnyModel) -> Rows:
    """The teacher's answers to the prompts that training will see: `ids`, and of each token
    `top_ids` and `top_logprobs` (t, k): the likeliest, or with `distill_from="samples"` the one
    that it has written, as certain. What the run has already is not asked for again; the noise
    belongs to a prompt's number. Each process asks for its share.
    """
    args, rows, (rank, processes) = job.args, job.ready.train, place()
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if args.max_steps > 0:
        rows = rows[: args.max_steps * size * processes]
    (folder := job.run.folder / "teacher").mkdir(parents=True, exist_ok=True)
    there = once(lambda: [row for file in folder.glob("*.jsonl") for row in read_lines(file)])
    found = {row["row"]: row for row in there}
    mine = [i for i in range(len(rows)) if i not in found][rank::processes]
    job.meter.watch("teacher", teacher.to(args.device).eval())
    for first in with_progress(range(0, len(mine), size), "answers", job.quiet):
        if processes == 1 and job.should_stop is not None and job.should_stop():
            raise KeyboardInterrupt
        new = _ask(job, teacher, rows, mine[first : first + size])
        append_lines(folder / f"{rank}.jsonl", new)
        found |= {row["row"]: row for row in new}
    whole = {i: row for part in from_all(found) for i, row in part.items()}
    for row in whole.values():
        row.setdefault("top_ids", [[token] for token in row["ids"]])
        row.setdefault("top_logprobs", [[0.0]] * len(row["ids"]))
    return [whole[i] for i in range(len(rows))]


@torch.no_grad()
def _ask(job: Job, teacher: AnyModel, table: Rows, numbers: Sequence[int]) -> list[Example]:
    args, tokenizer, meter, rows = job.args, job.tokenizer, job.meter, [table[i] for i in numbers]
    how = {"max_new_tokens": args.response_length, "temperature": args.temperature}
    how |= {"seed": args.seed, "batch": len(rows), "numbers": numbers}
    with meter.phase("rollout", "teacher", calls=teacher):
        ids = [one for (one,) in sample_ids(teacher, tokenizer, rows, **how)]
    meter.count("rollout", "teacher", sum(map(len, ids)))
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    answers: list[Example] = [
        {"row": i, "prompt": prompt_text(row), "response": text, "ids": one}
        for i, row, text, one in zip(numbers, rows, texts, ids, strict=True)
    ]
    if args.distill_from == "logits":
        asked = [row_prompt_ids(tokenizer, row) for row in rows]
        padding = tokenizer.pad_token_id
        sequence, attention, _, mask = padded_answers(padding, asked, ids, teacher.device)
        shape = shape_of([torch.arange(len(rows))], attention[:, :-1], mask)
        with meter.phase("teacher", "teacher", shape, int(attention.sum())):
            hidden = response_hidden_states(teacher, sequence, attention, mask)
            values, tokens = top_logprobs(teacher, hidden, args.loss_top_k, args.temperature)
        values, lengths = values.double().clamp(min=-99).round(decimals=4), list(map(len, ids))
        parts = zip(answers, values.cpu().split(lengths), tokens.cpu().split(lengths), strict=True)
        for answer, part, top in parts:
            answer |= {"top_ids": top.tolist(), "top_logprobs": part.tolist()}
    return answers


def sparse_divergence(logprobs: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher, student) over k tokens and, as one class more, all the others together.

    logprobs, teacher: (n, k), log π of the k tokens. → (n,) nats. Where the teacher is certain of
    one token (k = 1, log π = 0) that is the student's cross-entropy.
    """
    left, rest = (1 - x.exp().sum(-1) for x in (logprobs, teacher))
    rest = rest.clamp(min=0)
    known = (teacher.exp() * (teacher - logprobs)).sum(-1)
    return known + torch.xlogy(rest, rest) - rest * left.clamp(min=1e-7).log()


def train(job: Job) -> Figures:
    """A student on a teacher: figures of the student before and after, and of the teacher."""
    roles, gold = job.ready.models, job.data.has_gold
    before = evaluate_policy(job, roles["student"], keep="sft")
    teacher = roles.pop("teacher")
    best, _ = evaluate_policy(job, teacher, keep="teacher")
    rows, answers = job.ready.train, None
    if job.args.distill_from != "student":
        answers, teacher = teacher_answers(job, teacher), None  # whose memory is free from here on
        rows = rows[: len(answers)]
    sampled = WhatIsSampled(job, rows)
    watch = SamplingWatch(job.meter, sampled, job.run.log, job.progress, job.should_stop)
    trainer = distillation_trainer(
        roles["student"], teacher, job.tokenizer, rows, job.args, [watch], sampled, answers
    )
    figures = run_trainer(job, trainer, watch)
    after = evaluate_policy(job, job.whole(trainer.model))
    figures |= before_and_after(job, before, after, None)
    figures |= {f"teacher/{name}": value for name, value in best.items()}
    if gold and after[0]:
        figures["way_to_teacher"] = way(*(x["gold_reward"] for x in (before[0], after[0], best)))
    return figures


LEAST = 0.1
"""Gold reward by which a teacher must be ahead: less is within the noise of 512 responses."""


def way(before: float, after: float, teacher: float) -> float | None:
    """The share of the way from the student's gold reward before to the teacher's that it has gone;
    None where the teacher was not ahead by `LEAST`."""
    return (after - before) / (teacher - before) if teacher - before >= LEAST else None
