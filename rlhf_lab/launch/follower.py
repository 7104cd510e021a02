"""A run as all processes but the first see it: they train, and leave writing to the first."""

from __future__ import annotations

from typing import Any

from ..runs.run import Run


class Follower(Run):
    """A `Run` that writes nothing."""

    writes = False

    def log(self, step: int, **metrics: Any) -> None: ...

    def sample(self, step: int, rows: Any) -> None: ...

    def save_ledger(self, ledger: Any) -> None: ...

    def rewind(self, step: int) -> None: ...

    def finish(self, status: str = "finished", **summary: Any) -> None: ...
