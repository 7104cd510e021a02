"""A device of one's own: a file of figures, in the catalogue's units.

pytest tests/cost/test_own_device.py
"""

import json

import pytest

from rlhf_lab.cost.hardware import CATALOGUE, hardware

GIB = 2**30


def refused(call, *args, **kwargs) -> str:
    """The one line with which it is refused."""
    with pytest.raises(ValueError) as error:
        call(*args, **kwargs)
    assert str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def written(folder, name: str, text: str):
    (folder / name).write_text(text)
    return folder / name


def test_a_file_gives_a_device_of_ones_own(tmp_path):
    figures = {"memory_gib": 94, "bandwidth_gb_s": 3900, "tflops": {"bf16": 835, "fp32": 60}}
    hw = hardware(str(written(tmp_path, "h100-nvl.json", json.dumps(figures))))
    assert (hw.name, hw.kind, hw.source) == ("h100-nvl", "gpu", "your h100-nvl.json")
    assert (hw.memory, hw.bandwidth) == (94 * GIB, 3.9e12)
    assert hw.flops == {"bf16": 835e12, "fp32": 60e12} and hw.price is None
    assert hardware(tmp_path / "h100-nvl.json", price=3).price == 3


def test_a_file_changes_a_device_of_the_catalogue(tmp_path):
    text = "like: h100\nmemory_gib: 93.1\nmatmul_efficiency: 0.62\ntflops: {bf16: 835}\nprice: 2"
    hw = hardware(written(tmp_path, "mine.yaml", text))
    assert hw.memory == 93.1 * GIB and hw.link == CATALOGUE["h100"].link
    assert hw.flops == {**CATALOGUE["h100"].flops, "bf16": 835e12}
    assert hw.matmul_rate("bf16") == 835e12 * 0.62
    assert "memory, matmul_efficiency, flops given by you" in hw.source
    assert hw.price_source == "given by you"


def test_a_measured_rate_of_ones_own_replaces_the_published_one(tmp_path):
    curve = [["bf16", 2 * 1024**3, 6e13], ["bf16", 2 * 4096**3, 2.4e14]]
    mine = {"matmul_efficiency": 1, "matmul_curve": curve, "causal_attention": 0.5}
    hw = hardware(written(tmp_path, "mine.json", json.dumps({"like": "a100", **mine})))
    assert hw.matmul_rate("bf16", 2 * 1024**3) == pytest.approx(6e13)
    assert hw.matmul_rate("bf16", 2 * 2048**3) == pytest.approx(1.2e14)  # half way, logarithmic
    assert hw.rates("bf16") == (pytest.approx(2.4e14), 312e12, 312e12 * 0.27, 2 * 4096**3)


def test_what_measure_prints_is_a_file_too(tmp_path):
    whole = hardware("a100", price=1.0)
    assert hardware(written(tmp_path, "x.json", json.dumps(whole.to_dict()))) == whole


@pytest.mark.parametrize(
    "name, text, line",
    [
        ("x.json", "{", "Expecting property name"),
        ("x.yaml", "a: [", "line 1 is not YAML: expected the node"),
        ("x.json", "[" * 100_000, "recursion"),
        ("x.json", "[1]", "holds no names with values, but [1]"),
        ("x.json", '{"like": "a100", "like": "h100"}', "two lines both say like"),
        ("x.json", "{}", "lacks bandwidth, flops, memory"),
        ("x.json", '{"like": "h10"}', "did you mean 'h100'?"),
        ("x.json", '{"like": "mine.json"}', "hardware='mine.json': "),
        ("x.json", '{"like": "h100", "memory": 80}', "did you mean 'memory_gib'?"),
        ("x.json", '{"like": "h100", "memory_gib": "80GB"}', "memory_gib must be a number"),
        ("x.json", '{"like": "h100", "memory_gib": -1}', "memory must be a positive number"),
        ("x.json", '{"like": "h100", "tflops": 400}', "flops must be FLOP/s by dtype"),
        ("x.json", '{"like": "h100", "tflops": {"bf16": "fast"}}', "flops must be"),
        ("x.json", '{"like": "h100", "matmul_curve": [1]}', "matmul_curve must be"),
        ("x.json", '{"like": "h100", "bandwith_gb_s": 1}', "did you mean 'bandwidth_gb_s'?"),
        ("x.json", '{"flops": {"bf16": 1e12}, "memory_gib": 3}', "hardware lacks"),
    ],
)
def test_a_file_that_is_wrong_is_one_line(name, text, line, tmp_path):
    said = refused(hardware, str(written(tmp_path, name, text)))
    assert line in said and name in said


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    line = f"hardware: no such file: {tmp_path}/mime.json; did you mean '{tmp_path}/mine.json'?"
    assert refused(hardware, tmp_path / "mime.json") == line
