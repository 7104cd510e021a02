"""What the inspector draws of the selected samples: responses, a table, a chart of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..charts.chart import line_chart
from ..charts.frame import Picture
from ..charts.tokens_view import (
    FIGURE_NAMES,
    QUANTITIES,
    Scale,
    facts,
    facts_html,
    marked,
    plain,
    token_rows,
    tokens_html,
)
from ..display import escape, html_table
from .samples import RunSample


class Highlight(NamedTuple):
    """Which tokens are coloured and marked."""

    key: str = ""  # the figure that colours tokens
    scale: Scale | None = None
    search: str = ""  # text that is looked for
    token: int = 0  # the selected one, from 1; 0 for none


def responses_html(samples: Sequence[RunSample], highlight: Highlight) -> str:
    """The samples side by side; a prompt that they share stands above them, once."""
    shared = len({s.prompt for s in samples}) == 1
    head = _prompt(samples[0], highlight) if shared else ""
    parts = "".join(_response(s, highlight, own_prompt=not shared) for s in samples)
    return f'<div class="lab-tk">{head}<div class="cards">{parts}</div></div>'


def token_tables_html(samples: Sequence[RunSample], highlight: Highlight) -> str:
    """Every token and its figures, a table for each sample."""
    parts = "".join(
        f'{_prompt(s, highlight)}<div class="scroll" tabindex="0">'
        f"{html_table(token_rows(s.tokens), caption=plain(s.title))}</div>"
        for s in samples
    )
    return f'<div class="lab-tk">{parts}</div>'


def note_html(lines: Iterable[str]) -> str:
    body = "<br>".join(escape(plain(line)) for line in lines)
    return f'<div class="lab-tk"><div class="note">{body}</div></div>'


def facts_text(sample: RunSample) -> str:
    """What is known of the whole response, in a line."""
    pairs = facts(sample.figures, sample.tokens)
    return " · ".join(f"{plain(name)} {number}".strip() for name, number in pairs)


def token_chart(samples: Sequence[RunSample], key: str, token: int = 0) -> Picture | None:
    """A figure over the response, a line for each sample; of one sample also the figures that
    belong to it. None where it is not known of any."""
    drawn = [s for s in samples if key in s.tokens.figures]
    if not drawn:
        return None
    names = QUANTITIES[key].drawn or (key,)
    series: dict[str, tuple[Sequence[int], Sequence[float | None]]] = {}
    for sample in drawn:
        for name in names if len(drawn) == 1 else names[:1]:
            if numbers := sample.tokens.figures.get(name):
                label = FIGURE_NAMES[name] if len(drawn) == 1 else plain(sample.title)
                series[label] = (range(1, len(numbers) + 1), numbers)
    numbers = drawn[0].tokens.figures[key]
    if len(drawn) == 1 and 0 < token <= len(numbers):
        series[f"token {token}"] = ([token], [numbers[token - 1]])
    return line_chart(
        series, x_label="token of the response", y_label=QUANTITIES[key].axis, width=760, height=190
    )


def _prompt(sample: RunSample, highlight: Highlight) -> str:
    text = sample.prompt.rstrip("\n")
    return f'<div class="prompt" dir="auto">{marked(text, highlight.search)}</div>' if text else ""


def _response(sample: RunSample, highlight: Highlight, own_prompt: bool) -> str:
    tokens, place = sample.tokens, highlight.token - 1
    title, strip = escape(plain(sample.title)), ""
    prompt = _prompt(sample, highlight) if own_prompt else ""
    text = tokens_html(tokens, highlight.key, highlight.scale, highlight.search, place)
    if tokens.figures:
        line = "Point at a token, or move the slider below, to read its figures."
        if place >= 0:
            line = tokens.words(place) if place < len(tokens.text) else ""
        strip = f'<div class="strip" aria-live="polite">{escape(line)}</div>'
    return (
        f'<section class="card" aria-label="{title}"><h4>{title}</h4>'
        f"{facts_html(facts(sample.figures, tokens))}{prompt}"
        f'<div class="text" dir="auto" tabindex="0" role="region" '
        f'aria-label="response of {title}">{text}</div>{strip}</section>'
    )
