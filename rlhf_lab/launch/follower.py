"""A run as all processes but the first see it: they train, and leave writing to the first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..runs.ledger import Ledger
from ..runs.run import Run


class Follower(Run):
    """A `Run` that writes nothing."""

    writes = False

    def log(self, step: int, **metrics: float | None) -> None: ...

    def sample(self, step: int, rows: Iterable[Mapping[str, object]]) -> None: ...

    def save_ledger(self, ledger: Ledger) -> None: ...

    def rewind(self, step: int) -> None: ...

    def finish(self, status: str = "finished", **summary: object) -> None: ...
