"""The reward model, with TRL's RewardTrainer: the Bradley–Terry loss on pairs."""

from __future__ import annotations

import json

from transformers import PreTrainedTokenizerBase

from ..data.tokenize import encoded_rows
from ..ppo.adapters import SCORE_FILE
from ..ppo.logprobs import AnyModel
from ..ppo.texts import score_texts
from .evaluate import noise_free_accuracy, pair_accuracy
from .job import Figures, Job, train_role
from .trl import Rows


def train(job: Job) -> Figures:
    trainer, figures = train_role(job)
    model = job.whole(trainer.model)
    pairs = _short_enough(job, job.data.preferences.test, "chosen", "rejected")
    if pairs and not job.stopped:
        accuracy, margin = pair_accuracy(model, job.tokenizer, pairs)
        figures |= {"accuracy": accuracy, "held_out_pairs": len(margin)}
        if job.data.has_gold:
            figures["accuracy_ceiling"] = job.data.accuracy_ceiling(pairs)
            gold = job.data.gold_reward
            figures["noise_free_accuracy"] = noise_free_accuracy(pairs, margin, gold)
    # Rule 16: demonstrations score 0 on average; kept in the config, where PPO finds it.
    rows = (job.data.sft.train or job.data.preferences.train)[:256]
    rows = _short_enough(job, rows, "completion" if job.data.sft.train else "chosen")
    figures["score_offset"] = set_score_offset(model, job.tokenizer, rows) if rows else 0.0
    job.save(model)
    if job.plan.lora and job.run.writes:  # what its config says of a whole model
        beside = job.run.folder / "adapter" / SCORE_FILE
        beside.write_text(json.dumps({"score_offset": figures["score_offset"]}) + "\n")
    return figures


def _short_enough(job: Job, rows: Rows, *columns: str) -> Rows:
    """Rows that the chat template can write and the model can read to their end."""
    return [
        row
        for row, prompt, answers in encoded_rows(job.tokenizer, rows, columns, {})
        if len(prompt) + max(map(len, answers)) <= job.plan.model.context
    ]


def set_score_offset(
    model: AnyModel, tokenizer: PreTrainedTokenizerBase, demonstrations: Rows
) -> float:
    """Rule 16: a bias in the model's config so that demonstrations score 0 on average.

    `demonstrations`: rows with a `completion`, or a `chosen` response. → the offset.
    """
    response = "completion" if "completion" in demonstrations[0] else "chosen"
    model.config.score_offset = 0.0
    encoded = list(encoded_rows(tokenizer, demonstrations, [response], {}))
    prompts, answers = [p for _, p, _ in encoded], [a for *_, (a,) in encoded]
    scores = score_texts(model, tokenizer, prompts, answers)
    offset = -float(scores.mean())
    model.config.score_offset = offset
    return offset
