"""Which shape a file has: named ones first (shapes.yaml), then columns by their names.

What could be read in two ways is refused in one line, with a mapping that says which.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ..display import counted, did_you_mean
from .beside import (
    BELONGS,
    check_before,
    check_mended,
    check_signs,
    inner_labels,
    last_role,
    place_conversations,
)
from .images import image_columns
from .labels import (
    LABEL,
    NOT_BETTER,
    OF_BAD,
    WORSE,
    Rows,
    answer_columns,
    copied,
    direction,
    holds_flags,
    holds_lists,
    holds_texts,
    is_label,
    name_answers,
    names_worse,
    says_better,
    words,
)
from .mapping import (
    DECIDERS,
    GROUP,
    LETTERS,
    TIE,
    FieldMap,
    Fields,
    Get,
    Refused,
    checked,
    getter,
    mentions,
    names_of,
    number,
    plain,
    shown_list,
    tag_of,
)
from .messages import (
    BAD,
    GOOD,
    TABLE,
    TIES,
    Dropped,
    Example,
    listed,
    missing,
    structure,
)
from .schema import ANSWERS, CONTEXT, Shape, convert, grouped
from .shapes import READERS, Named, named_shapes
from .suggest import (
    ask,
    by_place,
    likely_prompt,
    maps_answers,
    means_by,
    path_of,
    says_good,
)

NAMES: dict[str, list[str]] = TABLE["names"]
"""Names under which people store each field. An `input` beside `instruction` belongs to the prompt;
`messages` holds prompt and completion in one."""
CONVERSATIONS, PAIRS = TABLE["conversations"], TABLE["pairs"]
OF_READER = {"margin", "ties", "pairs", "ignore"}
OWN = {"answers", "chosen", "rejected", "completion", "each", "group", "label", "rows"}
"""What a user may say of a shape that a reader reads; and what makes a mapping the user's own."""


def recognise(rows: Sequence[object], given: Mapping[str, object] | None, name: str) -> Shape:
    """The shape of some rows; `given` (`mapping.Fields` as a dict) says what must not be guessed.

    Raises ValueError with one line when there is no prompt, nothing to train on, or two readings.
    """
    mappings = [r for r in rows if isinstance(r, Mapping)]
    have = list(dict.fromkeys(str(k) for r in mappings for k in r))
    filled = [k for k in have if any(not missing(r.get(k)) for r in mappings)]
    user = checked(given or {}, name)
    if not have:
        raise ValueError(f"{name} must hold a list of objects, one per row: it has none")
    fitting = [
        s
        for s in named_shapes()
        if s.matches(have if s.reader else filled) and not user.keys() & OWN
    ]
    for named in fitting:
        if named.reader and not user.keys() <= OF_READER:
            continue
        try:
            return _named(named, rows, mappings, have, user, name)
        except Unfit:
            if user:
                raise
    fields = Fields(**_guessed(mappings, filled, user, name))
    shape = ready(fields, mappings, have, name)
    _check(fields, mappings, have, name)
    _check_labels(fields, mappings, filled, name)
    if not user.keys() & {*CONTEXT}:
        check_before(fields, mappings, filled, name)
    waits = fields.prompt.lower() in CONVERSATIONS and "prompt" not in user
    shape = replace(shape, name="KTO, labelled answers" if fields.label else "", waits=waits)
    return _with_seams(shape, rows, name)


class Unfit(ValueError):
    """A path that finds nothing in any row."""


def _named(
    named: Named,
    rows: Sequence[object],
    mappings: Rows,
    have: Sequence[str],
    user: FieldMap,
    name: str,
) -> Shape:
    """A named shape, made ready for its rows. Raises Unfit where they lack what it reads."""
    fields = Fields(**_merged(named, mappings, have, user, name))
    read = READERS[named.reader] if named.reader else None
    if read:
        get = {"group": getter(fields.group, have, "group", name)} if fields.group else {}
        made = list(grouped(mappings, Shape(fields, get, read=read)))
        mended = [r for r in made if isinstance(r, Dropped) and r.example]
        mappings = [r for r in made if isinstance(r, Mapping)]
        if mended and not mappings:
            raise Refused(f"{name}: {mended[0]}: {{fields}}", mended[0].example)
        have = [*have, "prompt", "answers"]
    shape = ready(fields, mappings, have, name)
    _check(fields, mappings, have, name)
    if fields.values and "values" not in user:
        seen = {plain(shape.get["winner 1"](r)) for r in mappings} - shape.meanings.keys()
        if odd := [v for v in seen if number(v) is not None]:
            raise Unfit(f"{name}: {fields.winner!r} holds {odd[0]}, and {named.name} do not")
    if not (read or user.keys() & {*CONTEXT}):
        check_before(fields, mappings, have, name)
    shape = replace(shape, name=named.name, decides=named.decides, read=read)
    return _with_seams(shape, rows, name)


def _merged(named: Named, rows: Rows, have: Sequence[str], user: FieldMap, name: str) -> FieldMap:
    """A named shape's mapping, with what the user says instead, and with the system prompt, history
    and tools that are there."""
    known = checked(named.fields, name)
    deciders = {*DECIDERS, "positive"}
    if user.keys() & deciders:
        gone = deciders if "winner" in user else deciders | {"values"}
        known = {k: v for k, v in known.items() if k not in gone}
    for beside in () if named.reader else ("system", "history", "tools"):
        names = (c for n in NAMES[beside] for c in have if c.lower() == n)
        path = known.setdefault(beside, next(names, beside))
        get = getter(path, have, beside, name)
        if path == known.get("prompt") or all(missing(get(r)) for r in rows):
            del known[beside]
    return known | user


# ------------------------------------------------------------------------------ guessing by name


def _guessed(rows: Rows, filled: Sequence[str], user: FieldMap, name: str) -> FieldMap:
    """Our fields by the names of the columns, where the user has named none."""
    found = dict(user)
    used = [c for v in user.values() for c in (v if isinstance(v, tuple) else [v])]
    pair = [user[f] for f in ("chosen", "rejected") if f in user]
    free = {
        re.sub("[ -]", "_", c.lower()): c
        for c in reversed(filled)
        if c not in used and not any(mentions(path, c) for path in pair)
    }
    several = bool(user.keys() & {"answers", "each"})
    names = {**NAMES, "completion": [*NAMES["completion"], *CONVERSATIONS]}
    for ours in names.keys() - user.keys() - ({"completion", "label"} if several else set()):
        column = next((free[n] for n in names[ours] if n in free), None)
        found |= {ours: column} if column else {}
    answered = several or bool(user.keys() & set(ANSWERS))
    if not several and not user.keys() & {"chosen", "rejected"}:
        pair = next((p for p in PAIRS if free.keys() >= set(p)), PAIRS[0])
        found |= {f: free[c] for f, c in zip(("chosen", "rejected"), pair) if c in free}
        one = found.keys() & {"chosen", "rejected"}
        if "completion" in found and all(
            is_label(found[o], rows) and (len(one) == 1 or holds_flags(rows, found[o])) for o in one
        ):  # they say whether the answer beside them was chosen
            found = {k: v for k, v in found.items() if k not in one}
    if "history" not in found and last_role(rows[0].get(free.get("context", ""))):
        alone = not found.keys() & {"prompt", "chosen"} and not free.keys() & {*CONVERSATIONS}
        found["prompt" if alone else "history"] = free["context"]
    rest = [c for c in filled if c in free.values() and c != found.get("prompt")]
    if not answered:
        found = _two_answers(rows, rest, found, name)
    if "label" in found and "label" not in user:
        known = {plain(r.get(found["label"])) for r in rows} - {""}
        if "completion" not in found or not known or not known <= {"true", "false"}:
            del found["label"]
    if "completion" not in user:
        place_conversations(rows, found, free, user)
    return found


def _two_answers(rows: Rows, rest: Sequence[str], found: FieldMap, name: str) -> FieldMap:
    """Answers side by side, with the column that names the winner; as `found` where there are none.

    Raises Refused where nothing says beyond doubt which answer is better.
    """
    answers = answer_columns(rows, rest)
    deciding = [c for c in rest if c not in answers and says_better(c)]
    better = [c for c in deciding if direction(c) > 0]
    if names_of(answers).keys() & {plain(r.get(found.get("completion", ""))) for r in rows}:
        better.append(found.pop("completion"))  # an `answer` that says A or B
        deciding.append(better[-1])
    winners = [c for c in better if len(answers) > 1 and name_answers(rows, c, answers)]
    if not winners:  # a column may name the answer that lost
        lost = [c for c in rest if c not in answers and names_worse(rows, c, answers)]
        deciding += [c for c in lost if c not in deciding]
    pair = found.keys() >= {"chosen", "rejected"} and found["chosen"] not in winners
    labels = [
        c
        for c in deciding
        if c in winners
        or not says_better(c)
        or is_label(c, rows)
        or holds_lists(rows, c)
        or names_worse(rows, c, answers)
    ]
    copies = [p for c in better if not words(c) & WORSE and (p := copied(rows, c, answers))]
    if not answers or pair or (not (labels or copies) and {"chosen", "completion"} & found.keys()):
        return found
    kept = {k: v for k, v in found.items() if k not in (*ANSWERS, "label")}
    if len({*winners, *copies}) == 1 and len(labels) <= 1:
        means = {"values": by_place(answers)} if copies else {}
        return {**kept, "answers": tuple(answers), "winner": [*winners, *copies][0], **means}
    asks = {} if "prompt" in found else {"prompt": likely_prompt(rows, [*rows[0]])}
    raise ask(name, rows, answers, labels, "look like answers to one prompt", asks)


# -------------------------------------------------------------------------- what must not be silent


def _check(of: Fields, rows: Rows, have: Sequence[str], name: str) -> None:
    """Raise ValueError, one line, for a mapping that lacks something or says too much."""
    for wrong, line, example in _rules(of, shown_list(have), likely_prompt(rows, have)):
        if wrong:
            raise Refused(f"{name}: {line}", example)


def _rules(of: Fields, columns: str, prompt: str) -> Iterator[tuple[object, str, FieldMap]]:
    """→ (whether it is broken, what is wrong, a mapping that would mend it)"""
    several, lists = bool(of.answers), of.scores or of.ranks
    deciders = [d for d in DECIDERS if getattr(of, d)]
    what = " and ".join(deciders)
    there, lacking = ("rejected", "chosen") if of.rejected else ("chosen", "rejected")
    line = f"{there} is there, {lacking} is not, among {columns}; map it with {{fields}}"
    yield bool(of.chosen) != bool(of.rejected), line, {lacking: "COLUMN"}
    line = "answers stand beside chosen, rejected or completion: map one kind of them"
    yield several and (of.chosen or of.completion), line, {}
    choose = f"decides between the answers; say one of {', '.join(DECIDERS)}: {{fields}}"
    example = {"winner": "COLUMN", "values": {"1": "A", "2": "B"}}
    yield several and len(deciders) != 1, f"{what or 'nothing'} {choose}", example
    line = f"{what} decides between answers, and none are mapped: {{fields}}"
    yield deciders and not several, line, {"answers": ["COLUMN", "COLUMN"]}
    line = f"{of.preference!r} is a signed number; say which answer is better above 0: {{fields}}"
    example = {"preference": of.preference, "positive": "A"}
    yield of.preference and of.positive not in ("A", "B"), line, example
    line = f"{counted(len(of.answers), 'answer')} and {len(lists)} {what}: give one for each"
    yield several and lists and len(lists) not in (1, len(of.answers)), line, {}
    if skips := [p for p in (*of.answers, *lists) if "[]" in p or "[*]" in p]:
        line = (
            f"{skips[:1]} skips what is missing, so that answers would stand beside the labels of "
            "others; give the list, and paths into each of its objects: {fields}"
        )
        inner = {"each": skips[0].partition("[")[0], "answers": ["PATH"], what: ["PATH"]}
        yield not of.each, line, inner
    names = ", ".join(NAMES["prompt"])
    line = f"no prompt field among {columns}; name it one of {names}, or map it with {{fields}}"
    bare = not (of.prompt or several or of.chosen or of.completion)
    texts = bare and "text" in columns[1:-1].split(", ")
    whole = "'text' holds whole texts, and what is learned is the answer to a prompt: give both, or"
    yield texts, f"{whole} part each text in Python with fields=FUNCTION", {}
    yield bare, line, {"prompt": prompt}


def _check_labels(of: Fields, rows: Rows, filled: Sequence[str], name: str) -> None:
    """Refuse columns that seem to say how good answers are, and that nobody has explained."""
    used = [*of.paths().values(), *of.ignore]
    beside = [c for c in filled if not any(mentions(p, c) for p in used)]
    labels = [c for c in beside if is_label(c, rows)]
    pair = (of.chosen, of.rejected)
    if of.chosen:
        plainly = not any(tag_of(c)[1] for c in pair)
        plainly &= any(words(c) & (LABEL | NOT_BETTER) for c in pair)
        found = [c for c in beside if name_answers(rows, c, pair)]
        found += [] if plainly else [c for c in labels if c not in found]
        if found:
            raise ask(name, rows, pair, found, "are mapped as chosen and rejected in every row", {})
    if of.completion and not (of.chosen or of.label):
        said: Rows = rows
        if not any(plain(r.get(c)) for c in labels for r in rows):  # none, or objects
            inner, paths = inner_labels(rows, of, beside)
            said, labels = (inner, paths) if paths else (rows, labels)
        if labels:
            raise Refused(
                f"{name}: {labels[0]!r} looks as if it said how good each answer is, and bad "
                "answers are no demonstrations; say which are good, {fields}, or that it means "
                "nothing: {ignore}",
                says_good(said, labels[0]),
                ignore=labels,
            )
        check_mended(of, rows, beside, name)
    prompts = {repr(r.get(of.prompt)) for r in rows}
    texts = [c for c in beside if holds_texts(rows, c, len(prompts))]
    if not (of.answers or of.chosen or of.completion) and texts:
        raise Refused(
            f"{name}: only prompts could be read, and {', '.join(map(repr, texts))} may hold "
            "answers; map them, {fields}, or say that they mean nothing: {ignore}",
            maps_answers(rows, texts),
            ignore=texts,
        )


# ------------------------------------------------------------------------------ ready for its rows


def ready(of: Fields, rows: Rows, have: Sequence[str], name: str) -> Shape:
    """A mapping with what reads each path. Raises ValueError for a path that finds nothing."""
    get: dict[str, Get] = {}
    if of.group:
        get["group"] = getter(of.group, have, "group", name)
    items, inside = rows, have
    if of.each or of.group:
        get["each"] = getter(of.each or GROUP, [*have, GROUP], "each", name)
    if of.each:
        lists = [li for r in rows if isinstance(li := listed(get["each"](r)), list)]
        items = [i for li in lists for i in map(structure, li) if isinstance(i, Mapping)]
        inside = list(dict.fromkeys(str(k) for i in items for k in i))
    for what, path in of.paths().items():
        per_item = "each" in get and what.startswith(("answers", "scores", "ranks"))
        there, looked = (inside, items) if per_item else (have, rows)
        get[what] = getter(path, there, what, name)
        if path not in there and looked and all(get[what](r) is None for r in looked):
            near = did_you_mean(path, there)
            columns = shown_list(there)
            raise Unfit(f"{name}: no column {path!r} for {what}; {near}there are {columns}")
    images = image_columns(have, [*of.paths().values(), *of.ignore])
    shape = Shape(of, get, chat=bool(of.system or of.history or of.tools), images=images)
    if of.winner:
        shape = replace(shape, meanings=_meanings(of, rows, get, name))
    if of.preference:
        check_signs(of, [get["preference 1"](r) for r in rows], name)
    labels = {**dict.fromkeys(GOOD, True), **dict.fromkeys(BAD, False)}
    if of.values and of.label:
        labels = {v: means in ("good", "true") for v, means in of.values.items()}
    elif of.label in have and direction(of.label) < 1 and words(of.label) & OF_BAD:
        raise Refused(
            f"{name}: a label is true for a good answer, and {of.label!r} seems to say the "
            "opposite; say what its values mean: {fields}",
            says_good(rows, of.label),
        )
    return replace(shape, labels=labels)


def _meanings(of: Fields, rows: Rows, get: Mapping[str, Get], name: str) -> dict[str, int]:
    """What each value of the winner's column says: the index of an answer, or TIE."""
    letters = LETTERS[: len(of.answers)] if len(of.answers) > 1 else LETTERS
    if of.values:
        wrong = [v for v in of.values.values() if v != "tie" and v not in letters]
        if wrong:
            raise ValueError(
                f"{name}: values says {wrong[0]!r}: the answers are {', '.join(letters)}"
            )
        return {v: TIE if m == "tie" else LETTERS.index(m) for v, m in of.values.items()}
    names = names_of(of.answers) if len(of.answers) > 1 else {}
    seen = list(dict.fromkeys(v for r in rows if (v := plain(get["winner 1"](r)))))
    unclear = [v for v in seen if v not in names and v not in TIES]
    if not names.keys() & set(seen) or any(number(v) is not None for v in unclear):
        raise Refused(
            f"{name}: {of.winner!r} holds {', '.join(map(repr, seen[:6])) or 'nothing'}: say what "
            "each value means, {fields} (the answers in their order, or tie)",
            means_by(rows, of.winner, of.answers),
        )
    return {v: i for v, i in names.items() if v in seen} | {v: TIE for v in seen if v in TIES}


def _with_seams(shape: Shape, rows: Sequence[object], name: str) -> Shape:
    """A shape with what else belongs to the prompt, and with what parts prompts and answers that
    are texts."""
    extra = [c for c, of in BELONGS.items() if shape.fields.prompt in of and _holds_text(rows, c)]
    shape = replace(shape, extra=extra[0] if extra else None)
    columns = list(dict.fromkeys(str(k) for r in rows if isinstance(r, Mapping) for k in r))
    rows = list(grouped(rows, shape))
    converted: list[Example] = []
    reasons: set[str] = set()
    for row in rows:
        try:
            converted += convert(row, shape)
        except Dropped as reason:
            reasons.add(str(reason))
    no_talk = all(reason.startswith(("no prompt", "wrong type")) for reason in reasons)
    if not converted and no_talk and not shape.fields.prompt:
        held = [repr(p) for f in ANSWERS if (p := getattr(shape.fields, f))] or ["the answers"]
        raise Refused(
            f"{name}: no prompt: {', '.join(held)} hold no conversation to take it from; map it "
            "with {fields}, or part texts in Python, fields=FUNCTION",
            {"prompt": likely_prompt([r for r in rows if isinstance(r, Mapping)], columns)},
        )
    whole = shape.fields.completion
    if not converted and whole and all("a list of texts" in reason for reason in reasons):
        halves = {f: f"{path_of(whole)}[0_OR_1]" for f in ("chosen", "rejected")}
        raise Refused(
            f"{name}: {whole!r} holds lists of texts; of two answers say which is the better one: "
            "{fields}",
            halves,
        )
    texts = [r for r in converted if isinstance(r["prompt"], str)]
    seams = [(r["prompt"], r[f]) for r in texts for f in ("completion", "chosen") if f in r]
    again = sum(a.startswith(p.strip()) and len(a) > len(p.strip()) + 1 for p, a in seams)
    if seams and again >= 0.9 * len(seams):
        shape = replace(shape, repeated=True)
        seams = [(p.strip(), a[len(p.strip()) :]) for p, a in seams]
    elif not shape.has_answers:
        seams = [(r["prompt"], "") for r in texts]
    apart = sum(p[-1:].isspace() or a[:1].isspace() for p, a in seams)
    paths = tuple(shape.fields.paths().items())
    known = {f for f, _ in paths} <= {"prompt", *ANSWERS} and not shape.repeated and not shape.extra
    paths *= known and bool(shape.fields.prompt) and all(p in columns for _, p in paths)
    return replace(shape, separator="\n" if len(seams) > 2 * apart else "", simple=paths)


def _holds_text(rows: Sequence[object], column: str) -> bool:
    cells = [r.get(column) for r in rows if isinstance(r, Mapping)]
    return any(isinstance(c, str) and c.strip() for c in cells)
