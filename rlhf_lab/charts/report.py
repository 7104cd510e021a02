"""report.html: what a set of runs did, in one file that needs nothing else.

The stages in a table, each stage's curves, where its time went, what it wrote step by step and
token by token, and before and after. No scripts, no network; readable in light and dark themes, on
a phone and printed.
Everything that a model or a person wrote is escaped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from ..display import escape, html_table
from ..runs.json_files import replace_file
from ..runs.run import Run
from .chart import ChartSize, line_chart
from .frame import Picture
from .samples import TRAINING, Highlight, RunSample, SampleSet, responses_html
from .tokens_view import QUANTITIES, STYLE, legend_html, scale_of
from .views import charts_of, known_series, metric_chart, time_chart

# Narrower than a widget's chart, so that its letters are still readable on a phone.
_SIZE: ChartSize = {"width": 390, "height": 250}
_HERE = Path(__file__).parent
_STYLE = f"<style>\n{(_HERE / 'report.css').read_text('utf-8')}</style>\n{STYLE}"
_STEPS, _SAMPLES = 8, 3
"""Of each run: steps whose samples are shown, and samples of a step."""


def write_report(
    path: str | os.PathLike[str],
    runs: Mapping[str, Run],
    *,
    title: str,
    table_rows: Sequence[Mapping[str, str]] = (),
    cost_rows: Sequence[Mapping[str, str]] = (),
    shares: Picture | None = None,
    stories: Sequence[Mapping[str, Mapping[str, str]]] = (),
) -> Path:
    """Write a self-contained HTML report and return where it is.

    `runs` maps a heading to a run, in the order to show; `table_rows` are the stage table's
    lines (column -> text), `cost_rows` those of the cost table, and `shares` the picture of where
    the time went; `stories` hold prompt -> {label: what was written}, the labels
    ("SFT", "PPO") in the order to stand side by side.
    """
    return write_page(
        path,
        "report.html",
        title=title,
        table_rows=table_rows,
        cost_rows=cost_rows,
        shares=shares,
        runs={name: _section(run) for name, run in runs.items()},
        stories=[pair for story in stories for pair in story.items()],
    )


def write_page(path: str | os.PathLike[str], template: str, **values: object) -> Path:
    """Write a page that needs nothing else, by a template of this folder; → where it is. What is
    not marked as markup in it is escaped."""
    path = Path(path)
    pages = Environment(
        autoescape=True,
        finalize=lambda value: value if hasattr(value, "__html__") else Markup(escape(value)),
        loader=FileSystemLoader(_HERE),
        lstrip_blocks=True,
        trim_blocks=True,
    )
    pages.filters |= {"markup": Markup, "table": lambda rows: Markup(html_table(rows))}
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, pages.get_template(template).render(style=_STYLE, **values))
    return path


def _section(run: Run) -> dict[str, object]:
    """One run: its facts, its curves and its seconds, what it wrote in training: each token
    coloured by its figure, of the first step, the last step, and some between."""
    config, written = run.config, SampleSet([run])
    facts = [config["stage"], str(config["model"]), f"seed {config['seed']}"]
    scales = {key: scale_of(key, [s.tokens for s in written.samples]) for key in QUANTITIES}
    key = next((key for key, scale in scales.items() if scale), "")
    steps = written.steps(TRAINING, with_figures=bool(key))
    shown = {steps[round(i * (len(steps) - 1) / (_STEPS - 1))] for i in range(_STEPS) if steps}
    here: dict[int, list[RunSample]] = {step: [] for step in sorted(shown)}
    for sample in written.samples:
        if sample.mode == TRAINING and sample.step in here:
            here[sample.step].append(sample)
    look = Highlight(key, scales.get(key))
    return {
        "facts": " · ".join([*facts, f"{run.last_step} steps", run.status]),
        "figures": list(_figures(run)),
        "counted": f"{len(here)} of {len(steps)} steps, up to {_SAMPLES} samples of each",
        "legend": legend_html(key, look.scale),
        "steps": [(step, responses_html(of[:_SAMPLES], look)) for step, of in here.items()],
        "problems": written.problems,
    }


def _figures(run: Run) -> Iterator[tuple[Picture, str]]:
    """The charts of the run's stage, the parts of its gold reward, its time; those it has. → each
    with its caption."""
    for spec in charts_of(run.stage):
        chart = metric_chart(run, spec, **_SIZE)
        if chart is not None:
            yield chart, spec.caption
    parts = known_series(run, [name for name in run.metric_names if name.startswith("gold/")])
    if parts:
        gold = line_chart(
            {name.removeprefix("gold/"): points for name, points in parts.items()},
            title="gold reward by part",
            x_label="step",
            y_label="reward of the part",
            **_SIZE,
        )
        yield gold, "Which virtues the policy gains, and which it pays with."
    time = time_chart(run, **_SIZE)
    if time is not None:
        caption = "The tallest bar is the phase where a faster machine or method pays most."
        yield time, caption
