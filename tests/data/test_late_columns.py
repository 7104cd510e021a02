"""A column that no row has of those by which a file is recognised.

pytest tests/data/test_late_columns.py
"""

import pytest

import rlhf_lab as lab


def rows(column, late, count=1100):
    """Answers, of which the last 50 say more."""
    found = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(count)]
    for i, row in enumerate(found[-50:]):
        row[column] = late[i % len(late)]
    return found


@pytest.mark.parametrize("column, late", [("bad", ("yes", "no")), ("quality", (1, 5))])
def test_what_says_how_good_answers_are_is_not_passed_over(column, late):
    given = rows(column, late)
    with pytest.raises(ValueError, match=f"'{column}' stands in no row of the first 1000, and "):
        lab.load_data(given)
    assert lab.load_data(given, fields={"ignore": [column]}).sft.train
    with pytest.raises(ValueError, match=f"'{column}' looks as if it said how good"):
        lab.load_data(given[::-1])  # as where it comes first


@pytest.mark.parametrize("column, late", [("bad", ("yes",)), ("source", ("a", "b"))])
def test_other_columns_may_come_late(column, late):
    assert lab.load_data(rows(column, late)).sft.train
