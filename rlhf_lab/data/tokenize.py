"""From a row to token ids: the one place, so that every stage sees the same ids.

Needs a tokenizer and nothing else: no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeAlias

from .schema import Example, Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
    from typing_extensions import TypeIs

Encoded: TypeAlias = tuple[list[Example], dict[str, int]]
"""Rows with token ids, and how many were left out or cut, by reason."""


def is_conversation(prompt: Prompt) -> TypeIs[list[Message]]:
    """Whether a prompt is a list of messages, and not text or token ids."""
    return not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], dict)


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Token ids of a text prompt, a conversation (list of messages) or ids already made.

    A tokenizer that closes every text with eos is not to close a prompt that goes on.
    """
    if isinstance(prompt, str):
        ids: list[int] = tokenizer(prompt).input_ids
        return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
    if is_conversation(prompt):
        return _encode_conversation(tokenizer, prompt)
    return list(prompt)


def _encode_conversation(tokenizer: Tokenizer, conversation: list[Message]) -> list[int]:
    from jinja2 import TemplateError  # what transformers writes chat templates in

    try:
        encoded = tokenizer.apply_chat_template(conversation, add_generation_prompt=True)
    except TemplateError as error:  # the template says itself what it will not have
        raise ValueError(
            f"the model's chat template refuses a conversation of {len(conversation)} messages "
            f"({', '.join(m['role'] for m in conversation[:4])}): {error}"
        ) from None
    assert isinstance(encoded, Mapping)
    ids: list[int] = encoded["input_ids"]
    return ids


def encode_response(tokenizer: Tokenizer, response: str | list[int]) -> list[int]:
    """Token ids of a response and the eos that ends it, or ids already made."""
    if isinstance(response, list):
        return response
    ids: list[int] = tokenizer(response, add_special_tokens=False).input_ids
    return [*ids, tokenizer.eos_token_id]


def row_prompt_ids(tokenizer: Tokenizer, row: Example) -> list[int]:
    """Token ids of a row's prompt: those that `prompt_rows` made, else made here."""
    if "prompt_ids" in row:
        ids: list[int] = row["prompt_ids"]
        return ids
    return encode_prompt(tokenizer, prompt_of(row))


def prompt_of(row: Example) -> Prompt:
    """A row's prompt: text, messages or ready-made ids."""
    prompt: Prompt = row["prompt"] if "prompt" in row else row["input_ids"]
    return prompt


def prompt_text(prompt: Prompt) -> str:
    """A prompt for people to read: a conversation as one line for each message."""
    if isinstance(prompt, str):
        return prompt
    if is_conversation(prompt):
        return "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
    return " ".join(map(str, prompt))


# ------------------------------------------------------------- rows for the trainers, and the drops


def sft_rows(tokenizer: Tokenizer, rows: Iterable[Example], max_length: int) -> Encoded:
    """Rows with token ids for SFTTrainer, and how many were "truncated" or "too long".

    A response that does not fit loses its end, eos included; a prompt that leaves no room for two
    tokens of response is too long, and its row is dropped.
    """
    encoded, counts = [], {"truncated": 0, "too long": 0}
    for row in rows:
        prompt = encode_prompt(tokenizer, row["prompt"])
        response = encode_response(tokenizer, row["completion"])
        room = max_length - len(prompt)
        if room < min(2, len(response)):
            counts["too long"] += 1
            continue
        counts["truncated"] += len(response) > room
        mask = [0] * len(prompt) + [1] * len(response[:room])
        encoded.append({"input_ids": prompt + response[:room], "completion_mask": mask})
    return encoded, counts


def pair_rows(tokenizer: Tokenizer, rows: Iterable[Example], max_length: int) -> Encoded:
    """Preference rows with token ids for DPOTrainer, and the drops by reason
    (rule 22: pairs that are too long or become identical are dropped and counted).

    TRL filters over-long pairs silently, or truncates them to identical ones: we count both. A
    pair that is cut is not the pair that was compared, so one that does not fit is dropped whole.
    """
    encoded, dropped = [], {"too long": 0, "identical": 0}
    for row in rows:
        prompt = encode_prompt(tokenizer, row["prompt"])
        chosen, rejected = (encode_response(tokenizer, row[k]) for k in ("chosen", "rejected"))
        if chosen == rejected:
            dropped["identical"] += 1
        elif len(prompt) + max(len(chosen), len(rejected)) > max_length:
            dropped["too long"] += 1
        else:
            encoded.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return encoded, dropped


def whole_pair_rows(tokenizer: Tokenizer, rows: Iterable[Example], max_length: int) -> Encoded:
    """`pair_rows` for RewardTrainer, which wants prompt and response as one sequence."""
    encoded, dropped = pair_rows(tokenizer, rows, max_length)
    for row in encoded:
        prompt = row.pop("prompt_ids")
        row |= {name: prompt + ids for name, ids in row.items()}
    return encoded, dropped


def labelled_rows(tokenizer: Tokenizer, rows: Iterable[Example], max_length: int) -> Encoded:
    """Rows of one labelled answer with token ids for KTOTrainer, and the drops by reason.

    An answer that is cut is not the answer that was labelled: one that does not fit is dropped.
    """
    encoded, dropped = [], {"too long": 0}
    for row in rows:
        prompt = encode_prompt(tokenizer, row["prompt"])
        completion = encode_response(tokenizer, row["completion"])
        if len(prompt) + len(completion) > max_length:
            dropped["too long"] += 1
        else:
            label = bool(row["label"])
            encoded.append({"prompt_ids": prompt, "completion_ids": completion, "label": label})
    return encoded, dropped


def prompt_rows(tokenizer: Tokenizer, rows: Iterable[Example], room: int) -> Encoded:
    """Rows whose prompt has at most `room` tokens, and how many were too long.

    Each has its `prompt_ids` from here on: a prompt is tokenised once.
    """
    encoded, dropped = [], {"too long": 0}
    for row in rows:
        ids = encode_prompt(tokenizer, row["prompt"])
        if len(ids) <= room:
            encoded.append({**row, "prompt_ids": ids})
        else:
            dropped["too long"] += 1
    return encoded, dropped


def id_rows(
    tokenizer: Tokenizer, rows: Iterable[Example], sizes: dict[str, list[int]]
) -> Iterator[Example]:
    """The fields named in `sizes` as token ids, row by row; `sizes` takes down their lengths.

    The functions above take such rows as they take texts.
    """
    for row in rows:
        encoded = {}
        for name in (n for n in sizes if n in row):
            encode = encode_prompt if name == "prompt" else encode_response
            encoded[name] = encode(tokenizer, row[name])
            sizes[name].append(len(encoded[name]))
        yield encoded
