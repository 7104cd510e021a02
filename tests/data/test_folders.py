"""Folders of shards, packed files, and rows in what services and tables wrap them in.

pytest tests/data/test_folders.py
"""

from __future__ import annotations

import bz2
import json
import lzma

import pandas
import pyarrow
import pytest
from row_texts import PLAIN, N, pairs_of

from rlhf_lab.data.load import from_rows, load_data

LINES = "".join(json.dumps(row) + "\n" for row in PLAIN).encode()


def zstd(data: bytes) -> bytes:
    """A whole frame, packed by another door of pyarrow than the one that is read by."""
    return pyarrow.Codec("zstd").compress(data, asbytes=True)


PACKED = {".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("suffix", PACKED)
def test_packed_files_are_read_as_the_others_and_damaged_ones_refused(suffix, tmp_path):
    whole = PACKED[suffix](LINES)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(whole)
    assert load_data(path).preferences == from_rows(PLAIN).preferences
    table = tmp_path / f"a.csv{suffix}"
    table.write_bytes(PACKED[suffix](pandas.DataFrame(PLAIN).to_csv(index=False).encode()))
    assert load_data(table).preferences == from_rows(PLAIN).preferences
    for broken in (LINES, whole[:-9]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="not a whole|not valid JSON") as error:
            load_data(path)
        assert "\n" not in str(error.value)


def test_arrow_files_and_streams(tmp_path):
    table = pyarrow.Table.from_pylist(PLAIN)
    pandas.DataFrame(PLAIN).to_feather(tmp_path / "a.feather")
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table)
    for name in ("a.feather", "a.arrow"):
        assert load_data(tmp_path / name).preferences == from_rows(PLAIN).preferences
    (tmp_path / "a.arrow").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a readable Arrow file"):
        load_data(tmp_path / "a.arrow")


def test_a_folder_of_shards_is_read_whole(tmp_path):
    """All shards of the split, as `datasets` finds them; other splits are told."""
    folder = tmp_path / "download"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("# Rows\n")
    frame = pandas.DataFrame([*PLAIN, *PLAIN])
    for shard in range(2):
        part = frame[shard * N : (shard + 1) * N]
        part.to_parquet(folder / "data" / f"train-0000{shard}-of-00002.parquet")
    frame[:N].to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    data = load_data(folder)
    assert len(pairs_of(data)) == 2 * N and data.report.rows == 2 * N
    assert "and not test (split=NAME)" in data.notes[-1]
    assert len(pairs_of(load_data(folder, split="test"))) == N
    with pytest.raises(ValueError, match="no split 'dev' among"):
        load_data(folder, split="dev")
    frame[:N].to_parquet(folder / "more.parquet")  # datasets leaves it out and says nothing
    assert "and not test, more.parquet (split=NAME)" in load_data(folder).notes[-1]
    assert len(pairs_of(load_data(folder, split="more.parquet"))) == N


def test_tables_in_memory():
    columns = {name: [row[name] for row in PLAIN] for name in PLAIN[0]}
    for table in (columns, pyarrow.table(columns)):
        data = load_data(table)
        assert data.preferences == from_rows(PLAIN).preferences and len(data.notes) == 1


def test_folders_that_hold_no_one_data_set_are_refused(tmp_path):
    with pytest.raises(ValueError, match="datasets finds no data"):
        load_data(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.csv").write_text("prompt,completion\na,b\n")
    with pytest.raises(ValueError, match=r"a folder with \.csv, \.jsonl files") as error:
        load_data(tmp_path)
    assert "\n" not in str(error.value)


def test_files_of_other_programs_say_what_to_do(tmp_path):
    for name in ("a.parquet", "a.jsonl"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        with pytest.raises(ValueError, match="a pointer of Git LFS, not the file"):
            load_data(tmp_path / name)
    for name, remedy in (("a.xlsx", "save its sheet as CSV"), ("a.zip", "unpack it")):
        (tmp_path / name).write_bytes(b"PK")
        with pytest.raises(ValueError, match=remedy):
            load_data(tmp_path / name)


def test_tables_of_rows_by_their_numbers_and_rows_of_the_hub(tmp_path):
    path = tmp_path / "a.json"
    pandas.DataFrame(PLAIN).to_json(path, orient="index")
    assert load_data(path).preferences == from_rows(PLAIN).preferences
    rows = [{"row_idx": i, "row": row, "truncated_cells": []} for i, row in enumerate(PLAIN)]
    rows += [{"row_idx": N, "row": PLAIN[0], "truncated_cells": ["chosen"]}]
    data = from_rows(rows)
    assert len(pairs_of(data)) == N
    assert data.report.dropped == {"cells that the hub's service has cut": 1}
    path.write_text(json.dumps({"rows": rows}))
    assert load_data(path).report.dropped == data.report.dropped
