"""Training in a thread, and what a notebook shows of a training.

training = lab.train("ppo", background=True)      # the notebook stays free
training.stop()                                   # ends within half a second; the run is kept
run = training.wait()
"""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from ..runs.progress import notebook_display
from ..runs.run import Run

if TYPE_CHECKING:
    from ..planning import Plan
    from .dashboard import Dashboard


class Stop:
    """A request to end training, from another thread or by an interrupt.

    Calling it returns whether there is a request (or `should_stop()` is true); a trainer that
    calls it ends after its step. While the loop is `armed`, `request` also interrupts it where it
    is, as the notebook's stop button would, and an interrupt is a request. Without `interrupts` an
    interrupt is a request only.
    """

    def __init__(
        self, should_stop: Callable[[], bool] | None = None, interrupts: bool = True
    ) -> None:
        self._should_stop, self._requested = should_stop, threading.Event()
        self._interrupts_loop = interrupts
        self._lock = threading.Lock()
        self._thread: int | None = None

    def __call__(self) -> bool:
        return self._requested.is_set() or bool(self._should_stop and self._should_stop())

    @contextmanager
    def armed(self) -> Iterator[None]:
        """The loop that may be interrupted: what comes after it, saving, must not be."""
        with self._lock:
            self._thread = threading.get_ident()
        try:
            if self._requested.is_set():
                raise KeyboardInterrupt
            with self._interrupts():
                yield
        finally:
            with self._lock:
                self._thread = None

    @contextmanager
    def _interrupts(self) -> Iterator[None]:
        """Python drops an interrupt that it can raise nowhere, as in a finalizer; a request stays,
        and training ends after its step."""
        before = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or not callable(before):
            yield
            return

        def request(number: int, frame: FrameType | None) -> None:
            self._requested.set()
            if self._interrupts_loop:
                before(number, frame)

        signal.signal(signal.SIGINT, request)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def request(self) -> None:
        with self._lock:
            first = not self._requested.is_set()
            self._requested.set()
            if first and self._thread is not None:  # a second one would hit the saving
                target, error = ctypes.c_ulong(self._thread), ctypes.py_object(KeyboardInterrupt)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(target, error)


_current: Training | None = None


def check_idle() -> None:
    """Refuse a training beside another one: each would slow the other tenfold."""
    if _current is not None and _current.running:
        raise RuntimeError(
            f"{_current} is still training in the background: .wait() for it, or .stop() it"
        )


class Training:
    """A training in a thread of its own."""

    def __init__(
        self, work: Callable[..., Run], stop: Stop, dashboard: Dashboard | None = None
    ) -> None:
        global _current
        self._stop, self._dashboard = stop, dashboard
        self._run: Run | None = None
        self._error: BaseException | None = None
        self._done = threading.Event()  # an interrupted `Thread.join` takes the thread for dead
        _current = self
        threading.Thread(target=self._train, args=(work,), daemon=True).start()

    def _train(self, work: Callable[..., Run]) -> None:
        try:
            self._run = work(should_stop=self._stop, dashboard=self._dashboard)
        except BaseException as error:  # `wait` raises it, where somebody can see it
            self._error = error
        finally:
            try:
                if self._dashboard is not None:
                    self._dashboard.end("" if self._error is None else str(self._error))
            finally:
                self._done.set()

    @property
    def running(self) -> bool:
        return not self._done.is_set()

    def stop(self) -> Run:
        """End training where it is, and return the run, which holds all there was."""
        self._stop.request()
        return self.wait()

    def wait(self, seconds: float | None = None) -> Run:
        """The run, when training has ended. Raises what training raised, and TimeoutError.

        An interrupt while it waits stops the training, as it would in the cell that trains.
        """
        if self._dashboard is not None:
            self._dashboard.kernel_waits(True)
        try:
            self._done.wait(seconds)
        except KeyboardInterrupt:
            self._stop.request()
            self._done.wait()
        finally:
            if self._dashboard is not None:
                self._dashboard.kernel_waits(False)
        if self.running:
            raise TimeoutError(f"still training after {seconds:g} s")
        if self._error is not None or self._run is None:
            raise self._error or RuntimeError("training ended without a run")
        return self._run

    def __repr__(self) -> str:
        state = "running" if self.running else "failed" if self._error else repr(self._run)
        return f"Training({state})"


def open_dashboard(plan: Plan, quiet: bool, stop: Stop | None = None) -> Dashboard | None:
    """A dashboard for a training, on the page at once; None where there is no notebook.

    Its button makes a request of `stop`; without one it interrupts the kernel.
    """
    if quiet or notebook_display() is None:
        return None
    from ..cost.hardware import hardware
    from .dashboard import Dashboard

    limit = hardware(plan.hardware).memory
    request = stop.request if stop is not None else None
    return Dashboard(plan.stage, plan.model.name, limit=limit, stop=request).display()
