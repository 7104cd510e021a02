"""From a row to token ids: the one place, so that every stage sees the same ids.

Needs a tokenizer and nothing else: no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from jinja2 import TemplateError  # what transformers writes chat templates in

from .ledger import ONLINE


def encode_prompt(tokenizer, prompt: Any) -> list[int]:
    """Token ids of a text prompt, a conversation (list of messages) or ids already made.

    A tokenizer that closes every text with eos is not to close a prompt that goes on.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
        return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
    if prompt and isinstance(prompt[0], dict):
        try:
            return tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        except TemplateError as error:  # the template says itself what it will not have
            raise ValueError(
                f"the model's chat template refuses a conversation of {len(prompt)} messages "
                f"({', '.join(m['role'] for m in prompt[:4])}): {error}"
            ) from None
    return list(prompt)


def encode_response(tokenizer, response: str | list[int]) -> list[int]:
    """Token ids of a response and the eos that ends it, or ids already made."""
    if isinstance(response, list):
        return response
    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def prompt_text(prompt: Any) -> str:
    """A prompt for people to read: a conversation as one line for each message."""
    if isinstance(prompt, str):
        return prompt
    if prompt and isinstance(prompt[0], dict):
        return "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
    return " ".join(map(str, prompt))


def sft_rows(tokenizer, rows: Iterable[dict], max_length: int) -> tuple[list[dict], dict[str, int]]:
    """Rows with token ids for SFTTrainer, and how many were "truncated" or "too long".

    A response that does not fit loses its end, eos included; a prompt that leaves no room for two
    tokens of response is too long, and its row is dropped.
    """
    made, counts = [], {"truncated": 0, "too long": 0}
    for row in rows:
        prompt = encode_prompt(tokenizer, row["prompt"])
        response = encode_response(tokenizer, row["completion"])
        room = max_length - len(prompt)
        if room < min(2, len(response)):
            counts["too long"] += 1
            continue
        counts["truncated"] += len(response) > room
        mask = [0] * len(prompt) + [1] * len(response[:room])
        made.append({"input_ids": prompt + response[:room], "completion_mask": mask})
    return made, counts


def pair_rows(
    tokenizer, rows: Iterable[dict], max_length: int
) -> tuple[list[dict], dict[str, int]]:
    """Preference rows with token ids for RewardTrainer and DPOTrainer, and the drops by reason
    (rule 22).

    TRL filters over-long pairs silently, or truncates them to identical ones: we count both. A
    pair that is cut is not the pair that was judged, so one that does not fit is dropped whole.
    """
    made, dropped = [], {"too long": 0, "identical": 0}
    for row in rows:
        prompt = encode_prompt(tokenizer, row["prompt"])
        chosen, rejected = (encode_response(tokenizer, row[k]) for k in ("chosen", "rejected"))
        if chosen == rejected:
            dropped["identical"] += 1
        elif len(prompt) + max(len(chosen), len(rejected)) > max_length:
            dropped["too long"] += 1
        else:
            made.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return made, dropped


def prompt_rows(tokenizer, rows: Iterable[dict], room: int) -> tuple[list[dict], dict[str, int]]:
    """Rows whose prompt has at most `room` tokens, and how many were too long."""
    kept, dropped = [], {"too long": 0}
    for row in rows:
        if len(encode_prompt(tokenizer, row["prompt"])) <= room:
            kept.append(row)
        else:
            dropped["too long"] += 1
    return kept, dropped


def id_rows(tokenizer, rows: Iterable[dict], sizes: dict[str, list[int]]) -> Iterator[dict]:
    """The fields named in `sizes` as token ids, row by row; `sizes` takes down their lengths.

    The functions above take such rows as they take texts.
    """
    for row in rows:
        made = {}
        for name in (n for n in sizes if n in row):
            encode = encode_prompt if name == "prompt" else encode_response
            made[name] = encode(tokenizer, row[name])
            sizes[name].append(len(made[name]))
        yield made


def expected_longest(lengths: list[int], count: int) -> float:
    """Mean length of the longest of `count` random rows: what a batch is padded to."""
    n, total, before = len(lengths), 0.0, 0.0
    for place, length in enumerate(sorted(lengths), 1):
        here = (place / n) ** count  # the chance that none is longer
        total += length * (here - before)
        before = here
    return total


def planned_lengths(stage: str, tokenizer, data: Any, settings: Any) -> dict[str, float]:
    """What a plan has to know of the data: longest prompt and response in tokens, the length that
    a batch is padded to on average, and the number of rows."""
    samples = stage in (*ONLINE, "inference")
    rows = (data.prompts if samples else data.sft if stage == "sft" else data.preferences).train
    if not rows:
        return {}
    looked = rows[:LOOKED_AT]
    prompts = [len(encode_prompt(tokenizer, r["prompt"])) for r in looked]
    batch = int(settings.get("per_device_train_batch_size", 8))
    if samples:
        limit = int(settings.get("response_length", 53))
        answers = [min(limit, len(encode_response(tokenizer, r["completion"])))
                   for r in data.sft.train[:LOOKED_AT]] or [limit]  # fmt: skip
        passes = settings.get("steps_per_generation")  # RLOO's and GRPO's
        size = batch * int(passes or settings.get("gradient_accumulation_steps", 1))
        mean = sum(answers) / len(answers)
        return {"prompt_length": max(prompts), "rows": len(rows), "mean_response": mean,
                "padded_prompt": expected_longest(prompts, size),
                "padded_response": expected_longest(answers, size),
                "mean_tokens": sum(prompts) / len(prompts) + mean}  # fmt: skip
    fields = ("completion",) if stage == "sft" else ("chosen", "rejected")
    made = [[len(encode_response(tokenizer, r[f])) for f in fields] for r in looked]
    limit = int(settings.get("max_length") or 2**31)
    totals = [min(p + n, limit) for p, ns in zip(prompts, made, strict=True) for n in ns]
    response = max(max(ns) for ns in made)
    prompt = sum(prompts) / len(prompts)
    return {"prompt_length": max(1, max(totals) - response), "response_length": response,
            "rows": len(rows), "padded_prompt": prompt, "mean_tokens": sum(totals) / len(totals),
            "padded_response": expected_longest(totals, batch * len(fields)) - prompt}  # fmt: skip


LOOKED_AT = 2_000
"""Rows of a set whose lengths a plan looks at."""
