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

from ..display import counted, escape, html_table
from ..runs.json_files import replace_file
from ..runs.run import Run
from .chart import ChartSize, line_chart
from .frame import Picture
from .samples import TRAINING, Highlight, SampleSet, responses_html
from .tokens_view import QUANTITIES, STYLE, legend_html, scale_of
from .views import charts_of, known_series, metric_chart, time_chart

# Narrower than a widget's chart, so that its letters are still readable on a phone.
_SIZE: ChartSize = {"width": 390, "height": 250}
_STYLE = "\n" + (Path(__file__).parent / "report.css").read_text("utf-8")
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
    parts = []
    if table_rows:
        parts.append(f'<div class="scroll">{html_table(table_rows)}</div>')
    if cost_rows:
        parts.append("<h2>What it cost: predicted, simulated, measured</h2>")
        parts.append(f'<div class="scroll">{html_table(cost_rows)}</div>')
    if shares is not None:
        caption = "How the stages share the time, and which phases take it."
        parts.append(f'<div class="grid">{_figure(shares, caption)}</div>')
    for name, run in runs.items():
        parts += _section(name, run)
    parts += _stories(stories)
    return write_page(path, title, parts)


def write_page(path: str | os.PathLike[str], title: str, parts: Sequence[str]) -> Path:
    """Write HTML `parts` under a title as a page that needs nothing else; → where it is."""
    path = Path(path)
    page = "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # The browser itself refuses scripts and requests, whatever a model wrote.
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n{STYLE}\n</head>\n<body>",
            f"<h1>{escape(title)}</h1>",
            *parts,
            "</body>\n</html>\n",
        ]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, page)
    return path


def _section(name: str, run: Run) -> Iterator[str]:
    """One run: a heading, its facts, its curves, its seconds."""
    config = run.config
    facts = [config["stage"], str(config["model"]), f"seed {config['seed']}"]
    facts.append(counted(run.last_step, "step"))
    yield f"<h2>{escape(name)}</h2>"
    yield f'<p class="facts">{escape(" · ".join([*facts, run.status]))}</p>'
    figures = list(_figures(run))
    if figures:
        yield '<div class="grid">\n' + "\n".join(figures) + "\n</div>"
    else:
        yield "<p>This run has logged nothing that this report draws.</p>"
    yield from _replay(run)


def _replay(run: Run) -> Iterator[str]:
    """What it wrote in training, each token coloured by its figure: first step, last step, and some
    between, each behind its number."""
    written = SampleSet([run])
    scales = {key: scale_of(key, [s.tokens for s in written.samples]) for key in QUANTITIES}
    key = next((key for key, scale in scales.items() if scale), "")
    steps = written.steps(TRAINING, with_figures=bool(key))
    last = len(steps) - 1
    shown = sorted({steps[round(i * last / (_STEPS - 1))] for i in range(_STEPS)}) if steps else []
    if shown:
        left = f"{len(shown)} of {counted(len(steps), 'step')}, up to {_SAMPLES} samples of each"
        yield f'<h3>What it wrote in training</h3><p class="facts">{left}.</p>'
        yield legend_html(key, scales.get(key))
    for step in shown:
        here = [s for s in written.samples if s.mode == TRAINING and s.step == step]
        cards = responses_html(here[:_SAMPLES], Highlight(key, scales.get(key)))
        opened = " open" * (step == shown[-1])
        yield f"<details{opened}><summary>Step {step}</summary>{cards}</details>"
    yield from (f'<p class="facts">{escape(line)}</p>' for line in written.problems)


def _figures(run: Run) -> Iterator[str]:
    """The charts of the run's stage, the parts of its gold reward, its time; those it has."""
    for spec in charts_of(run.stage):
        chart = metric_chart(run, spec, **_SIZE)
        if chart is not None:
            yield _figure(chart, spec.caption)
    parts = known_series(run, [name for name in run.metric_names if name.startswith("gold/")])
    if parts:
        gold = line_chart(
            {name.removeprefix("gold/"): points for name, points in parts.items()},
            title="gold reward by part",
            x_label="step",
            y_label="reward of the part",
            **_SIZE,
        )
        yield _figure(gold, "Which virtues the policy gains, and which it pays with.")
    time = time_chart(run, **_SIZE)
    if time is not None:
        caption = "The tallest bar is the phase where a faster machine or method pays most."
        yield _figure(time, caption)


def _figure(chart: str, caption: str) -> str:
    return f"<figure>\n{chart}\n<figcaption>{escape(caption)}</figcaption></figure>"


def _stories(stories: Sequence[Mapping[str, Mapping[str, str]]]) -> Iterator[str]:
    prompts = [pair for story in stories for pair in story.items()]
    if not prompts:
        return
    yield "<h2>What the models write</h2>"
    yield (
        '<p class="facts">The same prompt, answered by each model: look for what the request '
        "asked for, and for what a reward has taught the model to overdo.</p>"
    )
    for prompt, texts in prompts:
        yield f"<h3>{escape(prompt)}</h3>"
        cards = (
            f'<div class="story"><h4>{escape(label)}</h4><p>{escape(text)}</p></div>'
            for label, text in texts.items()
        )
        yield '<div class="grid">' + "\n".join(cards) + "</div>"
