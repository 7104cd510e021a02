"""Static batches beside slots that are refilled: an engine's schedules as a picture and a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..display import Display, counted, html_table, table
from .frame import COLOURS, Frame, LegendEntry, Picture, grid

if TYPE_CHECKING:
    from ..deploy.schedule import Schedule

TAKEN, TAKEN_NEXT, EMPTY = COLOURS[0], COLOURS[5], COLOURS[4]


class Batching(Display):
    """The same requests through the same engine in two ways: `static`, `continuous`."""

    def __init__(self, static: Schedule, continuous: Schedule) -> None:
        self.static, self.continuous = static, continuous
        self.rows = [
            {
                "batching": name,
                "decode steps": len(one.steps),
                "slots busy": f"{one.busy:.0%}",
                "tokens": one.tokens,
                "tokens/s, measured": round(one.tokens_per_second),
            }
            for name, one in self.each.items()
        ]
        note = f"continuous: {self.step_ratio:.2f} of the steps, {self.speedup:.2f} times the rate"
        page = f"{html_table(self.rows)}<p>{note}</p>"
        super().__init__(f"{table(self.rows)}\n{note}", page, self.picture())

    @property
    def each(self) -> Mapping[str, Schedule]:
        return {"static": self.static, "continuous": self.continuous}

    @property
    def step_ratio(self) -> float:
        """Steps of continuous batching, static batching's being 1."""
        return len(self.continuous.steps) / len(self.static.steps)

    @property
    def speedup(self) -> float:
        """Tokens per second of continuous batching, static batching's being 1."""
        return self.continuous.tokens_per_second / self.static.tokens_per_second

    def picture(self) -> Picture:
        """Both schedules below each other, over the same steps: an SVG."""
        most = max(len(one.steps) for one in self.each.values())
        return grid([slot_chart(one, name, most) for name, one in self.each.items()], columns=1)


def slot_chart(schedule: Schedule, name: str, most: int = 0) -> Picture:
    """Slots × steps: a bar for each request from its first token to its last, shaded where a slot
    stands empty before the last request is done. `most`: steps that the axis shows."""
    steps, slots = len(schedule.steps), schedule.slots
    keys = [
        LegendEntry("a request", TAKEN, None),
        LegendEntry("the next one in its slot", TAKEN_NEXT, None),
        LegendEntry("an empty slot", EMPTY, None),
    ]
    title = f"{name} batching: {counted(steps, 'step')}, {schedule.busy:.0%} of the slots busy"
    frame = Frame(title, "decode step", "slot", keys, 720, 250)
    frame.scale((0, max(most, steps)), (0, slots), whole_x=True)
    frame.add(*(_bar(frame, 0, steps, slot, EMPTY, "</rect>") for slot in range(slots)))
    seen = [0] * slots
    for request, slot, first, last in schedule.occupied:
        fill = (TAKEN, TAKEN_NEXT)[seen[slot] % 2]
        seen[slot] += 1
        tokens = counted(last + 1 - first, "token")
        about = f"request {request}: {tokens}, steps {first + 1} to {last + 1}"
        place = frame, first, last + 1, slot, fill
        frame.still.append(_bar(*place, f"<title>{about}</title></rect>"))
        frame.live.append(_bar(*place, "</rect>"))
    return frame.svg([counted(schedule.tokens, "token")])


def _bar(frame: Frame, begin: float, end: float, slot: int, fill: str, inside: str) -> str:
    left, top = frame.x(begin), frame.y(slot + 0.9)
    return (
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{frame.x(end) - left:.2f}" '
        f'height="{frame.y(slot) - top:.1f}" style="fill:{fill}">{inside}'
    )
