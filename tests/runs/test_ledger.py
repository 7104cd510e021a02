"""The ledger: one vocabulary, sums that mean something, nothing lost on disk."""

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lab.runs import ledger as module
from rlhf_lab.runs.ledger import Ledger, Row


def memory(phase: str, role: str, component: str, value: float, **more) -> dict:
    fields = dict(stage="ppo", quantity="bytes", source="predicted")
    return {**fields, "phase": phase, "role": role, "component": component, "value": value, **more}


@pytest.fixture
def ppo() -> Ledger:
    ledger = Ledger()
    ledger.add(**memory("backward", "policy", "activations", 700))
    ledger.add(**memory("rollout", "policy", "parameters", 100))
    ledger.add(**memory("rollout", "policy", "kv_cache", 50))
    ledger.add(**memory("backward", "policy", "parameters", 100))
    ledger.add(**memory("backward", "value", "parameters", 100))
    return ledger


words = {name: st.sampled_from(words) for name, words in module._VOCABULARY.items()}
amounts = st.floats(min_value=0, allow_nan=False, allow_infinity=True)


@st.composite
def rows(draw) -> Row:
    value = draw(amounts)
    return Row(
        stage=draw(words["stage"]),
        role=draw(words["role"] | st.just("")),
        phase=draw(words["phase"] | st.just("")),
        component=draw(words["component"] | st.just("")),
        quantity=draw(words["quantity"]),
        value=value,
        low=draw(st.none() | st.floats(min_value=0, max_value=value)),
        high=draw(st.none() | st.floats(min_value=value)),
        rank=draw(st.integers(0, 10**6)),
        source=draw(words["source"]),
    )


@given(st.lists(rows(), max_size=5))
def test_what_is_saved_is_what_is_loaded(tmp_path_factory, some):
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    Ledger(some).save(path)
    assert Ledger.load(path) == Ledger(some)
    for line in path.read_text().splitlines():  # strict JSON: no Infinity, no NaN
        json.loads(line, parse_constant=lambda word: pytest.fail(word))
    assert [p.name for p in path.parent.iterdir()] == ["ledger.jsonl"]  # no draft left behind


@given(st.lists(rows(), max_size=6))
def test_every_ledger_can_be_shown(some):
    ledger = Ledger(some)
    assert "object at" not in repr(ledger) + str(ledger)
    assert ledger._repr_html_().count("<tr>") == len(some) + 1


@pytest.mark.parametrize(
    ("field", "value", "choice"),
    [
        ("stage", "pppo", "sft, reward, ppo"),
        ("role", "critic", "policy, reference"),
        ("phase", "generate", "rollout, old_logprobs"),
        ("component", "weights", "parameters, gradients"),
        ("quantity", "memory", "bytes, flops"),
        ("source", "guessed", "predicted, simulated, measured"),
        ("stage", "", "sft, reward"),
        ("unit", "GiB", "'B'"),
        ("value", math.nan, "never NaN"),
        ("value", -1.0, "zero or more"),
        ("value", "12", "number"),
        ("low", 900.0, "outside its band"),
        ("rank", -1, "0 or more"),
    ],
)
def test_a_wrong_word_is_named_with_its_choices(field, value, choice):
    fields = memory("rollout", "policy", "parameters", 100)
    with pytest.raises(ValueError) as caught:
        Ledger().add(**{**fields, field: value})
    message = str(caught.value)
    assert (field in message) and choice in message and "\n" not in message
    if field != "low":
        assert repr(value) in message


def test_unknown_and_missing_fields_are_named(ppo):
    with pytest.raises(ValueError, match="'roles'.*stage, role, phase"):
        ppo.add(stage="ppo", roles="policy")
    with pytest.raises(ValueError, match="needs quantity, value, source"):
        ppo.add(stage="ppo")
    with pytest.raises(ValueError, match="'colour'"):
        ppo.filter(colour="red")
    with pytest.raises(ValueError, match="'value' is not one of"):
        ppo.filter(value=3)
    with pytest.raises(ValueError, match="'rol'"):
        ppo.pivot("phase", "rol")
    with pytest.raises(ValueError, match="phase='rolout'"):  # a typo is not an empty answer
        ppo.total(phase="rolout")


def test_unit_follows_from_quantity():
    units = {q: Row(stage="sft", quantity=q, value=1, source="measured").unit for q in module.UNITS}
    assert units == {
        "bytes": "B",
        "flops": "FLOP",
        "seconds": "s",
        "tokens": "tokens",
        "money": "USD",
        "sent": "B",
    }


def test_numbers_of_numpy_become_plain_floats():
    import numpy

    row = Row(stage="sft", quantity="bytes", value=numpy.int64(3), source="measured")
    assert type(row.value) is float and row.value == 3


def test_peak_is_the_largest_phase_not_the_sum(ppo):
    assert ppo.peak() == 900  # 700 + 100 + 100, by hand
    assert {row.phase for row in ppo.at_peak()} == {"backward"}
    assert ppo.peak(role="value") == 100
    assert Ledger().peak() == 0


def test_peak_is_of_one_rank(ppo):
    both = ppo + [Row(**memory("rollout", "policy", "parameters", 950, rank=1))]
    assert both.peak() == 950  # not 1100: the ranks' memories are different chips
    assert both.peak(rank=0) == 900


def test_sums_that_mean_nothing_are_refused(ppo):
    with pytest.raises(ValueError, match="over phases.*peak"):
        ppo.total()
    assert ppo.total(phase="rollout") == 150
    ppo.add(stage="ppo", phase="rollout", quantity="seconds", value=2, source="predicted")
    with pytest.raises(ValueError, match="bytes and seconds"):
        ppo.total(phase="rollout")
    ppo.add(stage="ppo", phase="rollout", quantity="seconds", value=3, source="measured")
    with pytest.raises(ValueError, match="predicted and measured"):
        ppo.total(quantity="seconds")
    assert ppo.total(quantity="seconds", source="measured") == 3
    assert ppo.pivot("phase", "source", quantity="seconds") == {
        "rollout": {"predicted": 2, "measured": 3}
    }


def test_pivot_sums_and_keeps_the_order_of_the_vocabulary(ppo):
    table = ppo.pivot("phase", "role", quantity="bytes")
    assert table == {"rollout": {"policy": 150}, "backward": {"policy": 800, "value": 100}}
    assert list(table) == ["rollout", "backward"]  # backward was written first
    assert "value" not in table["rollout"]  # unknown is not zero


def test_filter_takes_several_values_and_gives_a_ledger(ppo):
    found = ppo.filter(component=("kv_cache", "activations"))
    assert isinstance(found, Ledger) and len(found) == 2
    assert len(ppo.filter(rank=1)) == 0
    assert found[0].value == 700 and isinstance(found[:1], Ledger)


def test_pandas_gets_every_field(ppo):
    frame = ppo.to_pandas()
    assert list(frame.columns)[:3] == ["stage", "role", "phase"] and len(frame) == 5
    assert frame.value.sum() == 1050
    assert len(Ledger().to_pandas().columns) == 11


def test_a_bad_line_is_named_with_its_number(tmp_path, ppo):
    path = ppo.save(tmp_path / "ledger.jsonl")
    path.write_text(path.read_text() + '{"stage": "ppo", "rol": 1}\n')
    with pytest.raises(ValueError, match="line 6 is not a ledger row"):
        Ledger.load(path)


def test_long_tables_say_what_they_leave_out(ppo):
    many = Ledger(list(ppo) * 20)
    assert str(many).endswith("… and 40 more rows")
    assert repr(many) == "Ledger(100 rows; ppo; bytes; predicted)"
    assert "50 B" in str(ppo) and "band" not in str(ppo)


def test_the_ledger_stands_on_the_standard_library():
    code = (
        "import sys, rlhf_lab.runs.ledger, rlhf_lab.runs.run, rlhf_lab.charts.report, "
        "rlhf_lab.runs.progress; "
        "print([m for m in ('torch', 'pandas', 'numpy', 'IPython') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
