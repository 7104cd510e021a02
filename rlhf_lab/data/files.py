"""Rows out of whatever holds them: files of four formats, a hub id, a data set, a list.

`open_rows` returns an iterator: a file is read piece by piece and never held whole. What cannot be
read raises ValueError with one line that says what is wrong, where, and what to do.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from ..display import counted, first_line
from ..models.hub import hub_reachable
from ..runs.json_files import unread
from .messages import Cell, Example
from .preferences import Annotations, is_annotations

FORMATS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
READ_CHARACTERS = 1 << 20
LONGEST_CELL = 1 << 26
"""Characters that one CSV cell or one JSON row may have before it is taken for a damaged file."""


def open_rows(source: object, split: str = "train", subset: str | None = None) -> Iterator[object]:
    """The rows of a file, a folder saved by `datasets`, a hub id, a Dataset, or a list of dicts.

    `split` and `subset` choose among what a hub id or a DatasetDict holds. A row is whatever the
    source holds at that place: the caller finds out whether it is a dict.
    """
    source = opened(source)
    if not isinstance(source, (str, Path)):
        return iter(_choose(source, split))
    path, name = Path(source).expanduser(), str(source)
    hub_id = name.count("/") == 1 and name[0] not in "./~" and path.suffix not in FORMATS
    if hub_id and not path.exists():
        return _hub_rows(name, split, subset)
    if path.is_file() and (subset or split != "train"):
        raise ValueError(f"{path} is a file, which has no splits or subsets: leave them out")
    return _file_rows(path)


def opened(source: object) -> object:
    """What `datasets` saved in a folder; any other source as it is."""
    if isinstance(source, (str, Path)) and (folder := Path(source).expanduser()).is_dir():
        return _saved_dataset(folder)
    return source


def left_out(source: object, split: str) -> list[str]:
    """Splits that a DatasetDict has besides the one that is read."""
    return [str(name) for name in source if name != split] if isinstance(source, Mapping) else []


def _file_rows(path: Path) -> Iterator[object]:
    if not path.is_file():
        raise ValueError(f"no data file {path}: give {_wanted()}, or 'stories'")
    if is_annotations(path):  # your own, without what was taken back
        return iter(Annotations(path).preferences())
    suffix = _suffix(path)
    if suffix not in FORMATS:
        raise ValueError(
            f"{path}: {suffix or 'no suffix'} is not a format we read; give {_wanted()}"
        )
    if suffix == ".parquet":
        return _parquet_rows(path)
    return _csv_rows(path) if suffix in (".csv", ".tsv") else _json_rows(path)


def _suffix(path: Path) -> str:
    """The suffix that tells the format, compression aside."""
    return (Path(path.stem) if path.suffix == ".gz" else path).suffix.lower()


def _wanted() -> str:
    return f"a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"


@contextmanager
def _text(path: Path, newline: str | None = None) -> Iterator[io.TextIOBase]:
    """A file as text, unzipped where its name ends in .gz; one line when it is not UTF-8."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline=newline) as text:
            yield text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}): save it as UTF-8") from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from None
    except OSError as error:
        raise ValueError(unread(path, error)) from None


# --------------------------------------------------------------------------------------------- JSON


def _json_rows(path: Path) -> Iterator[object]:
    """The elements of one JSON list, or JSON values one after the other (a line each, or not)."""
    with _text(path) as text:
        values = _Values(path, text)
        if values.peek() == "[" and _suffix(path) == ".json":
            yield from values.elements()
        elif values.peek():
            first = values.next()
            yield from [first] if values.peek() else _turned(first)
            while values.peek():
                yield values.next()


def _turned(value: object) -> list[object]:
    """A file's only value: the rows of a table that is one object, its columns lists of like length
    or, as pandas writes them, objects with the numbers of the rows; else the value itself."""
    columns = list(value.values()) if isinstance(value, dict) else []
    if columns and all(isinstance(c, dict) and [*c] == [*map(str, range(len(c)))] for c in columns):
        columns = [[*c.values()] for c in columns]
    tables = len(columns) > 1 and all(isinstance(c, list) for c in columns)
    if not tables or len({len(c) for c in columns}) > 1 or len(columns[0]) < 2:
        return [value]
    if any(isinstance(cell, dict) for column in columns for cell in column):
        return [value]  # splits of like size: lists of rows
    names: Mapping[str, object] = cast("Mapping[str, object]", value)
    return [dict(zip(names, cells)) for cells in zip(*columns)]


class _Values:
    """Reads JSON values off a text, holding little more than one of them at a time."""

    def __init__(self, path: Path, text: io.TextIOBase) -> None:
        self.path, self.text = path, text
        self.buffer, self.at, self.line = "", 0, 1
        self.decode = json.JSONDecoder().raw_decode

    def _more(self) -> bool:
        piece = self.text.read(max(READ_CHARACTERS, len(self.buffer) - self.at))
        if piece:
            self.line += self.buffer.count("\n", 0, self.at)
            self.buffer, self.at = self.buffer[self.at :] + piece, 0
        return bool(piece)

    def peek(self) -> str:
        """The next character that is not white space; '' at the end of the text."""
        while True:
            while self.at < len(self.buffer) and self.buffer[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self._more():
                return ""

    def next(self) -> object:
        self.peek()
        while True:
            try:
                value, end = self.decode(self.buffer, self.at)
            except RecursionError:
                raise self._wrong("brackets are nested too deeply") from None
            except json.JSONDecodeError as error:
                # Wrong, or cut off by the end of the buffer?
                cut = error.pos + 16 > len(self.buffer) or "Unterminated" in error.msg
                long = len(self.buffer) - self.at > LONGEST_CELL
                if not cut or long or not self._more():
                    # Of a row that breaks off, the next line shows it: its own line is meant.
                    at = error.pos if _suffix(self.path) == ".json" else self.at
                    raise self._wrong(error.msg.removesuffix(" starting at"), at) from None
                continue
            if end == len(self.buffer) and self._more():
                continue  # a number may go on
            self.at = end
            return value

    def elements(self) -> Iterator[object]:
        """The elements of a list whose opening bracket comes next."""
        self.at += 1
        if self.peek() == "]":
            self.at += 1
        else:
            while True:
                yield self.next()
                mark = self.peek()
                self.at += 1
                if mark == "]":
                    break
                if mark != ",":
                    unclosed = "a list that is not closed with ]"
                    raise self._wrong("a comma is missing between two rows" if mark else unclosed)
        if self.peek():
            raise self._wrong("something follows the list of rows")

    def _wrong(self, what: str, at: int | None = None) -> ValueError:
        at = min(self.at if at is None else at, len(self.buffer))
        line = self.line + self.buffer.count("\n", 0, at)
        return ValueError(f"{self.path} is not valid JSON: {what}, line {line}")


# ---------------------------------------------------------------------------------- tables and hub


def _csv_rows(path: Path) -> Iterator[Example]:
    """Rows of a table; the first line names the columns."""
    csv.field_size_limit(min(LONGEST_CELL, sys.maxsize))
    with _text(path, newline="") as text:
        first = text.readline()
        text.seek(0)
        # Spreadsheets of many languages write semicolons.
        marks = "\t" if _suffix(path) == ".tsv" else ",;\t"
        mark = next((m for m in marks if m in first), marks[0])
        reader = csv.reader(text, delimiter=mark, strict=True)
        try:
            head = next(reader, None)
            if not head:
                return
            if len(set(head)) < len(head):
                raise ValueError(f"{path}: two columns have the same name in its first line")
            for cells in reader:
                if len(cells) > len(head):
                    raise ValueError(
                        f"{path}, line {reader.line_num}: {counted(len(cells), 'cell')} where the "
                        f"first line names {counted(len(head), 'column')}; put text that holds the "
                        "separator in quotes"
                    )
                if cells:
                    yield dict(zip(head, cells))
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from None


def _parquet_rows(path: Path) -> Iterator[Example]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {first_line(error)}") from None


def _saved_dataset(path: Path) -> object:
    import datasets

    try:
        return datasets.load_from_disk(str(path))
    except (OSError, ValueError):
        raise ValueError(
            f"{path} is a folder, and not one that datasets.save_to_disk made: give a file in it"
        ) from None


def _hub_rows(name: str, split: str, subset: str | None) -> Iterator[object]:
    import datasets

    if not hub_reachable():
        raise ValueError(
            f"no data {name!r}: no such file here, and the hub cannot be reached: download the "
            "data elsewhere and give the file"
        )
    try:
        return iter(datasets.load_dataset(name, subset, split=split, streaming=True))
    except Exception as error:  # the hub has many ways to say no; each becomes one line
        raise ValueError(
            f"no data {name!r}: no such file here, and the hub says: {first_line(error)}"
        ) from None


def _choose(source: object, split: str) -> Iterable[object]:
    """The rows of a Dataset, of one split of a DatasetDict, or of any list of dicts."""
    if hasattr(source, "astype") and hasattr(source, "notna"):  # a pandas DataFrame
        records = source.astype(object).where(source.notna(), None).to_dict("records")
        return [_plain(row) for row in records]
    if isinstance(source, Mapping):  # a DatasetDict
        if split not in source:
            raise ValueError(f"no split {split!r} among {', '.join(map(str, source))}")
        rows: Iterable[object] = source[split]
        return rows
    if isinstance(source, Iterable) and not isinstance(source, (bytes, bytearray)):
        return source
    raise ValueError(
        f"data must be a file, a hub id, a Dataset or a list of dicts, not a "
        f"{type(source).__name__}"
    )


def _plain(cell: Cell) -> Cell:
    """A cell with lists for arrays, which pandas makes of Parquet's lists. What is no JSON (dates)
    stays, so that it is refused where text belongs."""
    cell = cell.tolist() if hasattr(cell, "tolist") else cell  # numpy's numbers, too
    if isinstance(cell, Mapping):
        return {str(key): _plain(value) for key, value in cell.items()}
    if isinstance(cell, (list, tuple)):
        return [_plain(value) for value in cell]
    return cell
