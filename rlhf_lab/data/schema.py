"""A row of ours, and how a row of other people's becomes it.

Ours: `prompt` (text, or a list of messages), `completion`, `chosen`, `rejected` (text, or a list of
messages where an answer has several), `label` (true: a good answer), `tools`. `recognise`
(recognise.py) finds where they stand in a file; `convert` makes rows of ours out of one of theirs,
or raises Dropped with the reason it is counted under.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .images import holds_image, marks_image
from .mapping import GROUP, TIE, Fields, Get, letter, merits, plain, preferred
from .messages import (
    CONTENT,
    NO_TEXT,
    Cell,
    Row,
    conversation,
    history,
    joined,
    listed,
    missing,
    plainly_text,
    rounds,
    structure,
    text,
    tools,
)
from .messages import Answer as Answer
from .messages import Dropped as Dropped
from .messages import Example as Example
from .messages import Message as Message
from .messages import Prompt as Prompt
from .shapes import Read

if TYPE_CHECKING:
    from .report import Report

ANSWERS = ("completion", "chosen", "rejected")
CONTEXT = ("prompt", "system", "history", "tools")


@dataclass(frozen=True)
class Shape:
    """Where each of our fields stands in a row, what decides, and how texts are put together.

    `decides` says what decides where no column does. `extra` is a column that is added to the
    prompt; `separator` parts text prompts and answers; `repeated`: texts of answers begin with the
    prompt, which is taken off. `waits`: prompts are conversations that wait for an answer; `images`
    are columns of pictures, sound or films. `simple`: our fields and their columns, where nothing
    else is to be done.
    """

    fields: Fields
    get: Mapping[str, Get]
    name: str = ""
    extra: str | None = None
    separator: str = ""
    decides: str = ""
    repeated: bool = False
    chat: bool = False
    waits: bool = False
    images: tuple[str, ...] = ()
    simple: tuple[tuple[str, str], ...] = ()
    read: Read | None = None
    meanings: Mapping[str, int] = field(default_factory=dict)
    labels: Mapping[str, bool] = field(default_factory=dict)

    def __str__(self) -> str:
        found, of = [], self.fields
        if not of.prompt:
            found.append("prompt = what comes before the last answer")
        shown = {k: p for k, p in of.paths().items() if not k.startswith(of.decider or "\0")}
        found += [f"{ours} = {theirs!r}" for ours, theirs in shown.items()]
        if self.extra:
            found.append(f"{self.extra!r} added to the prompt")
        if self.separator:
            found.append("a line break between prompt and answer")
        if self.repeated:
            found.append("the prompt, which the answers repeat, taken off them")
        if of.decider:
            found.append(self.decision())
        return (f"{self.name}: " if self.name else "") + ", ".join(found)

    @property
    def has_answers(self) -> bool:
        """Whether rows hold answers, and not prompts alone."""
        return bool(self.fields.answers) or any(getattr(self.fields, f) for f in ANSWERS)

    def decision(self) -> str:
        """What decides, and which way."""
        of = self.fields
        if of.decider == "winner":
            means = {v: i for v, i in self.meanings.items() if i != TIE}
            wins = ", ".join(f"{v} → {letter(i)} is chosen" for v, i in means.items())
            return f"{of.winner!r} decides: {wins}"
        if of.decider == "preference":
            other = "B" if of.positive == "A" else "A"
            below = f"{of.positive} is chosen, below 0 → {other}"
            return f"{of.preference!r} decides: above 0 → {below}{self._margin()}"
        deciding = self.decides or " and ".join(map(repr, getattr(of, of.decider)))
        way = "lower" if of.decider == "ranks" else "higher"
        most = "every pair of answers" if of.pairs == "all" else "the best against the worst"
        does = "decides" if len(getattr(of, of.decider)) == 1 else "decide"
        return f"{deciding} {does}: the {way} is chosen, {most}{self._margin()}"

    def _margin(self) -> str:
        return f", less than {self.fields.margin:g} apart is a tie" if self.fields.margin else ""


# ------------------------------------------------------------------------------------ one row


def convert(row: object, shape: Shape, report: Report | None = None) -> list[Example]:
    """The rows of ours that a row makes. Raises Dropped with the reason.

    `report` counts what is left out of a row that is kept.
    """
    if isinstance(row, Dropped):  # a reader's word
        raise row
    if not isinstance(row, Mapping):
        raise Dropped("wrong type")
    if shape.images and any(holds_image(row.get(c)) for c in shape.images):
        raise Dropped(NO_TEXT)
    if shape.simple and (example := _simple(row, shape)):
        return [example]
    found = _converted(row, shape, report)
    if any(marks_image(example["prompt"]) for example in found[:1]):
        raise Dropped(NO_TEXT)
    return found


def _converted(row: Row, shape: Shape, report: Report | None) -> list[Example]:
    """The rows of ours of a row that has to be looked at."""
    get, of = shape.get, shape.fields
    context = {f: get[f](row) for f in CONTEXT if f in get}
    if shape.extra and not missing(extra := row.get(shape.extra)):
        context["prompt"] = f"{text(context['prompt'])}\n{text(extra).strip()}"
    if of.answers:
        return [_example(context, c, shape, report) for c in _decided(row, shape, report)]
    cells = {f: cell for f in ANSWERS if f in get and not missing(cell := get[f](row))}
    if ("chosen" in cells) != ("rejected" in cells):
        cells = {f: c for f, c in cells.items() if f == "completion"}
    if not cells and shape.has_answers:
        _example(context, cells, shape, report)  # a wrong prompt has a reason of its own
        raise Dropped("empty")
    if "chosen" in cells and not _texts(context.get("prompt")):
        chosen, rejected = (
            cell if _texts(cell) else [cell] for cell in (cells["chosen"], cells["rejected"])
        )
        if len(chosen) * len(rejected) > 1 or _texts(cells["chosen"]):
            every = [{"chosen": a, "rejected": b} for a in chosen for b in rejected]
            return [_example(context, pair, shape, report) for pair in every]
    example = _example(context, cells, shape, report)
    if "label" in get:
        value = plain(get["label"](row))
        if value not in shape.labels:
            raise Dropped("no label")
        example["label"] = shape.labels[value]
    return [example]


def _simple(row: Row, shape: Shape) -> Example | None:
    """A row of plain texts, at once; None for one that has to be looked at."""
    example: Example = {}
    for ours, column in shape.simple:
        if not plainly_text(value := row.get(column)):
            return None
        if ours == "prompt" and marks_image(str(value)):
            raise Dropped(NO_TEXT)
        example[ours] = value
    if not example["prompt"].endswith(shape.separator):
        example["prompt"] += shape.separator
    return example


def _decided(row: Row, shape: Shape, report: Report | None) -> list[Example]:
    """The pairs of answers (cells) that a row prefers one to the other."""
    of, get = shape.fields, shape.get
    by_item = of.each or of.group
    if by_item:
        items: list[Cell] = [structure(i) for i in _list_of(listed(get["each"](row)))]
        if not all(isinstance(i, Mapping) for i in items):
            raise Dropped("wrong type")
        cells = [get["answers"](i) for i in items]
    else:
        cells = [get[k](row) for k in get if k.startswith("answer")]
        cells = _list_of(cells[0]) if len(of.answers) == 1 else cells
    deciding = [k for k in get if k.startswith(of.decider)]
    if by_item and of.decider in ("scores", "ranks"):
        decides = [[get[deciding[0]](i) for i in items]]
    else:
        decides = [get[k](row) for k in deciding]
    if sum(not missing(c) for c in cells) < 2:
        rows = " (rows of one prompt must follow each other)" if of.group else ""
        raise Dropped(f"fewer than two answers{rows}")
    try:
        found = merits(of, decides, len(cells), shape.meanings)
        # A missing answer can be neither chosen nor rejected.
        pairs = preferred([None if missing(c) else m for m, c in zip(found, cells)], of)
    except Dropped as reason:
        if str(reason) != "a tie" or of.ties == "drop":
            raise
        if report:
            report.tied += 1
        return [{"completion": cell} for cell in cells if not missing(cell)]
    if report:
        report.unused += len(cells) - len({i for pair in pairs for i in pair})
    return [{"chosen": cells[i], "rejected": cells[j]} for i, j in pairs]


def _list_of(cell: object) -> list[Cell]:
    found = structure(cell)
    if not isinstance(found, (list, tuple)):
        raise Dropped("wrong type")
    return list(found)


def _texts(cell: object) -> bool:
    """Whether a cell is a list of texts."""
    cell = cell if isinstance(cell, str) else structure(cell)
    return isinstance(cell, list) and bool(cell) and all(isinstance(c, str) for c in cell)


def _example(context: Row, cells: Row, shape: Shape, report: Report | None) -> Example:
    """One row of ours out of the cells of its fields."""
    asked = context.get("prompt")
    if turns := _asked_in_rounds(asked, cells):
        asked, cells = None, turns
    answers = {
        f: cell if plainly_text(cell) else _conversation(bare := _bare(cell)) or text(bare)
        for f, cell in cells.items()
    }
    before: str | list[Message] | None = None
    if plainly_text(asked):
        before = asked
    elif not missing(asked):
        found = _conversation(asked)
        before = [t for t in found if t["content"] or len(t) > 2] if found else text(asked)
        if not before:  # an HH dialogue that asks nothing
            raise Dropped("empty")
    texts = [a for a in answers.values() if isinstance(a, str)]
    if isinstance(before, str) and len(texts) == len(answers) and not shape.chat:
        return _of_texts(before, dict(zip(answers, texts)), shape)
    if before is None and len(texts) == len(answers):
        raise Dropped("no prompt" if answers and not shape.fields.prompt else "empty")
    return _of_turns(before, answers, context, shape, report)


def _bare(cell: object) -> object:
    """An answer out of an object that holds it as a text, and has no role."""
    if not isinstance(cell, Mapping) or cell.keys() & {"role", "from"}:
        return cell
    return next((v for k in CONTENT if isinstance(v := cell.get(k), str)), cell)


def _conversation(cell: object) -> list[Message]:
    turns = conversation(cell)
    if turns and turns[-1]["role"] == "user" and not turns[-1]["content"]:
        raise Dropped("empty")
    return turns


def _asked_in_rounds(asked: object, cells: Row) -> Example:
    """Conversations whose prompts are one list of texts and whose answers another (as JSON, too);
    {} for anything else."""
    if isinstance(asked, str) and asked[:2] not in ('["', "['"):
        return {}
    listed = {f: structure(c) for f, c in cells.items()}
    if not _texts(turns := structure(asked)) or not all(
        isinstance(c, list) for c in listed.values()
    ):
        return {}
    return {f: rounds(turns, c) for f, c in listed.items()}


def _of_texts(prompt: str, answers: Mapping[str, str], shape: Shape) -> Example:
    """A row whose prompt and answers are text."""
    if shape.repeated and (bare := prompt.strip()):
        if all(a.startswith(bare) and a[len(bare) :].strip() for a in answers.values()):
            answers = {f: a[len(bare) :] for f, a in answers.items()}
            prompt = bare
    if not prompt.endswith(shape.separator):
        prompt += shape.separator
    return {"prompt": prompt, **answers}


def _of_turns(
    asked: str | list[Message] | None,
    answers: Mapping[str, Answer],
    context: Row,
    shape: Shape,
    report: Report | None,
) -> Example:
    """A row whose prompt is a conversation: all turns before the answer."""
    before = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked or []
    prompts, answered = [], dict(answers)
    for ours, answer in answers.items():
        if isinstance(answer, str):
            answered[ours] = [{"role": "assistant", "content": answer}]
        elif answer[0]["role"] != "assistant" or any(m["role"] == "user" for m in answer):
            found, answered[ours] = _split(answer)  # it holds the prompt too
            prompts.append(_with_what_is_beside(found, asked, before))
    if any(prompt != prompts[0] for prompt in prompts):
        prompts[0] = _parted(prompts, answered, shape)
        if report:
            report.parted += 1
    prompt = prompts[0] if prompts else before
    if not missing(context.get("history")):
        earlier = history(context["history"])
        at = int(bool(prompt) and prompt[0]["role"] == "system")
        if prompt[at : at + len(earlier)] != earlier:
            prompt = [*prompt[:at], *earlier, *prompt[at:]]
    if not missing(context.get("system")):
        system = {"role": "system", "content": text(joined(context["system"]))}
        if prompt and prompt[0]["role"] == "system" and prompt[0] != system:
            raise Dropped("two system prompts")
        prompt = prompt if prompt[:1] == [system] else [system, *prompt]
    if not prompt:
        raise Dropped("no prompt")
    if shape.waits and prompt[-1]["role"] == "assistant":
        raise Dropped("a conversation that ends with an answer, where most wait for one")
    example: Example = {"prompt": prompt}
    example |= {ours: _short(turns) for ours, turns in answered.items()}
    offered = tools(context.get("tools"))
    return example | ({"tools": offered} if offered else {})


def _parted(
    prompts: list[list[Message]], answered: dict[str, Answer], shape: Shape
) -> list[Message]:
    """Where two conversations part before their last answers: the prompt that they share, with the
    answers that follow it put into `answered` if the mapping says so. Raises Dropped if not.

    Who preferred one conversation to the other preferred nothing among their first answers.
    """
    wholes = {
        f: [*prompt, *a] for (f, a), prompt in zip(answered.items(), prompts) if isinstance(a, list)
    }
    same = 0
    while len({repr(w[same : same + 1]) for w in wholes.values()}) == 1:
        same += 1
    while same and any(
        w[same : same + 1] and w[same]["role"] != "assistant" for w in wholes.values()
    ):
        same -= 1
    if not same or len(prompts) < len(answered):
        raise Dropped("prompts differ")
    if shape.fields.parted != "pair":
        raise Dropped(
            "conversations that part before the last answer (parted=pair pairs them there)"
        )
    for f, whole in wholes.items():
        further = (
            i for i in range(same, len(whole)) if whole[i]["role"] not in ("assistant", "tool")
        )
        answered[f] = whole[same : next(further, len(whole))]
    return next(iter(wholes.values()))[:same]


def _split(turns: list[Message]) -> tuple[list[Message], list[Message]]:
    """A conversation as its prompt (up to the last user turn) and its answer."""
    roles = [m["role"] for m in turns]
    asked = [i for i, role in enumerate(roles) if role == "user"]
    at = (
        asked[-1] + 1 if asked else roles.index("assistant") if "assistant" in roles else len(roles)
    )
    answer = turns[at:]
    if not answer or answer[0]["role"] != "assistant" or answer[-1]["role"] != "assistant":
        raise Dropped("no answer at the end")
    return turns[:at], answer


def _short(answer: Answer) -> Answer:
    """One message that is nothing but text, as text."""
    if isinstance(answer, str):
        return answer
    if any(m["role"] not in ("assistant", "tool") for m in answer):
        raise Dropped("an answer with turns of others in it")
    if answer[-1]["role"] != "assistant":
        raise Dropped("no answer at the end")
    if not answer[-1]["content"] and "tool_calls" not in answer[-1]:
        raise Dropped("empty")
    return text(answer[0]["content"]) if len(answer) == 1 and len(answer[0]) == 2 else answer


def _with_what_is_beside(
    found: list[Message], asked: str | list[Message] | None, before: list[Message]
) -> list[Message]:
    """A conversation's prompt, with the system turn of a prompt beside it.

    Raises Dropped where that prompt says something which the conversation does not.
    """
    if not before:
        return found
    if isinstance(asked, str):
        if not any(asked.strip() in m["content"] for m in found):
            raise Dropped("a prompt that is not in the conversation")
        return found
    system = [m for m in before if m["role"] == "system"]
    if any(m not in found for m in before if m["role"] != "system"):
        raise Dropped("a prompt that is not in the conversation")
    if not system or found[:1] == system[:1]:
        return found
    if found[0]["role"] == "system":
        raise Dropped("two system prompts")
    return [*system, *found]


# ------------------------------------------------------------------------------ rows before that


def grouped(rows: Iterable[object], shape: Shape) -> Iterator[object]:
    """Rows as a shape takes them: those that share their group, one after the other, as one row
    each; then what a reader makes of each."""
    for row in _groups(rows, shape) if shape.fields.group else rows:
        if shape.read is None or not isinstance(row, Mapping):
            yield row
            continue
        try:
            yield from shape.read(row.get(GROUP, row))
        except Dropped as reason:
            yield reason


def _groups(rows: Iterable[object], shape: Shape) -> Iterator[object]:
    key: object = None
    group: list[Row] = []
    for row in rows:
        if not isinstance(row, Mapping):
            yield row
            continue
        here = shape.get["group"](row)
        if group and here != key:
            yield {**group[0], GROUP: group}
            group = []
        key = here
        group.append(row)
    if group:
        yield {**group[0], GROUP: group}
