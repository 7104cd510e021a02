"""How a model writes a prompt and an answer to it: its chat template, and what ends a turn.

A chat template is a program that comes with a model. What it writes for the assistant's turn (think
tags, channels, the token that ends it) is what the model has to learn, and where it stops: an
answer is what the template adds when the answer follows the prompt. What it cannot write raises
`Dropped`, with the reason.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

from ..display import first_line
from ..stages import Setting
from .messages import Dropped, Example, Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
    from typing_extensions import TypeIs

Tools: TypeAlias = list[Example]
"""JSON schemas of the tools that a conversation may call."""
REFUSED, LEFT_OUT = "the chat template refuses it", "the chat template leaves out"
GOES_ON = "an answer goes on after a token that ends turns"
NO_BEGINNING = "the chat template's generation prompt does not begin its answers"
REMEDIES = {
    REFUSED: "change these rows as it asks (a system text can stand in the first user turn)",
    LEFT_OUT: "take it out of these rows, or write it into a turn that the template has",
    GOES_ON: "take the token's text out of these rows",
    NO_BEGINNING: "give the answers their reasoning (`reasoning_content`) where it opens a thought",
}
"""What can be done about the reasons for which rows are dropped here."""
THINK_TAG = re.compile(r"</?think>")


def remedy(reason: str) -> str:
    """What to do about a reason for which the template dropped rows; "" for other reasons."""
    what = next((what for known, what in REMEDIES.items() if known in reason), "")
    return what and f"{what}; or put another chat_template.jinja into the model's folder"


def is_conversation(prompt: object) -> TypeIs[list[Message]]:
    """Whether a prompt, or an answer, is a list of messages, and not text or token ids."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)


def prompt_of(row: Prompt | Example) -> Prompt:
    """A row's prompt: text, messages or ready-made ids; a prompt itself as it is."""
    if not isinstance(row, dict):
        return row
    prompt: Prompt = row["prompt"] if "prompt" in row else row["input_ids"]
    return prompt


class ChatFormat(NamedTuple):
    """What there is to know of a tokenizer and its template, found out by writing with them."""

    in_parts: bool  # content is a list of parts, not a text
    beyond: str  # what the template writes after the end of the last turn
    end: int  # the token that ends a turn
    stops: dict[str, int]  # all tokens at which the model's turns end, the tokenizer's eos first
    closes: bool  # a text is closed with eos
    stray: bool  # a text begins with a space that the same text after another has not


_FORMATS: WeakKeyDictionary[Tokenizer, tuple[object, ChatFormat]] = WeakKeyDictionary()
QUESTION, ANSWER = "Who?", "Nobody."


def stop_ids(tokenizer: Tokenizer, generation_config: object = None) -> tuple[int, ...]:
    """Every token at which the model's turns end: the tokenizer's eos, the template's end of turn,
    and the generation config's list, which `load_tokenizer` has read where there is one."""
    declared = getattr(generation_config, "eos_token_id", None)
    more = declared if isinstance(declared, Sequence) else []  # one alone may be a class's default
    return tuple(dict.fromkeys([*chat_format(tokenizer).stops.values(), *more]))


def chat_format(tokenizer: Tokenizer) -> ChatFormat:
    """What a tokenizer's chat template does; found out once for each."""
    key = tokenizer.chat_template, tokenizer.eos_token, getattr(tokenizer, "stop_token_ids", ())
    known = _FORMATS.get(tokenizer)
    if known is None or known[0] != key:
        known = _FORMATS[tokenizer] = key, _find_out(tokenizer, key[2])
    return known[1]


def _find_out(tokenizer: Tokenizer, declared: Iterable[int]) -> ChatFormat:
    ways = product((False, True), (False, True))  # text or parts; no system turn or one
    found = ((parts, system, _after_answer(tokenizer, parts, system)) for parts, system in ways)
    in_parts, system, written = next((f for f in found if f[2] is not None), (False, False, ""))
    after = written or ""
    # The end of a turn is the last special token that follows an answer both in the middle and at
    # the end: Phi-3 closes the whole with a further <|endoftext|>, Cohere's turns end in two. Where
    # they share none (gpt-oss ends the last in another way), the first that follows the last.
    shared = os.path.commonprefix([after, _after_answer(tokenizer, in_parts, system, True) or ""])
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    common, last = ([i for i in _plain_ids(tokenizer, t) if i in special] for t in (shared, after))
    end, eos = common[-1:] or last[:1], tokenizer.eos_token_id
    until = str(tokenizer.convert_ids_to_tokens(end[0])) if end else after.rstrip()
    beyond = after.partition(until)[2] if until else after
    newline, letter, both = (_plain_ids(tokenizer, t) for t in ("\n", "a", "\na"))
    text = tokenizer("a").input_ids
    return ChatFormat(
        in_parts,
        beyond,
        (end or [eos])[0],
        {str(tokenizer.convert_ids_to_tokens(i) or f"<{i}>"): i for i in [eos, *end, *declared]},
        closes=text[-1:] == [eos]
        and len(text) - len(letter) > (text[:1] == [tokenizer.bos_token_id]),
        stray=both != newline + letter,
    )


def _after_answer(
    tokenizer: Tokenizer, in_parts: bool, system: bool, goes_on: bool = False
) -> str | None:
    """What the template writes after an answer; None where it cannot write it, or writes the parts
    of a content as Python does."""
    turn = {"role": "user", "content": QUESTION}
    talk = [turn, {"role": "assistant", "content": ANSWER}, *[turn] * goes_on]
    first = [{"role": "system", "content": "Be kind."}] * system
    try:
        written = _render(tokenizer, first + talk, in_parts)
    except Dropped:
        return None
    before, found, after = written.partition(ANSWER)
    return after if found and QUESTION in before and f"'{QUESTION}'" not in before else None


class EncodedPrompt:
    """A prompt as the model reads it, up to where the answer begins, and the answers to it.

    `prompt`: text, a conversation, ready-made ids, None where it is not known, or a row that has
    one, and perhaps tools. A conversation that ends in the assistant's own beginning is continued.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Prompt | Example | None, tools: Tools | None = None
    ):
        if isinstance(prompt, dict):
            tools, prompt = prompt.get("tools"), prompt_of(prompt)
        self.tokenizer, self.prompt, self.tools = tokenizer, prompt, tools

    @cached_property
    def format(self) -> ChatFormat:
        """What the tokenizer's template does; ready-made ids need none."""
        return chat_format(self.tokenizer)

    @cached_property
    def text(self) -> str:
        """The prompt as text; "" where it is not known."""
        if not is_conversation(self.prompt):
            return self.prompt if isinstance(self.prompt, str) else ""
        opens = self.prompt[-1]["role"] != "assistant"
        how = {"add_generation_prompt" if opens else "continue_final_message": True}
        text = self._render(self.prompt, None, **how)
        _check_written(self.prompt, text)
        self._check_tools([], self.prompt, self.tools or [], **how)
        return text

    @cached_property
    def ids(self) -> list[int]:
        """Token ids."""
        if isinstance(self.prompt, list) and not is_conversation(self.prompt):
            return list(self.prompt)
        return self._encode(self.text)

    def response_ids(
        self, answer: str | list[Message] | list[int], learned: bool = False
    ) -> list[int]:
        """Token ids of an answer: what the template writes for it, or the text, and the token that
        ends the turn, once; or ids already made. They follow on `ids`. Of an answer that is
        `learned` the template must write the thoughts too."""
        if not isinstance(answer, str) and not is_conversation(answer):
            return list(answer)
        reply = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        if not is_conversation(self.prompt) and len(reply) > 1:
            raise Dropped("several messages answer a text")
        text = reply[0]["content"]
        if is_conversation(self.prompt):
            text = self._written(reply, learned).removesuffix(self.format.beyond)
        # Up to the first of the stop tokens in which it ends, with nothing but space between them.
        rest, end, stops = text.rstrip(), None, tuple(filter(str.strip, self.format.stops))
        while rest.endswith(stops):
            end = len(rest)
            rest = rest.removesuffix(next(s for s in stops if rest.endswith(s))).rstrip()
        ids, eos = self._following(text[:end]), self.tokenizer.eos_token_id
        while end is None and ids[-1:] == [eos]:  # one that is read as space
            ids.pop()
        return [*ids, eos] if end is None else ids

    def learned_ids(self, answer: str | list[Message] | list[int]) -> list[int]:
        """`response_ids` of an answer to learn from. Raises Dropped too where the template cuts its
        thoughts, and where a single message goes on after a token that ends turns: none that is
        sampled does."""
        ids = self.response_ids(answer, learned=True)
        one = isinstance(answer, str) or (len(answer) == 1 and is_conversation(answer))
        if one and not set(ids[:-1]).isdisjoint(self.format.stops.values()):
            raise Dropped(GOES_ON)
        return ids

    def assistant_mask(self, answer: list[Message], ids: list[int]) -> list[int]:
        """Which of an answer's `response_ids` the assistant writes: 1. What tools return is 0, and
        what the template writes around that: from the token that ends the turn of the call to where
        the assistant goes on."""
        (before, reply), goes_on = self._before(answer), 0
        turns, mask = [*before, *reply], [1] * len(ids)
        whole = self._render(turns)

        def shared(written: str) -> int:
            same = os.path.commonprefix([whole, written])[len(self.text) :]
            return len(os.path.commonprefix([ids, self._following(same)]))

        for first in range(len(before) + 1, len(turns)):
            if turns[first]["role"] != "tool" or turns[first - 1]["role"] == "tool":
                continue
            after = first
            while turns[after : after + 1] and turns[after]["role"] == "tool":
                after += 1
            # Results begin and end where others would be written differently.
            results = [dict(turn) for turn in turns[first:after]]
            results[0]["content"] = _unlike(results[0]["content"]) + results[0]["content"]
            results[-1]["content"] += _unlike(results[-1]["content"])
            other = self._render([*turns[:first], *results, *turns[after:]])
            begin = shared(other)
            stops = [i for i in range(goes_on, begin) if ids[i] in self.format.stops.values()]
            begin = stops[-1] + 1 if stops else begin
            alike = len(os.path.commonprefix([whole[::-1], other[::-1]]))
            goes_on = shared(whole[: len(whole) - alike])
            if after < len(turns):
                opened = self._render(turns[:after], add_generation_prompt=True)
                goes_on = max(goes_on, shared(opened))
            mask[begin:goes_on] = [0] * (goes_on - begin)
        return mask

    def _before(self, reply: list[Message]) -> tuple[list[Message], list[Message]]:
        """The turns before an answer and its own, with the beginning that the prompt has of it."""
        assert is_conversation(self.prompt)
        if self.prompt[-1]["role"] != "assistant":
            return self.prompt, reply
        content = self.prompt[-1]["content"] + reply[0]["content"]
        return self.prompt[:-1], [{**reply[0], "content": content}, *reply[1:]]

    def _written(self, reply: list[Message], learned: bool) -> str:
        """What the template adds when an answer follows the prompt."""
        before, turns = self._before(reply)
        whole = self._render([*before, *turns])
        if not whole.startswith(self.text):
            raise Dropped(NO_BEGINNING)
        text = whole[len(self.text) :]
        _check_written(reply, text, learned)
        self._check_tools(before, turns, [])
        return text

    def _check_tools(
        self, before: list[Message], turns: list[Message], tools: Tools, **how: bool
    ) -> None:
        """Raises Dropped where the template leaves out tools, or a part of some turns with tools'
        calls or results."""
        if not tools and not any(t["role"] == "tool" or t.get("tool_calls") for t in turns):
            return
        turns, tools, marks = _marked(turns, tools)
        text = self._render([*before, *turns], tools, **how)
        for mark, what in marks.items():
            if mark not in text:
                raise Dropped(f"{LEFT_OUT} {what}")

    def _render(self, turns: list[Message], tools: Tools | None = None, **how: bool) -> str:
        tools = tools or self.tools
        return _render(self.tokenizer, turns, self.format.in_parts, tools=tools, **how)

    def _encode(self, text: str) -> list[int]:
        """Ids of a text from its beginning on: bos once, and no eos that the tokenizer adds."""
        if is_conversation(self.prompt):
            ids = _plain_ids(self.tokenizer, text)
        else:
            ids = _ids(self.tokenizer, text, True)
            ids = ids[:-1] if self.format.closes and len(ids) > 1 else ids
        return ids[1:] if len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id else ids

    def _following(self, text: str) -> list[int]:
        """Ids of a text that follows the prompt: as in the joint text, where the seam lies between
        two tokens of it, else as after a line break."""
        if is_conversation(self.prompt) or (self.format.stray and self.text):
            whole = self._encode(self.text + text)
            if whole[: len(self.ids)] == self.ids:
                return whole[len(self.ids) :]
        if self.format.stray:
            newline, both = (_plain_ids(self.tokenizer, t) for t in ("\n", "\n" + text))
            if both[: len(newline)] == newline:
                return both[len(newline) :]
        return _plain_ids(self.tokenizer, text)


def _plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return _ids(tokenizer, text, False)


def _ids(tokenizer: Tokenizer, text: str, special: bool) -> list[int]:
    """Token ids of a text, with or without the tokens that the tokenizer adds; from the library
    below transformers where transformers would do no more than ask it, in half the time."""
    below = getattr(tokenizer, "_tokenizer", None)
    if below is not None and _asks(tokenizer.__class__):
        # What an earlier call has left there, transformers takes back first.
        left = below.truncation or below.padding or below.encode_special_tokens
        if not (left or tokenizer.split_special_tokens):
            return list(below.encode(text, add_special_tokens=special).ids)
    ids: list[int] = tokenizer(text, add_special_tokens=special).input_ids
    return ids


def _asks(kind: type[object]) -> bool:
    """Whether a class of tokenizers is transformers' own over the tokenizers library."""
    from transformers import PreTrainedTokenizerFast as Known

    names = ("__call__", "_encode_plus", "set_truncation_and_padding")
    return issubclass(kind, Known) and all(getattr(kind, n) is getattr(Known, n) for n in names)


def _render(tokenizer: Tokenizer, turns: list[Message], in_parts: bool, **settings: Setting) -> str:
    """A conversation as the template writes it; `settings` go to transformers. Raises Dropped with
    what the template says."""
    errors = []
    for as_text in (False, True):
        try:
            formed = [_formed(message, in_parts, as_text) for message in turns]
            return str(tokenizer.apply_chat_template(formed, tokenize=False, **settings))
        except Exception as refused:  # the template is somebody's program: it raises what it likes
            errors.append(first_line(refused))
    raise Dropped(f"{REFUSED}: {errors[0][:100]}")


def _formed(message: Message, in_parts: bool, as_text: bool) -> Message:
    """A message as a template wants it: its content in parts or not, the arguments of its tool
    calls as an object or as JSON text."""
    formed = dict(message)
    if in_parts:
        formed["content"] = [{"type": "text", "text": message["content"]}]
    if thoughts := message.get("reasoning_content"):
        formed["thinking"] = thoughts  # gpt-oss' templates, and LFM's, know it by this name
    calls = []
    for call in message.get("tool_calls") or []:
        given = call["function"].get("arguments", {})
        if as_text != isinstance(given, str):
            given = json.dumps(given, ensure_ascii=False) if as_text else json.loads(given)
        calls.append({**call, "function": {**call["function"], "arguments": given}})
    return {**formed, "tool_calls": calls} if calls else formed


def _unlike(text: str) -> str:
    """A character that a text neither begins nor ends with."""
    return next(c for c in "ABC" if c not in (text[:1], text[-1:]))


def _marked(turns: list[Message], tools: Tools) -> tuple[list[Message], Tools, dict[str, str]]:
    """Turns and tools with a mark at the end of every text and at every name of a tool or a call,
    and what each mark stands for. Their own words may stand elsewhere too, a mark does not."""
    marks: dict[str, str] = {}

    def mark(text: str, what: str) -> str:
        marks[made := f"xq{len(marks)}qx"] = what
        return text + made

    def named(function: Message, what: str) -> Message:
        return {**function, "name": mark(function["name"], what)}

    marked = []
    for turn in turns:
        if turn["content"]:
            turn = {**turn, "content": mark(turn["content"], f"a turn of {turn['role']}")}
        if calls := turn.get("tool_calls"):
            calls = [{**c, "function": named(c["function"], "tool calls")} for c in calls]
            turn = {**turn, "tool_calls": calls}
        marked.append(turn)
    schemas = [
        {**t, "function": named(t["function"], "tools")} if "function" in t else named(t, "tools")
        for t in tools
    ]
    return marked, schemas, marks


def _check_written(messages: list[Message], text: str, learned: bool = False) -> None:
    """Raises Dropped where the template has left out a text. Thoughts of earlier turns it leaves
    out on purpose; of an answer that is `learned` they must stand before the rest."""
    for message in messages:
        answer, thoughts = str(message.get("content") or ""), []
        if message["role"] == "assistant":
            inside, _, answer = answer.rpartition("</think>")
            thoughts = [str(message.get("reasoning_content") or ""), *THINK_TAG.split(inside)]
        answer = answer.strip()
        if _end_of(answer, text, 0) < 0:
            raise Dropped(f"{LEFT_OUT} a turn of {message['role']}")
        at = 0
        for piece in [*thoughts, answer] if learned else []:
            if (at := _end_of(piece.strip(), text, at)) < 0:
                raise Dropped(f"{LEFT_OUT} the reasoning of an answer")


def _end_of(piece: str, text: str, start: int) -> int:
    """Where a piece of text ends in another, from `start` on, as it is or as JSON has it; or -1."""
    for written in (piece, json.dumps(piece, ensure_ascii=False)[1:-1]):
        if (found := text.find(written, start)) >= 0:
            return found + len(written)
    return -1
