"""The rollout inspector: what runs wrote, token by token, through training and side by side.

    Inspector(run)                 # one run: a slider through its training
    Inspector(sft, ppo, dpo)       # the same held-out prompt, before and after each

Reads what is on disk: an old run, one without figures of its tokens, one that is being written
(press Refresh). Nothing here trains or loads a model: figures that a run did not keep come from
`score`, where somebody gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import ipywidgets as w

from ..charts.frame import Picture
from ..charts.samples import (
    HELD_OUT,
    TRAINING,
    Highlight,
    RunSample,
    SampleSet,
    facts_text,
    note_html,
    responses_html,
    token_chart,
    token_tables_html,
)
from ..charts.tokens_picture import tokens_picture
from ..charts.tokens_view import QUANTITIES, STYLE, Scale, Tokens, legend_html, plain, scale_of
from ..runs.run import Run
from .live import Chart, Quiet, Showing, set_visible

ScoreSample: TypeAlias = Callable[[Run, Mapping[str, object]], Mapping[str, object]]
"""(run, row of its samples) → the row's `tokens`, as `ppo/texts.py` makes them"""
_MODES = {TRAINING: "Training", HELD_OUT: "Held-out prompts"}
_NO_FIGURES = (
    "No figures of these tokens were recorded, so they have no colours: PPO keeps them, of a few "
    "responses at some of its steps; other stages, and runs from before that, have the text alone."
)


class Inspector:
    """Prompts and responses of one run or several; display it, or make it a cell's last value.

    `score(run, row)` computes the `tokens` of a sample from before or after training that has none;
    with it there is a button that does so. The controls are plain ipywidgets and can be set from
    Python: `mode`, `step`, `sample`, `colour`, `query`, `token`.
    """

    def __init__(self, *runs: Run, score: ScoreSample | None = None) -> None:
        self.sample_set = SampleSet(runs)
        self._score = score
        self._hits: list[RunSample] = []  # of the set in sight
        self._wish = ""  # the colour that was chosen, where these tokens have it
        self._scales: dict[str, Scale | None] = {}
        self._quiet = Quiet()  # several controls change, and the page is drawn once
        self._showing: Showing | None = None
        self._make_controls()
        self.widget = self._layout()
        self._fill_colours()
        self.mode.value = self.sample_set.first_mode()
        self._fill_steps(last=True)
        self._fill_samples()
        self._wish = next((k for k in QUANTITIES if k in self._scales), "")
        self._draw()
        for control in (self.mode, self.step, self.sample, self.colour, self.token, self.table):
            control.observe(self._changed, "value")
        self.query.observe(self._searched, "value")

    # -- the controls -------------------------------------------------------------------------
    def _make_controls(self) -> None:
        def control(kind: Callable[..., w.Widget], name: str, **traits: object) -> w.Widget:
            style = {"description_width": "initial"}
            return kind(description=name, style=style, **traits)

        self.mode = w.ToggleButtons(
            options=[(name, mode) for mode, name in _MODES.items()],
            style={"button_width": "auto"},
            layout={"width": "auto"},
            tooltips=["what was sampled to learn from", "the same prompts, before and after"],
        )
        slider, room = {"width": "330px"}, {"min_width": "200px", "max_width": "620px"}
        self.step = control(w.SelectionSlider, "Step", options=[("–", 0)], layout=slider)
        self.sample = control(
            w.Dropdown, "Sample", options=[("–", None)], layout={"flex": "1 1 260px", **room}
        )
        self.colour = control(
            w.Dropdown, "Colour", options=[("none", "")], layout={"width": "225px"}
        )
        hint = "in prompts and responses"
        self.query = control(w.Text, "Search", placeholder=hint, layout={"width": "265px"})
        self.token = control(w.IntSlider, "Token", min=0, max=1, layout=slider)
        self.table = w.ToggleButton(
            description="Table",
            layout={"width": "auto"},
            tooltip="every token and its figures as a table",
        )
        found = "sample that the search finds"
        self._previous = _button("Previous", f"the previous {found}", lambda: self._jump(-1))
        self._next = _button("Next", f"the next {found}", lambda: self._jump(1))
        self._refresh = _button("Refresh", "read again what the runs have written", self.refresh)
        tip = "compute log-ratios of these responses"
        self._compute = _button("Score tokens", tip, self._compute_scores)
        self._count, self._legend, self._page, self._status = (w.HTML() for _ in range(4))
        for part in (self._legend, self._page, self._status):
            part.layout.width = "auto"
        self._chart = Chart()

    def _layout(self) -> w.VBox:
        def row(*parts: w.Widget) -> w.HBox:
            layout = w.Layout(flex_flow="row wrap", align_items="center", grid_gap="0 10px")
            return w.HBox(parts, layout=layout)

        search = row(
            self.colour, self.query, self._previous, self._next, self._count, self._refresh
        )
        below = row(self.token, self.table, self._compute)
        style = w.HTML(STYLE, layout=w.Layout(display="none"))
        self._top = row(self.mode, self.step, self.sample)
        page = (self._legend, self._page, below, self._chart, self._status)
        return w.VBox([style, self._top, search, *page])

    # -- the choices -------------------------------------------------------------------
    def _fill_colours(self) -> None:
        """Scales, from everything that was read."""
        every = [s.tokens for s in self.sample_set.samples]
        scales = {key: scale_of(key, every) for key in QUANTITIES}
        self._scales = {key: scale for key, scale in scales.items() if scale}

    def _offer_colours(self, samples: list[RunSample]) -> None:
        """The colours that these samples' tokens have; the one that was chosen comes back with
        those that have it."""
        known = [k for k in self._scales if any(k in s.tokens.figures for s in samples)]
        options = [("none", "")] + [(QUANTITIES[k].name, k) for k in known]
        with self._quiet:
            if list(self.colour.options) != options:
                self.colour.options = options
            self.colour.value = self._wish if self._wish in known else ""
        self.colour.disabled = not known

    def _fill_steps(self, last: bool = False) -> None:
        """The steps of this mode; the chosen one, or the nearest, stays chosen. `last`: choose the
        last one whose tokens have figures."""
        steps = self.sample_set.steps(self.mode.value) or [0]
        recorded = self.sample_set.steps(self.mode.value, with_figures=True)
        near = max(recorded, default=steps[-1])
        if not last:
            near = min(steps, key=lambda s: abs(s - self.step.value))
        options = [
            (f"{s}, text only" if recorded and s not in recorded else str(s), s) for s in steps
        ]
        if list(self.step.options) != options:
            self.step.options = options
        self.step.value = near

    def _fill_samples(self) -> None:
        chosen = self.sample.value
        choices = self.sample_set.choices(self.mode.value, self.step.value) or [("–", None)]
        if list(self.sample.options) != choices:
            self.sample.options = choices
        keys = [key for _, key in choices]
        self.sample.value = chosen if chosen in keys else keys[0]

    @property
    def selected(self) -> list[RunSample]:
        """The samples that stand side by side now."""
        return self.sample_set.select(self.mode.value, self.step.value, self.sample.value)

    # -- reactions ----------------------------------------------------------------------------
    def _changed(self, change: Mapping[str, object]) -> None:
        if self._quiet:
            return
        if change["owner"] is self.colour:
            self._wish = str(change["new"])
        with self._quiet:
            if change["owner"] is self.mode:
                self._fill_steps(last=True)
            if change["owner"] in (self.mode, self.step):
                self._fill_samples()
        self._find()
        self._draw()

    def _searched(self, _: object) -> None:
        """Count the hits; go to the first one, unless one is in sight already."""
        self._find()
        if self._hits and self._at() is None:
            self._go(self._hits[0])
        self._draw()

    def _find(self) -> None:
        """The hits in the set in sight: a search never leaves it. How many there are elsewhere
        stands beside their number."""
        every = self.sample_set.find(self.query.value)
        self._hits = [s for s in every if s.mode == self.mode.value]
        self._elsewhere = len(every) - len(self._hits)

    def _jump(self, by: int) -> None:
        """To the next (1) or the previous (-1) sample that the search finds, around the end."""
        at, visible = self._at() or 0, {s.key for s in self.selected}
        around = [*self._hits[at:], *self._hits[:at]][::by]
        # Those that stand side by side are one stop.
        if sample := next((s for s in around if s.key not in visible), None):
            self._go(sample)
            self._draw()

    def _at(self) -> int | None:
        """The index of the first hit that is in sight."""
        visible = {s.key for s in self.selected}
        return next((i for i, s in enumerate(self._hits) if s.key in visible), None)

    def _go(self, sample: RunSample) -> None:
        mode, step, choice = self.sample_set.locate(sample, self.step.value)
        with self._quiet:
            self.mode.value = mode
            self._fill_steps()
            if step in [value for _, value in self.step.options]:
                self.step.value = step
            self._fill_samples()
            self.sample.value = choice

    def refresh(self) -> None:
        """Read the runs again. Where the newest step was chosen, the new newest one is."""
        steps = self.sample_set.steps(self.mode.value)
        recorded = self.sample_set.steps(self.mode.value, with_figures=True)
        newest = not steps or self.step.value in (steps[-1], max(recorded, default=None))
        empty = not self.sample_set.samples
        self.sample_set.read()
        with self._quiet:
            self._fill_colours()
            if empty or self.mode.value not in self.sample_set.modes():
                self.mode.value = self.sample_set.first_mode()
            self._fill_steps(last=newest)
            self._fill_samples()
        self._find()
        self._draw()

    def _unscored(self) -> list[RunSample]:
        """What can still be scored: the models from before and after training are at hand, those
        in between are gone."""
        return [s for s in self.selected if not s.tokens.figures and s.time != "at"]

    def _compute_scores(self) -> None:
        """Compute the figures of the responses in sight that have none; kept while this lives."""
        if self._score is None:
            return
        self._compute.disabled = True
        try:
            for sample in self._unscored():
                record = self._score(sample.run, sample.row)
                self.sample_set.scored[sample.key] = Tokens.of(record, sample.response)
        except Exception as error:  # a model that is gone, say: the page stays as it was
            self._draw(f"These tokens cannot be scored: {type(error).__name__}: {error}")
            return
        self.refresh()
        if not self.colour.value:
            self.colour.value = next((key for _, key in self.colour.options if key), "")

    # -- the page -----------------------------------------------------------------------------
    def _draw(self, error: str = "") -> None:
        samples = self.selected
        self._offer_colours(samples)
        longest = max((len(s.tokens.text) for s in samples), default=1)
        with self._quiet:
            self.token.max = max(longest, 1)
            self.token.value = min(self.token.value, self.token.max)
        key = self.colour.value
        highlight = Highlight(key, self._scales.get(key), self.query.value, self.token.value)
        known = any(s.tokens.figures for s in samples)
        coloured = any(key in s.tokens.figures for s in samples)
        can_score = self._score is not None and bool(self._unscored())
        self._legend.value = legend_html(key, highlight.scale) if coloured else ""
        draw = token_tables_html if self.table.value and known else responses_html
        self._page.value = draw(samples, highlight) if samples else note_html([self._why_empty()])
        picture = token_chart(samples, key or next(iter(self._scales), ""), highlight.token)
        if picture is not None:
            self._chart.draw(picture, now=True)
        self._compute.disabled = not can_score
        self._write_status(known, can_score, error)
        self._show_relevant(known, can_score, picture is not None)
        if self._showing:
            self._showing.refresh()

    def _show_relevant(self, known: bool, can_score: bool, charted: bool) -> None:
        """Controls that have nothing to choose from are out of sight."""
        for part, relevant in (
            (self._top, bool(self.sample_set.samples)),
            (self.mode, len(self.sample_set.modes()) > 1),
            (self.step, len(self.step.options) > 1),
            (self._legend, bool(self._legend.value)),
            (self.token, known),
            (self.table, known),
            (self._compute, can_score),
            (self._chart, charted),
        ):
            set_visible(part, relevant)

    def _write_status(self, known: bool, can_score: bool, error: str) -> None:
        """How many hits there are, and whatever else a reader should know."""
        at = self._at()
        count = f"{at + 1} of {len(self._hits)}" if at is not None else f"{len(self._hits)}"
        line = f"{count} found" if self.query.value else ""
        if self.query.value and self._elsewhere:
            other = next(name for mode, name in _MODES.items() if mode != self.mode.value)
            line += f"; {self._elsewhere} in {other}"
        self._count.value = f'<span aria-live="polite">{line}</span>'
        self._previous.disabled = self._next.disabled = not self._hits
        lines = [*self.sample_set.problems, error]
        if self.selected and not known:
            lines.append(_NO_FIGURES + " Press Score tokens to compute them." * can_score)
        self._status.value = note_html([*filter(None, lines), *self.sample_set.statuses])

    def _why_empty(self) -> str:
        if not self.sample_set.runs:
            return "No run was given: Inspector(run), with lab.train's run or Run.load(folder)."
        if not self.sample_set.samples:
            return "These runs have no samples yet. Press Refresh when they have gone on."
        return "No sample here: choose another step or prompt."

    # -- without a page -----------------------------------------------------------------------
    def still(self) -> Picture:
        """What is in sight as a picture, which needs no kernel and no script."""
        key, samples = self.colour.value, self.selected
        rows = [(s.title, facts_text(s), s.prompt, s.tokens) for s in samples]
        coloured = any(key in s.tokens.figures for s in samples)
        return tokens_picture(rows, key, self._scales.get(key) if coloured else None)

    def _ipython_display_(self) -> None:
        self._showing = Showing(self.widget, self.still)

    def __repr__(self) -> str:
        samples = self.selected
        if not samples:
            problems = map(plain, self.sample_set.problems)
            return "\n".join(["Inspector: " + self._why_empty(), *problems])
        lines = [f"Inspector of {', '.join(map(plain, self.sample_set.names))}"]
        last = None
        for s in samples:
            if s.prompt != last:
                lines.append(f"prompt: {_shortened(s.prompt.rstrip())}")
            last = s.prompt
            lines.append(f"{plain(s.title)}: {_shortened(s.response)} [{facts_text(s)}]")
        return "\n".join(lines)


def _button(name: str, tip: str, work: Callable[[], None]) -> w.Button:
    button = w.Button(description=name, tooltip=tip, layout={"width": "auto"})
    button.on_click(lambda _: work())
    return button


def _shortened(text: str, room: int = 200) -> str:
    text = plain(text)
    return text if len(text) <= room else text[:room].rstrip() + "…"
