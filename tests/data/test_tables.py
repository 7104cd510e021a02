"""Tables of other libraries, which hand themselves out by Arrow's interface.

pytest tests/data/test_tables.py
"""

import pyarrow as pa
import pytest

import rlhf_lab as lab
from rlhf_lab.data.files import open_rows

ROWS = [{"prompt": f"What is {i}?", "completion": f"A number, {i}."} for i in range(20)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    }
    for row in ROWS
]


class Frame:
    """What polars' DataFrame and DuckDB's relation have: rows only through Arrow's interface."""

    def __init__(self, rows):
        self.table = pa.Table.from_pylist(rows)

    def __arrow_c_stream__(self, requested_schema=None):
        return self.table.__arrow_c_stream__(requested_schema)


@pytest.mark.parametrize("rows", [ROWS, CHATS], ids=["texts", "chats"])
def test_a_table_is_read_as_its_rows(rows):
    for table in (Frame(rows), pa.Table.from_pylist(rows)):
        assert list(open_rows(table)) == rows
        assert lab.load_data(table).sft == lab.load_data(rows).sft


def test_a_column_alone_and_an_unread_query_are_refused_by_name():
    class Series:
        def __arrow_c_stream__(self, requested_schema=None):
            return pa.chunked_array([["a", "b"]]).__arrow_c_stream__(requested_schema)

    class LazyFrame:
        def collect(self):
            raise AssertionError("a query is not run for a guess")

    with pytest.raises(ValueError, match=r"^a Series is no table of rows \(.*give the whole table"):
        list(open_rows(Series()))
    with pytest.raises(ValueError, match=r"not a LazyFrame: give what its collect\(\) returns$"):
        list(open_rows(LazyFrame()))
