"""Wrong types are answered in one line of ours, whichever public function is called.

Run: pytest tests/test_arguments.py
"""

import inspect
import re
import traceback
from pathlib import Path

import numpy
import pytest

import rlhf_lab as lab
from rlhf_lab.arguments import checked

RIGHT = {
    "str": "tiny",
    "dict[str, Run]": {},
    "Mapping[str, Contender | Sequence[Contender]]": {"SFT": "tiny"},
    "Sequence[Setting]": [1, 2],
    "Plan | str": "sft",
}
"""By annotation: what the other arguments are, so that only one of them is wrong."""


def first_two() -> list[tuple[str, str]]:
    """(function, argument) of the public functions' first two arguments."""
    found = []
    for name in lab.__all__:
        if not isinstance(function := getattr(lab, name), type):
            parameters = inspect.signature(function).parameters.values()
            named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
            found += [(name, p.name) for p in named[:2]]
    return found


@pytest.mark.parametrize("wrong", [3.5j, object()], ids=["a number", "a thing"])
@pytest.mark.parametrize(("name", "argument"), first_two())
def test_a_wrong_type_is_one_line(name, argument, wrong, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function, given, more = getattr(lab, name), [], {}
    for p in inspect.signature(function).parameters.values():
        kind = str(p.annotation)
        value = wrong if p.name == argument else RIGHT.get(kind, "tiny")
        if p.name == argument or p.default is p.empty and p.kind in (0, 1):
            if p.kind is p.KEYWORD_ONLY:
                more[p.name] = value
            else:
                given.append(value)
        elif p.kind in (0, 1):
            given.append(p.default)
    with pytest.raises((TypeError, ValueError)) as refused:
        function(*given, **more)
    assert "\n" not in str(refused.value)
    *_, last = traceback.extract_tb(refused.tb)
    assert Path(lab.__file__).parent in Path(last.filename).parents, (str(refused.value), last)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: lab.serve("tiny", port="abc"), "serve: port must be int, not 'abc'"),
        (lambda: lab.export(3), "export: run must be Run or Model or str or Path, not 3"),
        (lambda: lab.continuous_batching(requests="4"), "requests must be int, not '4'"),
        (lambda: lab.quantize("tiny", prompts=True), "quantize: prompts must be int, not True"),
        (lambda: lab.label(n=1.5), "label: n must be int, not 1.5"),
        (lambda: lab.bench("http://x", concurrency="14"), "concurrency must be Sequence, not '14'"),
        (
            lambda: lab.bench("http://x", concurrency=["4"]),
            "concurrency, each must be int, not '4'",
        ),
        (lambda: lab.inspect("a", 7), "inspect: runs must be Run or str or Path, not 7"),
        (
            lambda: lab.train("grpo", max_steps=24),
            "train: there is no argument max_steps: model, hardware and settings are the plan's: "
            "lab.plan(stage, max_steps=…)",
        ),
        (lambda: lab.train("ppo", overwrit=True), "overwrit: did you mean 'overwrite'?"),
        (lambda: lab.xray(model="tiny"), "xray: there is no argument model: it has plan"),
        (lambda: lab.chat(x=7), "chat: named must be Run or Model or str or Path or tuple, not 7"),
    ],
)
def test_the_line_names_function_argument_and_value(call, line):
    with pytest.raises(TypeError, match=re.escape(line)) as refused:
        call()
    assert isinstance(refused.value, ValueError), "which the command line tells in a line"


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: lab.label(n=-1), "n=-1: give the number of pairs to label, 1 or more"),
        (
            lambda: lab.load_data([{"prompt": "a", "completion": "b"}], fields=3),
            "fields=3: give a dict, a YAML file or a function",
        ),
    ],
)
def test_values_that_cannot_be_are_refused_in_a_line(call, line):
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        call()


def test_what_was_always_taken_still_is():
    """Rows as they are, paths for names, ranges for lists."""
    rows = [{"prompt": f"{i}?", "completion": f"{i}."} for i in range(12)]
    mini = Path(lab.load("mini").paths["base"])
    assert lab.describe_data(rows, mini)[0]["train"] == 11
    assert lab.plan("sft", mini, data=rows).settings["rows"] == 11
    assert len(lab.sweep("rows", range(8, 24, 8), model=mini).points) == 2


def test_what_fits_goes_through_and_missing_arguments_are_python_s_to_name():
    def f(n: "int", share: "float" = 0.5, run: "Run | str | None" = None, odd: "Odd" = 0):  # noqa: F821
        return n, share, run, odd

    whole = numpy.int64(3)
    assert checked(f)(whole, 1, None, odd=f) == (3, 1, None, f)
    assert checked(f)(1, numpy.float32(0.25), lab.Run(".")).count(0) == 1
    assert checked(f)(1, run=Path("runs/sft"))[2] == Path("runs/sft")
    with pytest.raises(TypeError, match=r"f\(\) missing 1 required positional argument: 'n'"):
        checked(f)()
    assert (
        lab.plan is lab.plan
        and lab.plan.__doc__
        and inspect.signature(lab.plan).parameters["stage"]
    )
