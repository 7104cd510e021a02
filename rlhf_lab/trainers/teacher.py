"""What a teacher answers once, before training, so that it need not stay in memory.

A run keeps the answers (`teacher/0.jsonl`, of other processes 1, …), to be read, and to go on with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.schema import Example
from ..data.tokenize import prompt_text, row_prompt_ids
from ..launch.processes import from_all, once, place
from ..ppo.logprobs import AnyModel, top_logprobs
from ..ppo.rollout import response_hidden_states, shape_of
from ..ppo.texts import sample_ids
from ..runs.json_files import append_lines, read_lines
from ..runs.progress import with_progress
from .evaluate import padded_answers
from .job import Job
from .trl import Rows


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
        pad = tokenizer.pad_token_id
        sequence, attention, _, mask = padded_answers(pad, asked, ids, teacher.device)
        shape = shape_of([torch.arange(len(rows))], attention[:, :-1], mask)
        with meter.phase("teacher", "teacher", shape, int(attention.sum())):
            hidden = response_hidden_states(teacher, sequence, attention, mask)
            values, tokens = top_logprobs(teacher, hidden, args.loss_top_k, args.temperature)
        values, lengths = (
            values.double().clamp(min=-99).round(decimals=4),
            [len(one) for one in ids],
        )
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
