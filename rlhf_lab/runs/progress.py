"""One line that says how far, how fast and how much longer.

    with Progress(len(prompts), "rollout") as progress:
        for prompt in prompts:
            progress.update(note=f"reward {reward:.2f}")

In a terminal the line rewrites itself on stderr; in a log file a new line appears every ten
seconds at most; in a notebook the cell's output is updated in place as plain text. Showing
progress never stops the work: an output that has gone away is ignored.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TextIO, TypeVar

Item = TypeVar("Item")
_SECONDS_BETWEEN = {"terminal": 0.2, "notebook": 0.5, "log": 10.0}


class DisplayHandle(Protocol):
    """An output of a notebook that can be replaced, as IPython's `display` returns it."""

    def update(self, data: object, *, raw: bool) -> object: ...


class Bar(Protocol):
    """What counts the steps of a loop: a line of text, or a dashboard."""

    def update(self, steps: int = 1, note: str = "") -> object: ...

    def close(self) -> object: ...


class Pace:
    """Counts up to `total` (None where it is not known), and says how far and how fast."""

    def __init__(
        self,
        total: int | None,
        label: str,
        clock: Callable[[], float] = time.monotonic,
        done: int = 0,
    ) -> None:
        self.total, self.label, self.note = total, one_line(label), ""
        self.done = self._earlier = done  # before this clock started
        self._clock, self._start, self.closed = clock, clock(), False

    def count(self, n: int = 1, note: str = "") -> None:
        """`n` more are done; `note` stays until the next one."""
        self.done += n
        self.note = one_line(note) or self.note

    @property
    def share(self) -> float | None:
        """What part is done."""
        if self.total is None:
            return None
        return self.done / self.total if self.total else 1.0

    def line(self) -> str:
        """What is shown now: `label  37/120  30%  elapsed 0:12  ETA 0:27  note`."""
        elapsed = self._clock() - self._start
        parts = [self.label, f"{self.done}"]
        if self.share is not None:
            # Rounded down: 100% stands there when it is done, not a little before.
            parts[1:] = [f"{self.done}/{self.total}", f"{int(100 * self.share):3d}%"]
        parts.append(f"elapsed {_clock_time(elapsed)}")
        if self.total is not None and self.done < self.total and not self.closed:
            here = self.done - self._earlier
            left = elapsed * (self.total - self.done) / here if here else None
            parts.append(f"ETA {'?' if left is None else _clock_time(left)}")
        return "  ".join(filter(None, [*parts, self.note]))


class Progress(Pace, AbstractContextManager["Progress"]):
    """Shows it. `stream` and `clock` (seconds) are there for tests; a given stream switches the
    notebook display off."""

    def __init__(
        self,
        total: int | None,
        label: str,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        done: int = 0,
    ) -> None:
        super().__init__(total, label, clock, done)
        self._stream = stream if stream is not None else sys.stderr
        self._display = notebook_display() if stream is None else None
        self._handle: DisplayHandle | None = None
        self._shown = ""  # the line that the terminal shows now
        self._mode = "notebook" if self._display else "terminal" if _is_tty(self._stream) else "log"
        self._shown_at = self._start
        # A log starts with silence: what ends within ten seconds leaves one line, not two.
        if self._mode != "log":
            self._show()

    def update(self, n: int = 1, note: str = "") -> None:
        """`n` more are done; `note` stays until the next one."""
        if self.closed:
            return
        self.count(n, note)
        if self._clock() - self._shown_at >= _SECONDS_BETWEEN[self._mode]:
            self._show()

    def close(self) -> None:
        """Show the last state and leave it there. Closing twice is closing once."""
        if not self.closed:
            self.closed = True
            self._show()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Progress({self.label!r}, {self.done}/{'?' if self.total is None else self.total})"

    def _show(self) -> None:
        self._shown_at = self._clock()
        try:
            if self._handle is not None:
                self._handle.update({"text/plain": self.line()}, raw=True)
            elif self._display is not None:
                bundle = {"text/plain": self.line()}
                self._handle = self._display(bundle, raw=True, display_id=True)
            else:
                self._write(self.line() + "\n" if self._mode == "log" else self._rewritten())
        except (OSError, ValueError):  # a closed pipe or stream
            pass

    def _rewritten(self) -> str:
        """The line in place of the one before, of which nothing may be left."""
        before, columns = self._shown, shutil.get_terminal_size().columns
        self._shown = self.line()[: max(10, columns - 1)]
        return "\r" + self._shown.ljust(len(before)) + ("\n" if self.closed else "")

    def _write(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding))
        self._stream.flush()


@contextmanager
def working(text: str) -> Iterator[None]:
    """Say at once in a notebook what takes seconds, and take the words away when it is done."""
    display, line = notebook_display(), {"text/plain": f"{one_line(text)} …"}
    handle = display(line, raw=True, display_id=True) if display else None
    try:
        yield
    finally:
        if handle is not None:
            handle.update({}, raw=True)


MANY = 10_000
"""Items that take long enough to be watched."""


def with_progress(items: Sequence[Item], label: str, quiet: bool = False) -> Iterator[Item]:
    """The items one by one, with progress where they are many."""
    if quiet or len(items) < MANY:
        yield from items
        return
    with Progress(len(items), label) as progress:
        for item in items:
            yield item
            progress.update()


def one_line(text: object) -> str:
    """Text without line breaks or control characters, which would break the line's rewriting."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def note(metrics: Mapping[str, object]) -> str:
    """What a progress bar says of a step of a stage that samples."""
    shown = {"reward": "reward", "KL": "kl", "gold": "gold_reward"}
    return "  ".join(f"{n} {metrics[k]:.2f}" for n, k in shown.items() if k in metrics)


def _clock_time(seconds: float) -> str:
    """`0:12`, `1:02:03`, `2 d 3:04:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if not days and not hours:
        return f"{minutes}:{rest:02d}"
    return (f"{days} d " if days else "") + f"{hours}:{minutes:02d}:{rest:02d}"


def _is_tty(stream: TextIO) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # a replaced or a closed stream
        return False


def notebook_display() -> Callable[..., DisplayHandle] | None:
    """IPython's `display` inside a kernel, else None. Nothing is imported that is not there yet:
    in a notebook IPython is loaded already, in a script it would cost half a second."""
    ipython = sys.modules.get("IPython")
    get_shell = getattr(ipython, "get_ipython", None)
    if get_shell is None or not hasattr(get_shell(), "kernel"):
        return None
    from IPython.display import display

    show: Callable[..., DisplayHandle] = display
    return show
