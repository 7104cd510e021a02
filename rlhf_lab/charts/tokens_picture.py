"""Coloured responses as one SVG: what a saved notebook keeps of the rollout inspector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .frame import (
    FAINT,
    GRID,
    NORMAL,
    SMALL,
    TEXT,
    Picture,
    svg_document,
    svg_line,
    svg_text,
    text_width,
)
from .frame import wrapped as wrapped_words
from .tokens_view import LEVELS, QUANTITIES, Scale, Tokens, plain, shade

WIDTH, MARGIN, LINE, SIZE = 760, 12.0, 21.0, 12.5
INK = "#212121"
MOST_LINES = 24  # of one response: a picture is to be looked at, not scrolled


@dataclass(frozen=True)
class Piece:
    """A part of a token on one line, with its shade."""

    text: str
    level: int
    special: bool = False

    @property
    def width(self) -> float:
        return text_width(self.text, SIZE) if self.text else 5.0


def tokens_picture(
    cards: Sequence[tuple[str, str, str, Tokens]], key: str = "", scale: Scale | None = None
) -> Picture:
    """Responses one below the other. A card: title, line of figures, prompt, tokens.

    A prompt that the card above has too is not repeated.
    """
    shapes: list[str] = []
    label_lines: list[str] = []
    last: str | None = None
    top = 6.0
    for title, facts, prompt, tokens in cards:
        if prompt != last:
            for text in wrapped_words(plain(prompt.rstrip()), NORMAL, WIDTH - 2 * MARGIN - 10)[:6]:
                top += 17
                shapes.append(svg_text(MARGIN + 8, top, text, fill=FAINT))
            shapes.append(svg_line(MARGIN, top + 5, WIDTH - MARGIN, top + 5, GRID, 1))
            top += 8
        top += 17
        shapes.append(svg_text(MARGIN, top, plain(title), weight="600"))
        for text in wrapped_words(facts, SMALL, WIDTH - 2 * MARGIN):
            top += 15
            shapes.append(svg_text(MARGIN, top, text, size=SMALL, fill=FAINT))
        top += 6
        lines = list(_lines(_pieces(tokens, key, scale), WIDTH - 2 * MARGIN))
        for pieces in lines[:MOST_LINES]:
            top += LINE
            shapes += _drawn(pieces, top)
        if len(lines) > MOST_LINES:
            top += LINE
            left = sum(map(len, lines[MOST_LINES:]))
            shapes.append(svg_text(MARGIN, top - 6, f"… and {left} more", size=SMALL, fill=FAINT))
        top += 6
        last = prompt
        label_lines.append(f"{plain(title)}: {plain(''.join(tokens.text))} ({facts})")
    if scale is not None:
        shapes += _legend(key, scale, top + 20)
        top += 24
    text = " ".join(label_lines) or "no samples yet"
    if not cards:
        shapes, top = [svg_text(MARGIN, 24, text, fill=FAINT)], 30
    size = WIDTH, round(top + 10)
    return Picture(svg_document(shapes, text, *size), "\n".join(label_lines) or text, size=size)


def _pieces(tokens: Tokens, key: str, scale: Scale | None) -> Iterator[Piece]:
    """Tokens with their shades, cut where a line ends."""
    numbers = tokens.figures.get(key) if scale else None
    for i, text in enumerate(tokens.text):
        level = scale.level(numbers[i]) if scale and numbers else 0
        *before, last = text.split("\n")
        for part in before:
            yield Piece(plain(part) + "⏎\n", level)
        if last or not before:
            yield Piece(plain(last), level, i in tokens.special)


def _lines(pieces: Iterator[Piece], room: float) -> Iterator[list[Piece]]:
    """Broken between words where that is possible; a word too long for a line is cut."""
    row: list[Piece] = []
    used = 0.0
    for word in _words(pieces):
        width = sum(p.width for p in word)
        if row and used + width > room:
            yield row
            row, used = [], 0.0
        for piece in word:
            for part in _cut(piece, room):
                if row and used + part.width > room:
                    yield row
                    row, used = [], 0.0
                row.append(part)
                used += part.width
        if row and row[-1].text.endswith("\n"):
            yield [*row[:-1], replace(row[-1], text=row[-1].text[:-1])]
            row, used = [], 0.0
    if row:
        yield row


def _words(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Tokens that are written without a space between them."""
    word: list[Piece] = []
    for piece in pieces:
        ends = word and word[-1].text[-1:].isspace()
        if word and (ends or piece.text[:1].isspace() or piece.special):
            yield word
            word = []
        word.append(piece)
    if word:
        yield word


def _cut(piece: Piece, room: float) -> Iterator[Piece]:
    text, part, used = piece.text, "", 0.0
    for letter in text:
        width = text_width(letter, SIZE)
        if part and used + width > room:
            yield replace(piece, text=part)
            part, used = "", 0.0
        part, used = part + letter, used + width
    yield replace(piece, text=part)


def _drawn(pieces: Sequence[Piece], bottom: float) -> Iterator[str]:
    x = MARGIN
    for piece in pieces:
        bare = piece.text.lstrip(" ")
        left = x + text_width(piece.text[: len(piece.text) - len(bare)], SIZE)
        if piece.level:
            yield _shaded(x, bottom - LINE + 2, piece.width, LINE - 3, piece.level)
        if bare:
            # Stretched to the width that was guessed, so that letters stand on their own shade.
            fill = INK if piece.level else FAINT if piece.special else TEXT
            drawn = svg_text(left, bottom - 6, bare, size=SIZE, fill=fill)
            length = f'<text textLength="{x + piece.width - left:.1f}" '
            yield drawn.replace("<text ", f'{length}lengthAdjust="spacingAndGlyphs" ', 1)
        x += piece.width


def _shaded(x: float, y: float, width: float, height: float, level: int, corner: int = 2) -> str:
    return (
        f'<rect class="shade" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'rx="{corner}" style="fill:{on_white(level)}"/>'
    )


def on_white(level: int) -> str:
    """A level's shade as it looks on white. A stored picture does not know the page's theme: its
    shades are opaque, and letters on them dark, in both."""
    colour, opacity = shade(level)
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(opacity * part + (1 - opacity) * 255):02x}" for part in parts)


def _legend(key: str, scale: Scale, bottom: float) -> Iterator[str]:
    quantity = QUANTITIES[key]
    x = MARGIN
    for text in (f"{quantity.axis}:", f"{scale.start} {quantity.low}".strip()):
        yield svg_text(x, bottom, text, size=SMALL, fill=FAINT)
        x += text_width(text, SMALL) + 6
    for level in range(0 if scale.one_sided else -LEVELS, LEVELS + 1):
        yield _shaded(x, bottom - 10, 9, 12, level, 0) if level else ""
        x += 9
    yield svg_text(x + 6, bottom, f"{scale.end} {quantity.high}", size=SMALL, fill=FAINT)
