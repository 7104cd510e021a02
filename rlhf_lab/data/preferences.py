"""A person's preferences, in a file that only grows: each is on disk before the next question.

One JSON line for each answer, and one for each answer that is taken back:

    {"annotation": "left", "id": …, "pair": …, "who": "", "prompt": …, "chosen": …, "rejected": …,
     "seconds": 4.1, "time": "2026-03-01T10:20:30+00:00"}
    {"annotation": "tie", …, "prompt": …, "first": …, "second": …, …}          and so for "skip"
    {"annotation": "undo", "id": …, "undoes": the id of an answer, …}

A line is one write at the end of the file, so that several people (or two browser windows) can
answer into the same file. A killed process can leave its last line torn: that line is left out, and
the next one starts below it.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from datetime import UTC, datetime
from pathlib import Path

from ..display import check_choice, counted
from .schema import Example, Prompt

ANSWERS = ("left", "right", "tie", "skip")
START = b'{"annotation": "'
"""How every line of such a file begins, and no other file of ours."""


def pair_id(prompt: Prompt, one: str, other: str) -> str:
    """The name of a pair: 16 hex digits of its prompt and both responses, in whatever order."""
    texts = json.dumps([prompt, *sorted([one, other])])
    return hashlib.sha256(texts.encode()).hexdigest()[:16]


def is_annotations(file: str | os.PathLike[str]) -> bool:
    """Whether a file holds annotations."""
    path = Path(file).expanduser()
    if not path.is_file():
        return False
    with open(path, "rb") as lines:
        return lines.read(len(START)) == START


class Annotations:
    """A file of annotations. It need not exist yet: the first answer makes it.

    Raises ValueError with one line for a file that holds anything else; nothing is written to it.
    """

    def __init__(self, file: str | os.PathLike[str]) -> None:
        self.file = Path(file).expanduser()
        self._forget()
        self.read()

    def __repr__(self) -> str:
        return f"Annotations({self.file.name!r}, {counted(len(self.answers()), 'answer')})"

    def answers(self, who: str | None = None) -> list[Example]:
        """The last answer to each pair, oldest first, without what was taken back.

        Each person has answers of their own; `who` picks one person's.
        """
        last: dict[tuple[str, str], Example] = {}
        for line in self._by_id.values():
            key = line["who"], line["pair"]
            if who is None or who == line["who"]:
                last.pop(key, None)  # so that it moves to the end
                last[key] = line
        return list(last.values())

    def preferences(self, who: str | None = None) -> list[Example]:
        """Rows {"prompt", "chosen", "rejected"} to train on; ties and skips are left out."""
        keys = ("prompt", "chosen", "rejected")
        return [{k: line[k] for k in keys} for line in self.answers(who) if "chosen" in line]

    # -- writing ------------------------------------------------------------------------------
    def add(
        self,
        answer: str,
        prompt: Prompt,
        left: str,
        right: str,
        *,
        seconds: float = 0.0,
        who: str = "",
    ) -> str:
        """Save one answer ("left", "right", "tie" or "skip") to a pair as it was shown. → its id.

        When this returns the answer is on disk. Raises OSError where it could not be written.
        """
        check_choice("answer", answer, ANSWERS)
        texts = {"first": left, "second": right}
        if answer in ("left", "right"):
            chosen, rejected = (left, right) if answer == "left" else (right, left)
            texts = {"chosen": chosen, "rejected": rejected}
        pair = {"pair": pair_id(prompt, left, right), "prompt": prompt, **texts}
        return self._append(answer, who, {**pair, "seconds": round(seconds, 2)})

    def undo(self, answer_id: str, who: str = "") -> str:
        """Take back an answer, by its id. → the id of this line."""
        return self._append("undo", who, {"undoes": answer_id})

    def _append(self, kind: str, who: str, content: Example) -> str:
        self.read()  # a file that has become somebody else's is left alone
        now = datetime.now(UTC).isoformat(timespec="seconds")
        head = {"annotation": kind, "id": uuid.uuid4().hex[:12], "who": who}
        line = json.dumps({**head, **content, "time": now}, allow_nan=False).encode() + b"\n"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "ab+", buffering=0) as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # torn: it keeps its line, this one gets another
                    line = b"\n" + line
            while line:
                line = line[file.write(line) :]
            os.fsync(file.fileno())
        self.read()
        return head["id"]

    # -- reading ------------------------------------------------------------------------------
    def _forget(self) -> None:
        self._by_id: dict[str, Example] = {}  # answers in the order of the file
        self._undone: set[str] = set()
        self._offset = self._lines = self.torn = 0

    def read(self) -> None:
        """Read the lines that were added since, by whomever."""
        if self.file.exists() and not self.file.is_file():
            raise ValueError(f"{self.file} is not a file: name one for the answers")
        try:
            size = self.file.stat().st_size if self.file.exists() else 0
            if size < self._offset:  # another file has taken its place
                self._forget()
            if size == self._offset:
                return
            with open(self.file, "rb") as file:
                file.seek(self._offset)
                *whole, rest = file.read().split(b"\n")
        except OSError as error:
            raise ValueError(f"cannot read {self.file}: {error.strerror or error}") from None
        for line in whole:
            self._take(line, self._lines + 1)
            self._lines, self._offset = self._lines + 1, self._offset + len(line) + 1
        self._take(rest, self._lines + 1, last=True)

    def _take(self, line: bytes, number: int, last: bool = False) -> None:
        """One line. The last has no end: it may be torn, and is read again with what follows."""
        line = line.strip(b"\0\r ")  # a crash of the machine can leave zeros
        if not line:
            return
        try:
            entry = json.loads(line)
        except ValueError:
            if not (line.startswith(START) or START.startswith(line)):
                raise self._foreign(number) from None
            self.torn += not last
            return
        known = isinstance(entry, dict) and entry.get("annotation") in (*ANSWERS, "undo")
        if not known or not isinstance(entry.get("id"), str):
            raise self._foreign(number)
        if entry["annotation"] == "undo":
            self._undone.add(str(entry.get("undoes")))
            self._by_id.pop(str(entry.get("undoes")), None)
            return
        texts = ["pair", "who"]
        if entry["annotation"] in ("left", "right"):
            texts += ["chosen", "rejected"]
        if "prompt" not in entry or not all(isinstance(entry.get(t), str) for t in texts):
            raise self._foreign(number)
        if entry["id"] not in self._undone:
            self._by_id[entry["id"]] = entry

    def _foreign(self, number: int) -> ValueError:
        return ValueError(
            f"{self.file}, line {number} is no annotation: give a new file, or one that was made "
            "by labelling"
        )
