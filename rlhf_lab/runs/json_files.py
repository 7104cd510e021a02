"""JSON on disk: objects, one a line or one a file, whole whenever they are read.

A file is replaced at once; a file of lines only grows, so that a killed process loses at most its
last line.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

from ..display import by_surface

JsonObject: TypeAlias = dict[str, Any]
"""An object of a JSON file: its values are whatever stands there."""
Content = TypeVar("Content")
_PACKAGES = (
    *("rlhf-lab", "torch", "transformers", "trl", "accelerate", "peft", "datasets"),
    *("tokenizers", "safetensors", "numpy"),
)


@dataclasses.dataclass
class CachedFile(Generic[Content]):
    """A file whose content is parsed again only when the file has changed."""

    path: Path
    parse: Callable[[Path], Content]
    when_missing: Callable[[], Content]
    parsed: tuple[tuple[int, int, int], Content] | None = None
    """the version and its content; None: parse it the next time, changed or not"""

    def read(self) -> Content:
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return self.when_missing()
        version = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
        if self.parsed is None or self.parsed[0] != version:
            self.parsed = version, self.parse(self.path)
        return self.parsed[1]


def lab_home() -> Path:
    """Where the lab keeps what is of this machine: $RLHF_LAB_HOME, else ~/.cache/rlhf_lab."""
    home = os.environ.get("RLHF_LAB_HOME")
    return Path(home).expanduser() if home else Path.home() / ".cache/rlhf_lab"


def read_written(path: str | Path, make: Callable[[JsonObject], Content], writer: str) -> Content:
    """What `writer` wrote, made again. Raises ValueError, one line, for another file."""
    try:
        return make(json.loads(Path(path).read_text("utf-8")))
    except OSError as error:
        raise ValueError(unread(Path(path), error)) from None
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path} was not written by {writer}") from None


def check_empty(folder: Path) -> None:
    """Raises FileExistsError, one line, unless a folder is empty or new."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists():
        other = by_surface("out", "--out")
        raise FileExistsError(f"{folder} is not empty: choose another folder ({other})")


def no_folder(path: Path) -> str:
    """What to say of a folder that is not there, with the nearest of those beside it."""
    return _no_such("folder", path, Path.is_dir)


def unread(path: Path, error: Exception) -> str:
    """What to say of a file that cannot be read: that it is not there, with the nearest of those
    beside it; or why not, as one line that begins with its name."""
    if isinstance(error, FileNotFoundError):
        return _no_such("file", path, Path.is_file)
    why = getattr(error, "strerror", None) or " ".join(str(error).split())
    return f"{path}: {why}"


def _no_such(what: str, path: Path, is_one: Callable[[Path], bool]) -> str:
    # The name alone counts: a folder that both are in makes strangers alike.
    beside = {p.name.casefold(): p for p in path.parent.glob("*") if is_one(p)}
    if what == "file":
        kind = path.suffix.casefold()
        beside = {name: p for name, p in beside.items() if p.suffix.casefold() == kind}
    near = get_close_matches(path.name.casefold(), beside, n=1, cutoff=0.8)
    return f"no such {what}: {path}" + (f"; did you mean {str(beside[near[0]])!r}?" if near else "")


def packaged_folder(name: str) -> Path:
    """A folder that travels with the package: inside of it once installed, beside it in a clone."""
    package = Path(__file__).resolve().parents[1]
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def versions() -> dict[str, str]:
    """Versions as installed, read without importing (torch alone takes two seconds)."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def replace_file(path: Path, text: str) -> None:
    """Put a file in the place of the old one, which stays whole until the new one is."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def append_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Add JSON lines to a file; a half-written last line is cut off before."""
    with open(path, "ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json_lines(rows).encode())  # closing flushes: a reader sees whole lines at once


def read_lines(path: Path) -> list[JsonObject]:
    """JSON lines; a last line that a killed process left half-written is left out."""
    lines = path.read_bytes().split(b"\n")
    rows: list[JsonObject] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not JSON: the file was damaged") from None
        if row is not None:
            rows.append(row)
    return rows


def json_lines(rows: Iterable[Mapping[str, object]]) -> str:
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def to_json_object(mapping: Mapping[str, object]) -> JsonObject:
    """A mapping as a strict JSON object, see `to_json`."""
    return {str(key): to_json(value) for key, value in mapping.items()}


def to_json(value: object) -> object:
    """Anything as strict JSON with no memory addresses in it, so that two runs can be compared."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return to_json_object(value)
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((to_json(item) for item in value), key=str)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    for method in ("to_dict", "tolist"):  # TRL's configs; numpy's and torch's numbers
        if not isinstance(value, type) and callable(getattr(value, method, None)):
            return to_json(getattr(value, method)())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_json({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    return str(getattr(value, "__qualname__", None) or getattr(value, "name", type(value).__name__))
