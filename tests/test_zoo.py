"""What `lab.specimens` shows: riddles that do not tell, answers that do, curves of real runs.

pytest tests/test_zoo.py
"""

import pytest

import rlhf_lab as lab
from rlhf_lab import zoo
from rlhf_lab.exercises.specimens import CASES, SPECIMENS


def test_a_riddle_shows_the_curves_of_its_answer_and_tells_nothing():
    assert sorted(CASES) == sorted(SPECIMENS) and CASES != [*SPECIMENS]
    for number, name in enumerate(CASES, 1):
        riddle, answer = lab.specimens(number), lab.specimens(name)
        one = SPECIMENS[name]
        assert f"case {number}:" in riddle.text and f"case {number}:" in answer.text
        assert {"reward", "kl_k3"} <= zoo.stored()["specimens"][name]["curves"].keys()
        for told in (name, one.mechanism, one.fix, one.address):
            assert told in answer.text and told not in "".join([riddle.text, *riddle.parts])
        assert zoo.seen(name) in answer.text and riddle.parts[1:] == answer.parts[1:]
        assert f"{number} " in str(lab.specimens()) and zoo.seen(name) in str(lab.specimens())
    for wrong in (0, len(CASES) + 1):
        with pytest.raises(ValueError, match=f"no case {wrong}: they are numbered from 1 to"):
            lab.specimens(wrong)


def test_each_specimen_has_five_curves_of_what_shows_it_and_leaves_the_band_where_it_says():
    stored = zoo.stored()
    for name, one in stored["specimens"].items():
        assert all(len(x) == int(one["seeds"].split()[-1]) for x in one["curves"].values()), name
        if one["first"] is None:
            continue
        low, _, high = stored["healthy"][one["first"]]
        at, count = one["iteration"], int(one["seeds"].split()[0])
        left = 0
        for curve in one["curves"][one["first"]]:
            band = zip(curve, low, high)
            out = [x is not None and not a <= x <= b for x, a, b in band]
            left += any(x and all(out[i + 1 : i + 2]) for i, x in enumerate(out))
        assert left == count >= 0.8 * int(one["seeds"].split()[-1]) and 1 <= at <= len(low), name
