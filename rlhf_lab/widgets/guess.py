"""The reader's own prediction, before anything runs, and what came of it.

    slowest = lab.guess("Which takes longest?", ["writing", "scoring", "updating"])
    slowest.reveal(measured="updating", because="the model is tiny")

A cell that is run without a guess says so and goes on; one that comes later is put into the table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import ipywidgets

from ..display import Display, escape, format_number, html_table, table
from ..runs.progress import DisplayHandle, notebook_display
from .live import UNLOADED

SOURCES = ("predicted", "simulated", "measured", "known")
NONE_YET = "none yet: answer above"

Answer = float | str


class Guess:
    """A question to answer before a run: a number in `unit`, or one of `choices`.

    `value` is the answer, None until there is one; it may be set.
    """

    def __init__(
        self,
        question: str,
        choices: Sequence[str] = (),
        *,
        unit: str = "",
        value: Answer | None = None,
    ) -> None:
        self.question, self.choices, self.unit = question, tuple(choices), unit
        if value is not None:
            value = self._checked(value)
        if self.choices:
            self._box = ipywidgets.RadioButtons(
                options=self.choices, value=value, layout={"width": "max-content"}
            )
        else:
            text = "" if value is None else f"{value:g}"
            self._box = ipywidgets.Text(
                value=text, placeholder="your guess", layout={"width": "12em"}
            )
        self._revealed: DisplayHandle | None = None
        self._shown: tuple[dict[str, Answer], str] = {}, ""
        self._box.observe(self._changed, "value")

    def _checked(self, value: Answer) -> Answer:
        """Raises ValueError for what is no answer to this question."""
        if not self.choices:
            words = str(value).strip()
            # As answers are shown: $60,000, 14.2 GiB, 50 %.
            bare = words.removesuffix(self.unit).strip().removeprefix("$" * (self.unit == "USD"))
            thousands = re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d*)?", bare)
            try:
                number = float(bare.replace(",", "") if thousands else bare)
            except ValueError:
                number = math.nan
            if not math.isfinite(number):
                unit = f" (in {self.unit})" if self.unit else ""
                raise ValueError(f"{words!r} is no number such as 8.5: {self.question}{unit}")
            return number
        if value not in self.choices:
            raise ValueError(f"{value!r} is none of {', '.join(self.choices)}: {self.question}")
        return value

    @property
    def value(self) -> Answer | None:
        given = self._box.value
        if given in (None, ""):
            return None
        return self._checked(given)

    @value.setter
    def value(self, value: Answer) -> None:
        checked = self._checked(value)
        self._box.value = checked if self.choices else f"{checked:g}"

    def reveal(self, *, because: str = "", **found: Answer) -> Display:
        """The guess beside what was `predicted`, `simulated` and `measured`, or is `known`, each in
        `unit` or one of the choices, and `because`, what explains it. A later guess changes this
        output.

        Raises ValueError for another source.
        """
        unknown = sorted(set(found) - set(SOURCES))
        if unknown or not found:
            what = ", ".join(unknown) or "nothing"
            raise ValueError(f"{what} to reveal: give {', '.join(SOURCES)}")
        self._shown = dict(found), because
        return _Revealed(self)

    def _rows(self) -> list[dict[str, str]]:
        found, _ = self._shown
        try:
            guess = self.value
            words = NONE_YET if guess is None else self._text(guess)
        except ValueError as error:
            guess, words = None, str(error)
        rows = [{"": "your guess", "answer": words}]
        rows += [{"": s, "answer": self._text(found[s])} for s in SOURCES if s in found]
        truth = found[next(s for s in reversed(SOURCES) if s in found)]
        if isinstance(guess, str):
            rows[0]["against it"] = "right" if guess == truth else "something else"
        elif guess is not None and isinstance(truth, (int, float)):
            rows[0]["against it"] = f"{guess / truth:.2f} times" if guess * truth > 0 else "–"
        return rows

    def _text(self, answer: Answer) -> str:
        return answer if isinstance(answer, str) else format_number(float(answer), self.unit)

    def _changed(self, _: object) -> None:
        if self._revealed:
            self._revealed.update(_Revealed(self).bundle, raw=True)

    def __repr__(self) -> str:
        return self.question

    def _ipython_display_(self) -> None:
        display = notebook_display()
        if display is None:
            print(self.question)
            return
        html = f'<p class="lab-still">{escape(self.question)}</p>{UNLOADED}'
        question = {"text/html": html, "text/plain": self.question}
        display(question, raw=True)
        display(self._box)


class _Revealed(Display):
    """The answer as a cell shows it: an output that a later guess can change."""

    def __init__(self, guess: Guess) -> None:
        rows, (_, because) = guess._rows(), guess._shown
        lines = [f"<p>{escape(line)}</p>" if line else "" for line in (guess.question, because)]
        super().__init__(
            "\n".join(filter(None, [guess.question, table(rows), because])),
            html_table(rows).join(lines),
        )
        self._guess = guess

    @property
    def bundle(self) -> dict[str, str]:
        return {"text/html": self._repr_html_(), "text/plain": self.text}

    def _ipython_display_(self) -> None:
        display = notebook_display()
        if display is None:
            print(self.text)
            return
        self._guess._revealed = display(self.bundle, raw=True, display_id=True)
