"""What the rollout inspector draws of the samples in sight: cards, a table, a chart of tokens."""

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
from .samples import Sample


class Look(NamedTuple):
    """How samples are looked at."""

    key: str = ""  # the figure that colours tokens
    scale: Scale | None = None
    wanted: str = ""  # text that is looked for
    at: int = 0  # the token that is looked at, from 1; 0 for none


def cards_html(cards: Sequence[Sample], look: Look) -> str:
    """The samples side by side; a prompt that they share stands above them, once."""
    shared = len({s.prompt for s in cards}) == 1
    head = _prompt(cards[0], look) if shared else ""
    made = "".join(_card(s, look, own_prompt=not shared) for s in cards)
    return f'<div class="lab-tk">{head}<div class="cards">{made}</div></div>'


def table_html(cards: Sequence[Sample], look: Look) -> str:
    """Every token and its figures, a table for each sample."""
    made = "".join(
        f'{_prompt(s, look)}<div class="scroll" tabindex="0">'
        f"{html_table(token_rows(s.tokens), caption=plain(s.title))}</div>"
        for s in cards
    )
    return f'<div class="lab-tk">{made}</div>'


def note_html(lines: Iterable[str]) -> str:
    body = "<br>".join(escape(plain(line)) for line in lines)
    return f'<div class="lab-tk"><div class="note">{body}</div></div>'


def facts_text(sample: Sample) -> str:
    """What is known of the whole response, in a line."""
    pairs = facts(sample.figures, sample.tokens)
    return " · ".join(f"{plain(name)} {number}".strip() for name, number in pairs)


def token_chart(cards: Sequence[Sample], key: str, at: int = 0) -> Picture | None:
    """A figure over the response, a line for each sample; of one sample also the figures that
    belong to it. None where it is not known of any."""
    drawn = [s for s in cards if key in s.tokens.figures]
    if not drawn:
        return None
    names = QUANTITIES[key].drawn or (key,)
    series = {}
    for sample in drawn:
        for name in names if len(drawn) == 1 else names[:1]:
            if numbers := sample.tokens.figures.get(name):
                label = FIGURE_NAMES[name] if len(drawn) == 1 else plain(sample.title)
                series[label] = (range(1, len(numbers) + 1), numbers)
    numbers = drawn[0].tokens.figures[key]
    if len(drawn) == 1 and 0 < at <= len(numbers):
        series[f"token {at}"] = ([at], [numbers[at - 1]])
    return line_chart(
        series, x_label="token of the response", y_label=QUANTITIES[key].axis, width=760, height=190
    )


def _prompt(sample: Sample, look: Look) -> str:
    text = sample.prompt.rstrip("\n")
    return f'<div class="prompt" dir="auto">{marked(text, look.wanted)}</div>' if text else ""


def _card(sample: Sample, look: Look, own_prompt: bool) -> str:
    tokens, at = sample.tokens, look.at - 1
    title, strip = escape(plain(sample.title)), ""
    text = tokens_html(tokens, look.key, look.scale, look.wanted, at)
    if tokens.figures:
        said = "Point at a token, or move the slider below, to read its figures."
        if at >= 0:
            said = tokens.words(at) if at < len(tokens.text) else ""
        strip = f'<div class="strip" aria-live="polite">{escape(said)}</div>'
    return (
        f'<section class="card" aria-label="{title}"><h4>{title}</h4>'
        f"{facts_html(facts(sample.figures, tokens))}{_prompt(sample, look) if own_prompt else ''}"
        f'<div class="text" dir="auto" tabindex="0" role="region" '
        f'aria-label="response of {title}">{text}</div>{strip}</section>'
    )
