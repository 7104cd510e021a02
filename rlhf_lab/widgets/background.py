"""Training in a thread, and what a notebook shows of a training.

training = lab.train("ppo", background=True)      # the notebook stays free
training.stop()                                   # ends within half a second; the run is kept
run = training.wait()
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..runs.run import Run


class Stop:
    """A request to end training, from another thread.

    Calling it says whether it was asked for; a trainer that asks ends after its step. While the
    loop is `armed`, `ask` also interrupts it where it is, as the notebook's stop button would.
    """

    def __init__(self, also: Callable[[], bool] | None = None) -> None:
        self._also, self._asked = also, threading.Event()
        self._lock, self._thread = threading.Lock(), None

    def __call__(self) -> bool:
        return self._asked.is_set() or bool(self._also and self._also())

    @contextmanager
    def armed(self) -> Iterator[None]:
        """The loop that may be interrupted: what comes after it, saving, must not be."""
        with self._lock:
            self._thread = threading.get_ident()
        try:
            if self._asked.is_set():
                raise KeyboardInterrupt
            yield
        finally:
            with self._lock:
                self._thread = None

    def ask(self) -> None:
        with self._lock:
            first = not self._asked.is_set()
            self._asked.set()
            if first and self._thread is not None:  # a second one would hit the saving
                target, error = ctypes.c_ulong(self._thread), ctypes.py_object(KeyboardInterrupt)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(target, error)


_current: Training | None = None


def check_free() -> None:
    """Refuse a training beside another one: each would slow the other tenfold."""
    if _current is not None and _current.running:
        raise RuntimeError(
            f"{_current} is still training in the background: .wait() for it, or .stop() it"
        )


class Training:
    """A training in a thread of its own."""

    def __init__(self, work: Callable[..., Run], stop: Stop, view: Any = None) -> None:
        global _current
        self._stop, self._view, self._run, self._error = stop, view, None, None
        self._done = threading.Event()  # an interrupted `Thread.join` takes the thread for dead
        _current = self
        threading.Thread(target=self._do, args=(work,), daemon=True).start()

    def _do(self, work: Callable[..., Run]) -> None:
        try:
            self._run = work(should_stop=self._stop, dashboard=self._view)
        except BaseException as error:  # `wait` raises it, where somebody can see it
            self._error = error
        finally:
            try:
                if self._view is not None:
                    self._view.end("" if self._error is None else str(self._error))
            finally:
                self._done.set()

    @property
    def running(self) -> bool:
        return not self._done.is_set()

    def stop(self) -> Run:
        """End training where it is, and return the run, which holds all there was."""
        self._stop.ask()
        return self.wait()

    def wait(self, seconds: float | None = None) -> Run:
        """The run, when training has ended. Raises what training raised, and TimeoutError.

        An interrupt while it waits stops the training, as it would in the cell that trains.
        """
        waits = getattr(self._view, "waits", lambda on: None)
        waits(True)
        try:
            self._done.wait(seconds)
        except KeyboardInterrupt:
            self._stop.ask()
            self._done.wait()
        finally:
            waits(False)
        if self.running:
            raise TimeoutError(f"still training after {seconds:g} s")
        if self._error is not None:
            raise self._error
        return self._run

    def __repr__(self) -> str:
        state = "running" if self.running else "failed" if self._error else repr(self._run)
        return f"Training({state})"


def open_dashboard(plan: Any, quiet: bool, stop: Any = None) -> Any:
    """A dashboard for a training, on the page at once; None where there is no notebook."""
    from ..runs.progress import in_notebook

    if quiet or not in_notebook():
        return None
    from ..cost.hardware import hardware
    from .dashboard import Dashboard

    limit = hardware(plan.hardware).memory
    ask = stop.ask if isinstance(stop, Stop) else None
    return Dashboard(plan.stage, plan.model.name, limit=limit, stop=ask).display()
