"""From a row to token ids: the one place, so that every stage sees the same ids.

Needs a tokenizer and nothing else: no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

from .chat import EncodedPrompt, Tools, is_conversation, prompt_of, stop_ids
from .schema import Dropped, Example, Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = ["encode_prompt", "encode_response", "is_conversation", "prompt_of", "stop_ids"]

Encoded: TypeAlias = tuple[list[Example], dict[str, int]]
"""Rows with token ids, and how many were left out or cut, by reason."""


def encode_prompt(
    tokenizer: Tokenizer, prompt: Prompt | Example, tools: Tools | None = None
) -> list[int]:
    """Token ids of a text, a conversation, ids already made, or a row with one of them, up to where
    the answer begins. Raises Dropped for what the model's chat template cannot write."""
    return EncodedPrompt(tokenizer, prompt, tools).ids


def encode_response(
    tokenizer: Tokenizer,
    answer: str | list[Message] | list[int],
    prompt: Prompt | Example | None = None,
    tools: Tools | None = None,
) -> list[int]:
    """Token ids of an answer to a prompt, the token that ends the turn included, or ids already
    made. They follow on `encode_prompt`'s. Raises Dropped as that does."""
    return EncodedPrompt(tokenizer, prompt, tools).response_ids(answer)


def row_prompt_ids(tokenizer: Tokenizer, row: Prompt | Example) -> list[int]:
    """Token ids of a row's prompt: those that `prompt_rows` made, else made here."""
    if isinstance(row, dict) and "prompt_ids" in row:
        ids: list[int] = row["prompt_ids"]
        return ids
    return encode_prompt(tokenizer, row)


def prompt_text(row: Prompt | Example) -> str:
    """A prompt for people to read: a conversation as one line for each message."""
    prompt = prompt_of(row)
    if isinstance(prompt, str):
        return prompt
    if is_conversation(prompt):
        return "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
    return " ".join(map(str, prompt))


# ------------------------------------------------------------- rows for the trainers, and the drops


def encoded_rows(
    tokenizer: Tokenizer, rows: Iterable[Example], fields: Sequence[str], dropped: dict[str, int]
) -> Iterator[tuple[Example, list[int], list[list[int]]]]:
    """Row by row the token ids of the prompt and of the answers in `fields`. Rows that the model's
    chat template cannot write are left out, and counted in `dropped` by reason."""
    for row in rows:
        prompt = EncodedPrompt(tokenizer, row)
        try:
            ids = prompt.ids, [prompt.learned_ids(row[name]) for name in fields]
        except Dropped as reason:
            dropped[str(reason)] = dropped.get(str(reason), 0) + 1
        else:
            yield row, *ids


def sft_rows(tokenizer: Tokenizer, rows: Iterable[Example], max_length: int) -> Encoded:
    """Rows with token ids for SFTTrainer, and how many were "truncated" or "too long".

    A response that does not fit loses its end, eos included; a prompt that leaves no room for two
    tokens of response is too long, and its row is dropped. What tools return is not learned.
    """
    encoded, counts = [], {"truncated": 0, "too long": 0}
    for row, prompt, (response,) in encoded_rows(tokenizer, rows, ["completion"], counts):
        room = max_length - len(prompt)
        if room < min(2, len(response)):
            counts["too long"] += 1
            continue
        counts["truncated"] += len(response) > room
        mask, answer = [1] * len(response), row["completion"]
        if is_conversation(answer) and any(m["role"] == "tool" for m in answer):
            mask = EncodedPrompt(tokenizer, row).assistant_mask(answer, response)
        mask = [0] * len(prompt) + mask[:room]
        encoded.append({"input_ids": prompt + response[:room], "completion_mask": mask})
    return encoded, counts


def pair_rows(tokenizer: Tokenizer, rows: Iterable[Example], max_length: int) -> Encoded:
    """Preference rows with token ids for DPOTrainer, and the drops by reason
    (rule 22: pairs that are too long or become identical are dropped and counted).

    TRL filters over-long pairs silently, or truncates them to identical ones: we count both. A
    pair that is cut is not the pair that was compared, so one that does not fit is dropped whole.
    """
    encoded, dropped = [], {"too long": 0, "identical": 0}
    pairs = encoded_rows(tokenizer, rows, ["chosen", "rejected"], dropped)
    for _, prompt, (chosen, rejected) in pairs:
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
    for row, prompt, (completion,) in encoded_rows(tokenizer, rows, ["completion"], dropped):
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
    for row, ids, _ in encoded_rows(tokenizer, rows, [], dropped):
        if len(ids) <= room:
            encoded.append({**row, "prompt_ids": ids})
        else:
            dropped["too long"] += 1
    return encoded, dropped


def id_rows(
    tokenizer: Tokenizer,
    rows: Iterable[Example],
    sizes: dict[str, list[int]],
    dropped: dict[str, int],
) -> Iterator[Example]:
    """The fields named in `sizes` as token ids, row by row; `sizes` takes down their lengths, and
    `dropped` the rows left out. The functions above take such rows as they take texts."""
    answers = [name for name in sizes if name not in ("prompt", "label", "tools")]
    for row, prompt, ids in encoded_rows(tokenizer, rows, answers, dropped):
        encoded = dict(zip(["prompt", *answers], [prompt, *ids], strict=True))
        for name, of_field in encoded.items():
            sizes[name].append(len(of_field))
        yield row | encoded
