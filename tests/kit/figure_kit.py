"""A ledger written by hand; lines and bars of a plotly figure read back; contrast of colours."""

from rlhf_lab.runs.ledger import Ledger

MIB = 2**20


def lines(figure, axis="y"):
    """Traces of a panel that are lines, not bands."""
    return [t for t in figure.data if t.type == "scatter" and t.yaxis == axis and not t.fill]


def table(*rows, stage="ppo", quantity="bytes", source="predicted", **common):
    """A ledger; a row is (phase, role, component, value, low, high, rank) or less."""
    ledger = Ledger()
    names = ("phase", "role", "component", "value", "low", "high", "rank")
    for row in rows or [("forward", "policy", "parameters", MIB)]:
        ledger.add(
            stage=stage,
            quantity=quantity,
            source=source,
            **common,
            **dict(zip(names, row, strict=False)),
        )
    return ledger


def blocks(figure):
    """{(its tooltip before the colon, part): (bottom, height)} of all bars."""
    found = {}
    for t in figure.data:
        if t.type == "bar" and t.y[0] is not None:
            for tooltip, base, y in zip(t.customdata, t.base, t.y, strict=True):
                found[tooltip.split(":")[0], t.name] = (base, y)
    return found


def tops(figure):
    return {t.name: t for t in figure.data if t.type == "scatter" and t.mode == "markers"}


def rgb(colour):
    """Red, green and blue of "#RRGGBB", from 0 to 1."""
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def contrast(one, other):
    """Of two colours, from 1 to 21 (WCAG 2.2)."""

    def luminance(colour):
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in colour]
        return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
