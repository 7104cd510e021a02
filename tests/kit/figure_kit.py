"""A ledger written by hand, and the lines and bars of a plotly figure read back."""

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
