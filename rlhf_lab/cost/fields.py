"""What a plan does with the settings of trainers, as data (`fields.yaml`).

Every field of the trainers' configs is read by `read_settings.make_setup`, or is known to change no
figure of a plan, or is not modelled: then the answer begins with a line that says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..stages import read_table

_TABLE = read_table(__file__, "fields.yaml")
RENAMED: Mapping[str, str] = _TABLE["renamed"]
"""What a trainer calls a setting → the field of a `Setup`."""
CHOICES = {name: tuple[str, ...](values) for name, values in _TABLE["choices"].items()}
WHOLE_NUMBERS = _TABLE["whole_numbers"].split()


@dataclass(frozen=True)
class Unread:
    """A field that is not modelled. `unless`: values at which it changes nothing; `changes`: what
    it would change otherwise."""

    unless: tuple[object, ...]
    changes: str


INERT: Mapping[str, str] = {
    name: why for why, names in _TABLE["inert"].items() for name in names.split()
}
"""Fields that no figure of a plan depends on, and why."""
NOT_MODELLED: Mapping[str, Unread] = {
    name: Unread(tuple(fact["unless"]), fact["changes"])
    for name, fact in _TABLE["not_modelled"].items()
}
CALLED: Mapping[str, str] = {
    name: ours for ours, names in _TABLE["called"].items() for name in names.split()
}
"""What other tools call a setting → what it is called here."""
UNPLANNED: Mapping[str, str] = {
    name: instead for instead, names in _TABLE["unplanned"].items() for name in names.split()
}
"""What other tools share work by → what is planned in its place."""


def not_modelled(settings: Mapping[str, object]) -> list[str]:
    """A line for each setting that would change the plan, if it were modelled."""
    return [
        f"not modelled: {name}={value!r}, which would change {NOT_MODELLED[name].changes}"
        for name, value in settings.items()
        if name in NOT_MODELLED and value not in NOT_MODELLED[name].unless
    ]
