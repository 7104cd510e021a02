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
from itertools import chain
from pathlib import Path
from typing import IO, cast

from ..display import counted, first_line
from ..models.hub import hub_reachable, pointer
from ..runs.json_files import unread
from .messages import Cell, Example
from .preferences import Annotations, is_annotations

FORMATS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
INFOS = "dataset_infos.json"
"""What `datasets` once wrote beside a data set's files."""
COMPRESSED = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstandard"}
SAVE_AS = {
    ".xlsx": "save its sheet as CSV (UTF-8)",
    ".xls": "save its sheet as CSV (UTF-8)",
    ".ods": "save its sheet as CSV (UTF-8)",
    ".zip": "unpack it",
    ".tar": "unpack it",
    ".pkl": "write it with DataFrame.to_parquet",
}
"""What to do with files that other programs write."""
READ_CHARACTERS = 1 << 20
LONGEST_CELL = 1 << 26
"""Characters that one CSV cell or one JSON row may have before it is taken for a damaged file."""


def open_rows(source: object, split: str = "train", subset: str | None = None) -> Iterator[object]:
    """The rows of a file, a folder saved by `datasets`, a hub id, a Dataset, or a list of dicts.

    `split` and `subset` choose among what a hub id or a DatasetDict holds. A row is whatever the
    source holds at that place: the caller finds out whether it is a dict.
    """
    source = opened(source, subset)
    if not isinstance(source, (str, Path)):
        return iter(_choose(source, split))
    path, name = Path(source).expanduser(), str(source)
    hub_id = name.count("/") == 1 and name[0] not in "./~" and _suffix(path) not in FORMATS
    if hub_id and not path.exists():
        return _hub_rows(name, split, subset)
    if path.is_file() and (subset or split != "train"):
        raise ValueError(f"{path} is a file, which has no splits or subsets: leave them out")
    return _file_rows(path)


def opened(source: object, subset: str | None = None) -> object:
    """What `datasets` saved in a folder, or the splits of one that holds files, as a download from
    the hub does; the rows of a dict of columns; another source as it is."""
    if isinstance(source, (str, Path)) and (folder := Path(source).expanduser()).is_dir():
        saved = any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
        return _saved_dataset(folder) if saved else _shards(folder, subset)
    table = _turned(source) if isinstance(source, dict) else [source]
    return source if table[0] is source else table  # lists of columns


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
            f"{path}: {suffix or 'no suffix'} is not a format we read; "
            f"{SAVE_AS.get(suffix, 'give')}{', and give' * (suffix in SAVE_AS)} {_wanted()}"
        )
    if what := pointer(path):
        raise ValueError(f"{path}: {what}")
    if suffix == ".parquet":
        return _parquet_rows(path)
    if suffix in (".arrow", ".feather"):
        return _arrow_rows(path)
    return _csv_rows(path) if suffix in (".csv", ".tsv") else _json_rows(path)


def _suffix(path: Path) -> str:
    """The suffix that tells the format, compression aside."""
    return (Path(path.stem) if path.suffix in COMPRESSED else path).suffix.lower()


def _wanted() -> str:
    return f"a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"


@contextmanager
def _text(path: Path, newline: str | None = None) -> Iterator[io.TextIOBase]:
    """A file as text, unpacked where its name says so; one line when it is not UTF-8."""
    try:
        with _bytes(path) as packed, io.TextIOWrapper(packed, "utf-8-sig", newline=newline) as text:
            yield text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}): save it as UTF-8") from None
    except _damage(path) as error:
        kind = COMPRESSED.get(path.suffix, "")
        raise ValueError(f"{path} is not a whole {kind} file: {error}") from None
    except OSError as error:
        if path.suffix in COMPRESSED and error.errno is None:
            kind = COMPRESSED[path.suffix]
            raise ValueError(f"{path} is not a whole {kind} file: {first_line(error)}") from None
        raise ValueError(unread(path, error)) from None


def _damage(path: Path) -> tuple[type[Exception], ...]:
    """What a packed file raises that is not whole."""
    if path.suffix == ".xz":
        import lzma

        return lzma.LZMAError, EOFError
    return gzip.BadGzipFile, zlib.error, EOFError


def _bytes(path: Path) -> IO[bytes]:
    """A file to read from, unpacked where its name says so."""
    if path.suffix == ".zst":  # Python has it from 3.14 on
        import pyarrow

        stream: IO[bytes] = pyarrow.input_stream(str(path), compression="zstd")
        return stream
    if path.suffix == ".gz":
        return cast("IO[bytes]", gzip.open(path))
    if path.suffix == ".bz2":  # a web page's Python may lack these two
        import bz2

        return bz2.open(path)
    if path.suffix == ".xz":
        import lzma

        return lzma.open(path)
    return path.open("rb")


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
    if isinstance(value, dict) and {*value} == {*map(str, range(len(columns)))}:
        if all(isinstance(c, dict) and not c.keys() & value.keys() for c in columns):
            return columns  # rows by their numbers
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
        # Spreadsheets of many languages write semicolons.
        marks = "\t" if _suffix(path) == ".tsv" else ",;\t"
        mark = next((m for m in marks if m in first), marks[0])
        reader = csv.reader(chain([first], text), delimiter=mark, strict=True)
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


def _arrow_rows(path: Path) -> Iterator[Example]:
    """Rows of a file of Arrow's (Feather), or of a stream, as `datasets` keeps them."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source:
            try:
                file = pyarrow.ipc.open_file(source)
                batches = map(file.get_batch, range(file.num_record_batches))
            except pyarrow.ArrowInvalid:
                source.seek(0)
                batches = pyarrow.ipc.open_stream(source)
            for batch in batches:
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable Arrow file: {first_line(error)}") from None


def _saved_dataset(path: Path) -> object:
    import datasets

    try:
        return datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is not a whole data set that datasets.save_to_disk made: {first_line(error)}"
        ) from None


def _shards(path: Path, subset: str | None) -> dict[str, Iterator[object]]:
    """The rows of each split of a folder, from all of the files that `datasets` finds for it."""
    import datasets

    try:
        found = datasets.load_dataset_builder(str(path), subset).config.data_files
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is a folder in which datasets finds no data ({first_line(error)}): give a file"
        ) from None
    files = {str(split): [Path(f) for f in names] for split, names in (found or {}).items()}
    # Of several formats datasets takes one and says nothing of the others.
    beside = [f for f in path.rglob("*") if _suffix(f) in FORMATS and f.name != INFOS]
    beside = [f for f in beside if not any(p.startswith(".") for p in f.relative_to(path).parts)]
    kinds = sorted({_suffix(f) for names in [*files.values(), beside] for f in names})
    json_only = set(kinds) <= {".json", ".jsonl", ".ndjson"}
    if not set(kinds) <= {*FORMATS} or (len(kinds) > 1 and not json_only):
        raise ValueError(
            f"{path} is a folder with {', '.join(kinds)} files: give one that holds one format "
            f"(perhaps one inside it), or {_wanted()}"
        )
    # Names of files may say nothing of splits: what is in none of them has one of its own.
    known = {f.resolve() for names in files.values() for f in names}
    files |= {str(f.relative_to(path)): [f] for f in sorted(beside) if f.resolve() not in known}
    return {s: chain.from_iterable(map(_file_rows, names)) for s, names in files.items()}


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
    # polars, pyarrow, DuckDB; the second: a batch, or an array of objects
    if hasattr(source, "__arrow_c_stream__") or hasattr(source, "__arrow_c_array__"):
        return _table_rows(source)
    if isinstance(source, Mapping):  # a DatasetDict
        if split not in source:
            names = ", ".join(map(str, source))
            raise ValueError(
                f"no split {split!r} among {names}: choose one of them with split=NAME"
            )
        rows: Iterable[object] = source[split]
        return rows
    if isinstance(source, Iterable) and not isinstance(source, (bytes, bytearray)):
        return source
    kind, lazy = type(source).__name__, hasattr(source, "collect")  # polars' LazyFrame
    raise ValueError(
        "data must be a file, a hub id, a Dataset, a table or a list of dicts, not a "
        f"{kind}{': give what its collect() returns' * lazy}"
    )


def _table_rows(source: object) -> list[object]:
    """The rows of a table that hands itself out by Arrow's interface."""
    import pyarrow

    try:
        rows: list[object] = pyarrow.table(source).to_pylist()
    except (pyarrow.ArrowException, TypeError, ValueError) as error:
        raise ValueError(
            f"a {type(source).__name__} is no table of rows ({first_line(error)}): give the whole "
            "table"
        ) from None
    return rows


def _plain(cell: Cell) -> Cell:
    """A cell with lists for arrays, which pandas makes of Parquet's lists. What is no JSON (dates)
    stays, so that it is refused where text belongs."""
    cell = cell.tolist() if hasattr(cell, "tolist") else cell  # numpy's numbers, too
    if isinstance(cell, Mapping):
        return {str(key): _plain(value) for key, value in cell.items()}
    if isinstance(cell, (list, tuple)):
        return [_plain(value) for value in cell]
    return cell
