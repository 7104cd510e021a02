"""One process writes a run's folder. The lock is the system's: it ends with the process, however
that ends, so that a run that was killed can be told from one that is going on.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..display import by_surface

if TYPE_CHECKING:
    from filelock import FileLock

LOCK = ".lock"
"""The file that is locked, in the folder; it goes when the run ends."""


def acquire(folder: Path) -> FileLock | None:
    """Lock a folder, which is made where there is none; None on a disk that knows no locks.
    Raises FileExistsError where a process holds it."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        where = by_surface("out", "--out")
        raise FileExistsError(
            f"{folder} is being written by a training that is still going on: wait for its end, or "
            f"choose another folder ({where})"
        ) from None
    except (OSError, NotImplementedError):
        return None
    return lock


def release(folder: Path, lock: FileLock | None) -> None:
    """Give a folder back; one in which nothing was written goes."""
    if lock is not None:
        with suppress(OSError):  # Windows deletes no file that is open
            (folder / LOCK).unlink()
        lock.release()
    with suppress(OSError):
        folder.rmdir()


def check_free(folder: Path) -> bool:
    """Raises FileExistsError where a process writes the folder. → whether that can be known."""
    lock = acquire(folder) if (folder / LOCK).exists() else None
    if lock is not None:
        lock.release()
    return lock is not None or not (folder / LOCK).exists()


def is_locked(folder: Path) -> bool:
    """Whether a process writes the folder, or may."""
    try:
        return not check_free(folder)
    except FileExistsError:
        return True
