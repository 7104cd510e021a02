"""You are the annotator: two responses side by side, and you choose the better one.

    labeller = Labeller(pairs, "my_preferences.jsonl", data.gold_reward, data.annotator)
    labeller                                    # a click, or the keys; each answer is saved at once
    labeller.ask()                              # the same in a terminal

Every answer is on disk (`data/preferences.py`) before the next pair appears: a killed kernel loses
none, and the same file goes on where you stopped. How well you agree with the gold reward and with
the annotator stays hidden until the end, so that it does not teach you.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import anywidget
import traitlets

from ..charts.agreement import Choice, Share, picture, shares
from ..charts.frame import Picture
from ..charts.tokens_view import real
from ..data.messages import Cell, Row
from ..data.preferences import ANSWERS, Annotations, pair_id
from ..data.schema import Prompt
from ..data.tokenize import prompt_text
from ..display import check_choice, counted
from ..world.gold_reward import Annotator
from .live import Showing

LONGEST = 20_000
"""Characters of a text that are shown."""

_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
_IN_WORDS = dict(zip(ANSWERS, ("left is better", "right is better", "a tie", "skipped")))


@dataclass(frozen=True)
class Pair:
    """Two responses as they are shown; `label`: the one that the annotator or the data prefers."""

    id: str
    prompt: Cell
    left: str
    right: str
    label: str | None


class Labeller(anywidget.AnyWidget):
    """Asks you which of two responses is better, and keeps every answer in a file.

    `pairs`: rows {"prompt", "chosen", "rejected"} (labelled by an annotator, or in a data set) or
    {"prompt", "first", "second"}. Which response stands left is drawn for each pair, by `seed`.
    `gold_reward(prompt, response)` and `annotator`, where there are any, are what your choices are
    compared with. `who`: several people may label into one file under their names. `feedback`:
    "end" hides the agreement until all pairs are labelled or you ask for it; "each" shows it after
    every answer. Raises ValueError with one line for pairs or a file that cannot be used.
    """

    _esm = Path(__file__).with_name("labeller.js")
    _css = Path(__file__).with_name("labeller.css")
    view = traitlets.Dict().tag(sync=True)  # all that the browser shows: a reload shows it again

    def __init__(
        self,
        pairs: Iterable[Row],
        file: str | Path,
        gold_reward: Callable[[str, str], float] | None = None,
        annotator: Annotator | None = None,
        *,
        who: str = "",
        seed: int = 0,
        feedback: str = "end",
    ) -> None:
        check_choice("feedback", feedback, ("end", "each"))
        self.pairs = _as_shown(pairs, annotator, seed)
        self.annotations = Annotations(file)
        self.who, self.revealed = who, feedback == "each"
        self._gold_reward, self._annotator = gold_reward, annotator
        self._gaps: dict[str, float | None] = {}
        # What undo takes back, the last one first.
        self._answer_ids = [line["id"] for line in self.annotations.answers(who)]
        self._moves, self._since = 0, time.monotonic()
        super().__init__()
        self.on_msg(self._on_message)
        self._show("")

    def __repr__(self) -> str:
        head = f"Labeller({self.done} of {len(self.pairs)} labelled"
        shares = [f"{row.name[0].lower()}{row.name[1:]}: {row.short}" for row in self._rows()]
        return "; ".join([head, *filter(None, [self.usable]), *shares]) + ")"

    def _ipython_display_(self, **_: object) -> None:
        """In a notebook: with a picture of the tally beside it, for readers without a kernel."""
        showing = Showing(self, self.still)
        self.observe(lambda _: showing.refresh(now=True), "view")

    # -- answering ----------------------------------------------------------------------------
    @property
    def current(self) -> Pair | None:
        """The pair to label now; None when all are labelled."""
        answered = self._answered()
        return next((pair for pair in self.pairs if pair.id not in answered), None)

    @property
    def done(self) -> int:
        """How many of the pairs are labelled, ties and skips among them."""
        answered = self._answered()
        return sum(pair.id in answered for pair in self.pairs)

    @property
    def counts(self) -> dict[str, int]:
        """Of the pairs: {"preferences", "ties", "skips"}."""
        ours = {pair.id for pair in self.pairs}
        answers = [answer for pair, answer in self._answered().items() if pair in ours]
        ties, skips = answers.count("tie"), answers.count("skip")
        return {"preferences": len(answers) - ties - skips, "ties": ties, "skips": skips}

    @property
    def usable(self) -> str:
        """How many of the answers make a pair to train on, in words, where not all of them do."""
        count, answers = len(self.preferences), len(self.annotations.answers(self.who))
        less = f"{count} usable of {counted(answers, 'answer')}: "
        less += "a tie or a skip makes no pair to train on"
        return less * (count < answers)

    def answer(self, choice: str, seconds: float | None = None) -> None:
        """Label the current pair: "left", "right", "tie" or "skip". Saved when this returns."""
        pair = self.current
        if pair is None:
            raise ValueError(f"all {len(self.pairs)} pairs are labelled; undo takes one back")
        if seconds is None:
            seconds = time.monotonic() - self._since
        answer_id = self.annotations.add(
            choice, pair.prompt, pair.left, pair.right, seconds=seconds, who=self.who
        )
        self._answer_ids.append(answer_id)
        self._show(f"Saved: {_IN_WORDS[choice]}.{self._verdict(pair, choice)}")

    def undo(self) -> None:
        """Take back the last answer; nothing where there is none."""
        valid = {line["id"] for line in self.annotations.answers(self.who)}
        while self._answer_ids and self._answer_ids[-1] not in valid:
            self._answer_ids.pop()
        if self._answer_ids:
            self.annotations.undo(self._answer_ids[-1], self.who)
            self._answer_ids.pop()
            self._show("Taken back: label this pair again.")
        else:
            self._show("Nothing to take back.")

    def reveal(self) -> None:
        """Show the agreement now, and from now on after every answer."""
        self.revealed = True
        self._show("")

    # -- what comes of it ---------------------------------------------------------------------
    @property
    def preferences(self) -> list[dict[str, object]]:
        """Your preferences, all that the file holds: rows {"prompt", "chosen", "rejected"}.

        Ties and skips are left out (`counts`). `lab.load_data` takes these rows.
        """
        return self.annotations.preferences(self.who)

    def tally(self) -> list[Share]:
        """Of the pairs that you decided: how often you agree with the gold reward and with the
        annotator, how often the annotator is expected to agree with the gold reward (its noise is
        yours to beat), and how often you chose the left and the longer one."""
        pairs = {pair.id: pair for pair in self.pairs}
        lines = [
            line
            for line in self.annotations.answers(self.who)
            if "chosen" in line and line["pair"] in pairs
        ]
        whose = "the data's labels" if self._annotator is None else "the annotator"
        return shares([self._choice(pairs[line["pair"]], line) for line in lines], whose)

    def still(self) -> Picture:
        """The tally as a picture, for a notebook that is read without a kernel."""
        title = f"Your labels: {self.done} of {len(self.pairs)}"
        hidden = "Agreement is hidden until all pairs are labelled." if self.done else ""
        title += f", {len(self.preferences)} of them usable" * bool(self.usable)
        return picture(self._rows(), title, hidden or "No answers yet.")

    def ask(
        self, read: Callable[[str], str] = input, write: Callable[[str], object] = print
    ) -> Labeller:
        """Label in a terminal, until all is labelled or you type q. → itself."""
        keys = {"1": "left", "2": "right", "t": "tie", "s": "skip"}
        while pair := self.current:
            write(
                f"\nPair {self.done + 1} of {len(self.pairs)}\n{shown(pair.prompt)}\n\n"
                f"[1] {shown(pair.left)}\n\n[2] {shown(pair.right)}\n"
            )
            self._since = time.monotonic()
            try:
                key = read("Better: 1 or 2 (t tie, s skip, u undo, q quit): ").strip().lower()
            except (EOFError, KeyboardInterrupt):
                key = "q"
            if key == "q":
                break
            if key == "u":
                self.undo()
            elif key in keys:
                self.answer(keys[key])
            write(self.view["note"] if key in ("u", *keys) else "Type 1, 2, t, s, u or q.")
        if self.usable:
            write(self.usable)
        write(f"{self.done} of {len(self.pairs)} labelled, saved in {self.annotations.file}")
        for row in self._rows():
            write(f"{row.name}: {row}")
        return self

    # -- comparisons --------------------------------------------------------------------------
    def _answered(self) -> dict[str, str]:
        """Pair → answer, of everything in the file."""
        return {line["pair"]: line["annotation"] for line in self.annotations.answers(self.who)}

    def _rows(self) -> list[Share]:
        """The tally, where it may be seen."""
        return self.tally() if self.revealed or self.current is None else []

    def _gap(self, pair: Pair) -> float | None:
        """Gold reward of the left less that of the right response; None where it is unknown."""
        if pair.id not in self._gaps and self._gold_reward is not None:
            try:
                left, right = (self._gold_reward(pair.prompt, r) for r in (pair.left, pair.right))
                gap = float(left) - float(right)
            except (TypeError, ValueError):  # no gold reward for this prompt
                gap = math.nan
            # Sums of the same parts may differ in the last digit.
            self._gaps[pair.id] = 0.0 if abs(gap) < 1e-9 else None if math.isnan(gap) else gap
        return self._gaps.get(pair.id)

    def _choice(self, pair: Pair, line: Row) -> Choice:
        left, gap, expected = line["chosen"] == pair.left, self._gap(pair), None
        if gap and self._annotator is not None:
            better, worse = (pair.left, pair.right) if gap > 0 else (pair.right, pair.left)
            expected = self._annotator.prefers_first(pair.prompt, better, worse)
        return Choice(
            left=line["annotation"] == "left",
            longer=len(line["chosen"].split()) - len(line["rejected"].split()),
            gold=gap if left or gap is None else -gap,
            label=None if pair.label is None else line["chosen"] == pair.label,
            expected=expected,
        )

    def _verdict(self, pair: Pair, choice: str) -> str:
        """Whether the gold reward agrees with an answer, once the agreement may be seen."""
        gap = self._gap(pair) if self.revealed and choice in ("left", "right") else None
        if gap is None:
            return ""
        if gap == 0:
            return " The gold reward has them equal."
        agrees = (gap > 0) == (choice == "left")
        verdict = "agrees" if agrees else "prefers the other"
        return f" The gold reward {verdict} (by {abs(gap):.1f})."

    def _on_message(self, _: object, message: object, __: object) -> None:
        """A message of the browser: {"do": …, "pair": the id of the pair on it, "seconds": …}."""
        fields = message if isinstance(message, dict) else {}
        do = fields.get("do")
        try:
            pair = self.current
            if do in ANSWERS and pair is not None and fields.get("pair") == pair.id:
                seconds = real(fields.get("seconds"))
                self.answer(do, None if seconds is None or seconds < 0 else seconds)
            elif do == "undo":
                self.undo()
            elif do == "reveal":
                self.reveal()
            else:  # a click that came twice: send the state again
                self._show(self.view["note"])
        except (OSError, ValueError) as error:
            self._show(f"Not saved: {error}")

    def _show(self, note: str) -> None:
        """Send the browser what there is to see."""
        pair, total = self.current, len(self.pairs)
        self._moves, self._since = self._moves + 1, time.monotonic()
        counts = [f"{n} {kind if n != 1 else kind[:-1]}" for kind, n in self.counts.items()]
        self.view = {
            "moves": self._moves,  # so that every message has an answer
            "id": pair.id if pair else "",
            "done": self.done,
            "total": total,
            "note": shown(note),
            "prompt": shown(pair.prompt) if pair else "",
            "left": shown(pair.left) if pair else "",
            "right": shown(pair.right) if pair else "",
            "counts": "; ".join(filter(None, [", ".join(counts), self.usable])),
            "file": shown(self.annotations.file.name),
            "undo": bool(self._answer_ids),
            "revealed": self.revealed or pair is None,
            "rows": [{**asdict(row), "short": row.short, "full": str(row)} for row in self._rows()],
        }


def shown(text: Prompt) -> str:
    """A text (or a conversation) as it can be shown in a browser and a terminal: no control
    characters, no half characters, nothing that turns the direction of writing."""
    text = prompt_text(text).replace("\r\n", "\n")
    more = len(text) - LONGEST
    if more > 0:
        text = f"{text[:LONGEST]}… ({more:,} more characters)"
    return _HIDDEN.sub("\N{REPLACEMENT CHARACTER}", text).strip("\n")


def _as_shown(rows: Iterable[Row], annotator: Annotator | None, seed: int) -> list[Pair]:
    """The pairs as they will be shown; each once, and none of two equal responses."""
    pairs: dict[str, Pair] = {}
    for index, row in enumerate(rows):
        names = ("chosen", "rejected") if "chosen" in row else ("first", "second")
        one, other = (row.get(name) for name in names)
        if not (isinstance(one, str) and isinstance(other, str) and "prompt" in row):
            raise ValueError(
                f"pair {index} needs a prompt and two texts, chosen and rejected (or first and "
                f"second); it has {', '.join(map(str, row)) or 'nothing'}"
            )
        if one == other:
            continue
        label = one if "chosen" in row else None
        if label is None and annotator is not None:
            try:
                label = annotator.label(index, row["prompt"], one, other)["chosen"]
            except ValueError:  # not a prompt of the annotator's world
                label = None
        name = pair_id(row["prompt"], one, other)
        # Drawn for the pair and not for who won it: the position tells nothing.
        sides = sorted([one, other])
        random.Random(f"side:{seed}:{name}").shuffle(sides)
        left, right = sides
        pairs.setdefault(name, Pair(name, row["prompt"], left, right, label))
    if not pairs:
        raise ValueError("no pairs to label: each needs two different responses")
    return list(pairs.values())
