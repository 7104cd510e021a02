"""The rollout inspector: what runs wrote, token by token, through training and side by side.

    Inspector(run)                 # one run: a slider through its training
    Inspector(sft, ppo, dpo)       # the same held-out prompt, before and after each

Reads what is on disk: an old run, one without figures of its tokens, one that is being written
(press Refresh). Nothing here trains or loads a model: figures that a run did not keep come from
`score`, where somebody gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import ipywidgets as w

from ..charts import tokens_view as view
from ..charts.frame import Picture
from ..charts.tokens_picture import tokens_picture
from ..charts.tokens_view import QUANTITIES, Tokens, plain
from ..runs.run import Run
from .live import Chart, Showing, show
from .sample_cards import Look, cards_html, facts_text, note_html, table_html, token_chart
from .samples import HELD_OUT, TRAINING, Book, Sample

_MODES = {TRAINING: "Training", HELD_OUT: "Held-out prompts"}
_NO_FIGURES = (
    "No figures of these tokens were recorded, so they have no colours: PPO keeps them, of a few "
    "responses at some of its steps; other stages, and runs from before that, have the text alone."
)


class Inspector:
    """Prompts and responses of one run or several; display it, or make it a cell's last value.

    `score(run, row)` computes the `tokens` of a sample from before or after training that has none
    (`ppo/token_record.py`); with it there is a button that does so. The controls are plain
    ipywidgets and can be set from Python: `mode`, `step`, `sample`, `colour`, `query`, `token`.
    """

    def __init__(
        self,
        *runs: Run,
        score: Callable[[Run, Mapping[str, Any]], Mapping[str, Any]] | None = None,
    ) -> None:
        self.book = Book(runs)
        self._score = score
        self._hits: list[Sample] = []
        self._scales: dict[str, view.Scale | None] = {}
        self._busy = False
        self._showing: Showing | None = None
        self._make_controls()
        self.widget = self._laid_out()
        with self._at_once():
            self._fill()
            self.mode.value = self.book.first_mode()
            self._fill_steps(last=True)
            self._fill_samples()
            self.colour.value = next((k for k in QUANTITIES if k in self._scales), "")
        self._draw()
        for control in (self.mode, self.step, self.sample, self.colour, self.token, self.table):
            control.observe(self._changed, "value")
        self.query.observe(self._searched, "value")

    # -- the controls -------------------------------------------------------------------------
    def _make_controls(self) -> None:
        wide = {"description_width": "initial"}
        self.mode = w.ToggleButtons(
            options=[(name, mode) for mode, name in _MODES.items()],
            style={"button_width": "auto"},
            layout=w.Layout(width="auto"),
            tooltips=["what was sampled to learn from", "the same prompts, before and after"],
        )
        self.step = w.SelectionSlider(
            options=[("–", 0)], description="Step", style=wide, layout=w.Layout(width="330px")
        )
        self.sample = w.Dropdown(
            options=[("–", None)],
            description="Sample",
            style=wide,
            layout=w.Layout(flex="1 1 260px", min_width="200px", max_width="620px"),
        )
        self.colour = w.Dropdown(
            options=[("none", "")], description="Colour", style=wide, layout=w.Layout(width="225px")
        )
        self.query = w.Text(
            placeholder="in prompts and responses",
            description="Search",
            style=wide,
            layout=w.Layout(width="265px"),
        )
        self.token = w.IntSlider(
            value=0, min=0, max=1, description="Token", style=wide, layout=w.Layout(width="330px")
        )
        self.table = w.ToggleButton(
            value=False,
            description="Table",
            layout=w.Layout(width="auto"),
            tooltip="every token and its figures as a table",
        )
        self._previous = self._button("Previous", "the sample before that the search finds", -1)
        self._next = self._button("Next", "the next sample that the search finds", 1)
        self._refresh = self._button("Refresh", "read again what the runs have written")
        self._refresh.on_click(lambda _: self.refresh())
        self._compute = self._button("Score tokens", "compute log-ratios of these responses")
        self._compute.on_click(lambda _: self._compute_scores())
        self._found, self._legend, self._page, self._status = (w.HTML() for _ in range(4))
        for part in (self._legend, self._page, self._status):
            part.layout.width = "auto"
        self._chart = Chart()

    def _button(self, name: str, tip: str, by: int = 0) -> w.Button:
        made = w.Button(description=name, tooltip=tip, layout=w.Layout(width="auto"))
        if by:
            made.on_click(lambda _: self._jump(by))
        return made

    def _laid_out(self) -> w.VBox:
        def row(*parts: w.Widget) -> w.HBox:
            layout = w.Layout(flex_flow="row wrap", align_items="center", grid_gap="0 10px")
            return w.HBox(parts, layout=layout)

        search = (self.query, self._previous, self._next, self._found)
        style = w.HTML(view.STYLE, layout=w.Layout(display="none"))
        self._top = row(self.mode, self.step, self.sample)
        return w.VBox(
            [
                style,
                self._top,
                row(self.colour, *search, self._refresh),
                self._legend,
                self._page,
                row(self.token, self.table, self._compute),
                self._chart,
                self._status,
            ]
        )

    @contextmanager
    def _at_once(self):
        """Several controls change and the page is drawn once, by whoever asked for it."""
        before, self._busy = self._busy, True
        try:
            yield
        finally:
            self._busy = before

    # -- what can be chosen -------------------------------------------------------------------
    def _fill(self) -> None:
        """Scales and colours, from everything that was read."""
        every = [s.tokens for s in self.book.samples]
        scales = {key: view.scale_of(key, every) for key in QUANTITIES}
        self._scales = {key: scale for key, scale in scales.items() if scale}
        chosen = self.colour.value
        self.colour.options = [("none", "")] + [(QUANTITIES[k].name, k) for k in self._scales]
        self.colour.value = chosen if chosen in self._scales else ""
        self.colour.disabled = not self._scales

    def _fill_steps(self, last: bool = False) -> None:
        """The steps of this mode; the one that was chosen, or the nearest, stays so. `last`: the
        last one of which most is known."""
        steps = self.book.steps(self.mode.value) or [0]
        told = self.book.told(self.mode.value)
        near = max(told, default=steps[-1])
        if not last:
            near = min(steps, key=lambda s: abs(s - self.step.value))
        options = [(f"{s}, text only" if told and s not in told else str(s), s) for s in steps]
        if list(self.step.options) != options:
            self.step.options = options
        self.step.value = near

    def _fill_samples(self) -> None:
        chosen = self.sample.value
        choices = self.book.choices(self.mode.value, self.step.value) or [("–", None)]
        if list(self.sample.options) != choices:
            self.sample.options = choices
        keys = [key for _, key in choices]
        self.sample.value = chosen if chosen in keys else keys[0]

    @property
    def cards(self) -> list[Sample]:
        """The samples that stand side by side now."""
        return self.book.cards(self.mode.value, self.step.value, self.sample.value)

    # -- what happens -------------------------------------------------------------------------
    def _changed(self, change: Mapping[str, Any]) -> None:
        if self._busy:
            return
        with self._at_once():
            if change["owner"] is self.mode:
                self._fill_steps(last=True)
            if change["owner"] in (self.mode, self.step):
                self._fill_samples()
        self._draw()

    def _searched(self, _: Any) -> None:
        """Count what is found; go to the first of it, where it is not in sight already."""
        self._hits = self.book.find(self.query.value)
        shown = {s.key for s in self.cards}
        if self._hits and not any(s.key in shown for s in self._hits):
            self._go(self._hits[0])
        self._draw()

    def _jump(self, by: int) -> None:
        """To the next or the previous sample that the search finds, around the end."""
        if not self._hits:
            return
        at = self._at()
        if at is None:
            at = -1 if by > 0 else 0
        else:
            shown = {s.key for s in self.cards}
            # Those that are in sight together are one stop.
            while abs(by) < len(self._hits) and self._hit(at + by).key in shown:
                by += 1 if by > 0 else -1
        self._go(self._hit(at + by))
        self._draw()

    def _hit(self, number: int) -> Sample:
        return self._hits[number % len(self._hits)]

    def _at(self) -> int | None:
        """Which of the samples that were found is in sight, the first of them."""
        shown = {s.key for s in self.cards}
        return next((i for i, s in enumerate(self._hits) if s.key in shown), None)

    def _go(self, sample: Sample) -> None:
        mode, step, choice = self.book.place(sample, self.step.value)
        with self._at_once():
            self.mode.value = mode
            self._fill_steps()
            if step in [value for _, value in self.step.options]:
                self.step.value = step
            self._fill_samples()
            self.sample.value = choice

    def refresh(self) -> None:
        """Read the runs again. Who looks at the newest step goes on with the run."""
        steps = self.book.steps(self.mode.value)
        told = self.book.told(self.mode.value)
        newest = not steps or self.step.value in (steps[-1], max(told, default=None))
        empty = not self.book.samples
        self.book.read()
        with self._at_once():
            self._fill()
            if empty or self.mode.value not in self.book.modes():
                self.mode.value = self.book.first_mode()
            self._fill_steps(last=newest)
            self._fill_samples()
        self._hits = self.book.find(self.query.value)
        self._draw()

    def _to_score(self) -> list[Sample]:
        """What can be scored still: the models from before and after training are at hand, those
        in between are gone."""
        asked = self.cards if self._score else []
        return [s for s in asked if not s.tokens.figures and s.time != "at"]

    def _compute_scores(self) -> None:
        """Ask for the figures of the responses in sight that have none; kept while this lives."""
        self._compute.disabled = True
        try:
            for sample in self._to_score():
                record = self._score(sample.owner, sample.row)
                self.book.scored[sample.key] = Tokens.of(record, sample.response)
        except Exception as error:  # a model that is gone, say: the page stays as it was
            self._draw(f"These tokens cannot be scored: {type(error).__name__}: {error}")
            return
        before = self.colour.value
        self.refresh()
        if not before:
            self.colour.value = next(iter(self._scales), "")

    # -- the page -----------------------------------------------------------------------------
    def _draw(self, trouble: str = "") -> None:
        cards = self.cards
        longest = max((len(s.tokens.text) for s in cards), default=1)
        with self._at_once():
            self.token.max = max(longest, 1)
            self.token.value = min(self.token.value, self.token.max)
        key = self.colour.value
        look = Look(key, self._scales.get(key), self.query.value, self.token.value)
        known = any(s.tokens.figures for s in cards)
        coloured = any(key in s.tokens.figures for s in cards)
        pending = bool(self._to_score())
        self._legend.value = view.legend_html(key, look.scale) if coloured else ""
        made = table_html if self.table.value and known else cards_html
        self._page.value = made(cards, look) if cards else note_html([self._nothing()])
        picture = token_chart(cards, key or next(iter(self._scales), ""), look.at)
        if picture is not None:
            self._chart.draw(picture, now=True)
        self._compute.disabled = not pending
        self._say(known, coloured, pending, trouble)
        self._show_what_matters(known, pending, picture is not None)
        if self._showing:
            self._showing.refresh()

    def _show_what_matters(self, known: bool, pending: bool, charted: bool) -> None:
        """Controls that have nothing to choose from are out of sight."""
        for part, wanted in (
            (self._top, bool(self.book.samples)),
            (self.mode, len(self.book.modes()) > 1),
            (self.step, len(self.step.options) > 1),
            (self._legend, bool(self._legend.value)),
            (self.token, known),
            (self.table, known),
            (self._compute, pending),
            (self._chart, charted),
        ):
            display = None if wanted else "none"
            if part.layout.display != display:
                part.layout.display = display

    def _say(self, known: bool, coloured: bool, pending: bool, trouble: str) -> None:
        """How many were found, and whatever else a reader should know."""
        at = self._at()
        count = f"{at + 1} of {len(self._hits)}" if at is not None else f"{len(self._hits)}"
        found = f"{count} found" if self.query.value else ""
        self._found.value = f'<span aria-live="polite">{found}</span>'
        self._previous.disabled = self._next.disabled = not self._hits
        lines = [*self.book.problems, trouble]
        if self.cards and not known:
            lines.append(_NO_FIGURES + " Press Score tokens to compute them." * pending)
        elif self.colour.value and not coloured:
            lines.append(f"The {QUANTITIES[self.colour.value].name} of these tokens is not known.")
        self._status.value = note_html([*filter(None, lines), *self.book.statuses])

    def _nothing(self) -> str:
        if not self.book.runs:
            return "No run was given: Inspector(run), with lab.train's run or Run.load(folder)."
        if not self.book.samples:
            return "These runs have no samples yet. Press Refresh when they have gone on."
        return "No sample here: choose another step or prompt."

    # -- without a page -----------------------------------------------------------------------
    def still(self) -> Picture:
        """What is in sight as a picture, which needs no kernel and no script."""
        key = self.colour.value
        cards = self.cards
        coloured = any(key in s.tokens.figures for s in cards)
        return tokens_picture(
            [(s.title, facts_text(s), s.prompt, s.tokens) for s in cards],
            key,
            self._scales.get(key) if coloured else None,
        )

    def _ipython_display_(self) -> None:
        self._showing = show(self.widget, self.still)

    def __repr__(self) -> str:
        cards = self.cards
        if not cards:
            return "\n".join(["Inspector: " + self._nothing(), *map(plain, self.book.problems)])
        lines = [f"Inspector of {', '.join(map(plain, self.book.names))}"]
        last = None
        for s in cards:
            if s.prompt != last:
                lines.append(f"prompt: {_cut(s.prompt.rstrip())}")
            last = s.prompt
            lines.append(f"{plain(s.title)}: {_cut(s.response)} [{facts_text(s)}]")
        return "\n".join(lines)


def _cut(text: str, room: int = 200) -> str:
    text = plain(text)
    return text if len(text) <= room else text[:room].rstrip() + "…"
