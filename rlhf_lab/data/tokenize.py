"""From a row to token ids: the one place, so that every stage sees the same ids.

Needs a tokenizer and nothing else: no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from jinja2 import TemplateError  # what transformers writes chat templates in


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


def labelled_rows(
    tokenizer, rows: Iterable[dict], max_length: int
) -> tuple[list[dict], dict[str, int]]:
    """Rows of one labelled answer with token ids for KTOTrainer, and the drops by reason.

    An answer that is cut is not the answer that was labelled: one that does not fit is dropped.
    """
    kept, dropped = [], {"too long": 0}
    for row in rows:
        prompt = encode_prompt(tokenizer, row["prompt"])
        completion = encode_response(tokenizer, row["completion"])
        if len(prompt) + len(completion) > max_length:
            dropped["too long"] += 1
        else:
            label = bool(row["label"])
            kept.append({"prompt_ids": prompt, "completion_ids": completion, "label": label})
    return kept, dropped


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
