"""Devices against facts worked out by hand: the catalogue, names, overrides, this machine.

pytest tests/cost/test_hardware.py
"""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lab.cost.hardware import (
    CATALOGUE,
    DTYPES,
    Hardware,
    calibration_file,
    hardware,
    load_calibration,
    save_calibration,
    usable_memory,
)

GIB = 2**30
GPUS = [name for name, hw in CATALOGUE.items() if hw.kind == "gpu"]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home of its own: no test reads or writes the calibration of whoever runs it."""
    monkeypatch.setenv("RLHF_LAB_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def refused(call, *args, **kwargs) -> str:
    """The one line with which it is refused."""
    with pytest.raises(ValueError) as error:
        call(*args, **kwargs)
    assert str(error.value) and "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------ the catalogue

# Tensor cores, multiply-adds per core and clock, boost clock: the chip's own arithmetic, dense.
CHIPS = {
    "t4": (320, 64, 1.59e9),
    "l4": (232, 128, 2.04e9),
    "a10g": (320, 64, 1.71e9),
    "v100": (640, 64, 1.53e9),
    "rtx4090": (512, 64, 2.52e9),
    "a6000": (336, 128, 1.80e9),
    "a100-40": (432, 256, 1.41e9),
    "a100-80": (432, 256, 1.41e9),
    "h100": (528, 512, 1.83e9),
    "h200": (528, 512, 1.83e9),
}
# Bits of the memory bus, bits per second and pin.
MEMORIES = {
    "t4": (256, 10e9),
    "l4": (192, 12.5e9),
    "a10g": (384, 12.5e9),
    "v100": (4096, 1.754e9),
    "rtx4090": (384, 21e9),
    "a6000": (384, 16e9),
    "a100-40": (5120, 2.43e9),
    "a100-80": (5120, 3.186e9),
    "h100": (5120, 5.23e9),
    "h200": (6144, 6.25e9),
    "b200": (7680, 7.992e9),
}


@pytest.mark.parametrize("name", CHIPS)
def test_16_bit_peaks_are_the_chips_and_dense(name):
    tensor_cores, multiply_adds, clock = CHIPS[name]
    peak = tensor_cores * multiply_adds * 2 * clock
    assert CATALOGUE[name].flops["fp16"] == pytest.approx(peak, rel=0.01)
    if name not in ("t4", "v100"):
        assert CATALOGUE[name].flops["bf16"] == CATALOGUE[name].flops["fp16"]


@pytest.mark.parametrize("name", MEMORIES)
def test_bandwidth_is_the_bus_times_its_rate(name):
    bits, rate = MEMORIES[name]
    assert CATALOGUE[name].bandwidth == pytest.approx(bits * rate / 8, rel=0.01)


def test_figures_everybody_knows():
    assert hardware("h100").bandwidth == 3.35e12
    assert hardware("h100").flops["bf16"] == 989e12
    for name in ("a100-40", "a100-80", "h100"):
        flops = CATALOGUE[name].flops
        assert flops["bf16"] == pytest.approx(2 * flops["tf32"])
    assert list(hardware("a100").flops.values()) == [19.5e12, 156e12, 312e12, 312e12]
    assert hardware("h200").flops == hardware("h100").flops
    assert hardware("b200").flops["bf16"] == pytest.approx(2.25e15)
    assert hardware("h100").link == 900e9 / 2


@pytest.mark.parametrize("name", ["v100", "t4"])
def test_volta_and_turing_have_neither_bf16_nor_tf32(name):
    assert set(CATALOGUE[name].flops) == {"fp32", "fp16"}
    assert "choose from fp32, fp16" in refused(CATALOGUE[name].matmul_rate, "bf16")


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_entry_names_its_source(name):
    hw = CATALOGUE[name]
    assert hw.source and not hw.measured
    assert (hw.price is None) == (hw.price_date is None) == (hw.price_source is None)
    if hw.price_date:
        assert re.fullmatch(r"20\d\d(-\d\d){0,2}", hw.price_date)
    assert hw.kind == "cpu" or hw.price is not None


@pytest.mark.parametrize("name", GPUS)
def test_no_gpu_is_taken_to_reach_its_peak_for_want_of_a_figure(name):
    """An entry that forgets the shares of the peaks would be planned at all of them."""
    assert 0 < CATALOGUE[name].matmul_efficiency < 1
    assert 0 < CATALOGUE[name].bandwidth_efficiency < 1


NOMINAL = {
    "t4": 16,
    "l4": 24,
    "a10g": 24,
    "v100": 32,
    "rtx4090": 24,
    "a6000": 48,
    "a100-40": 40,
    "a100-80": 80,
    "h100": 80,
    "h200": 141,
    "b200": 180,
}


@pytest.mark.parametrize("name", GPUS)
def test_memory_is_a_little_less_than_on_the_box(name):
    assert 0.9 * NOMINAL[name] <= CATALOGUE[name].memory / GIB < NOMINAL[name]


def test_cpus_are_slow_in_16_bits_and_no_rate_exceeds_the_peak():
    for hw in CATALOGUE.values():
        assert hw.kind == "gpu" or hw.flops["bf16"] < hw.flops["fp32"] / 20
        for dtype, peak in hw.flops.items():
            assert 0 < hw.matmul_rate(dtype) == hw.matmul_rate(dtype, 1e6) <= peak
    assert (hardware("binder").memory, hardware("binder").price) == (2 * GIB, 0)


# ------------------------------------------------------------------------------ names and overrides


@pytest.mark.parametrize(
    "name, meant",
    [
        ("A100", "a100-80"),
        ("a100-80gb", "a100-80"),
        ("A100 40GB", "a100-40"),
        ("H100-80", "h100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("Colab", "t4"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("4090", "rtx4090"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA H200", "h200"),
        ("cpu", "laptop"),
        ("B200", "b200"),
        (" l4 ", "l4"),
        ("V100", "v100"),
    ],
)
def test_aliases(name, meant):
    assert hardware(name) is CATALOGUE[meant]


def test_another_device_is_not_taken_for_one_we_know():
    for name in ("NVIDIA H100 PCIe", "Tesla V100-SXM2-16GB", "A10", "NVIDIA GB200"):
        assert "choose from laptop" in refused(hardware, name)
    assert "a name or a Hardware, not a int" in refused(hardware, 8)


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("h10", "h100"),
        ("a1000-80", "a100-80"),
        ("rtx4080", "rtx4090"),
        ("bindr", "binder"),
    ],
)
def test_an_unknown_name_names_the_nearest(name, nearest):
    assert f"did you mean {nearest!r}?" in refused(hardware, name)


@pytest.mark.parametrize(
    "name, one, count",
    [
        ("8xH100", "h100", 8),
        ("8 × h100", "h100", 8),
        ("h100x8", "h100", 8),
        ("2 A100", "a100-80", 2),
        ("2x4090", "rtx4090", 2),
        ("a100-80gb:4", "a100-80", 4),
    ],
)
def test_a_count_belongs_elsewhere(name, one, count):
    assert f"hardware={one!r}, gpus={count}" in refused(hardware, name)


def test_every_figure_can_be_yours():
    hw = hardware("h100", price=2.0, memory=10 * GIB, op_seconds=1e-6)
    assert (hw.price, hw.memory, hw.op_seconds) == (2.0, 10 * GIB, 1e-6)
    assert (hw.price_date, hw.price_source) == (None, "given by you")
    assert hw.source.endswith("memory, op_seconds given by you")
    assert hardware(hw) is hw and hardware(hw, name="mine").name == "mine"
    assert CATALOGUE["h100"].price != 2.0  # the catalogue stays


def test_a_rate_of_yours_changes_that_dtype_only():
    hw = hardware("h100", flops={"bf16": 5e14})
    assert hw.flops == {**CATALOGUE["h100"].flops, "bf16": 5e14}
    curve = (("bf16", 1e6, 1e9), ("fp32", 1e6, 2e9))
    measured = hw.with_(matmul_curve=curve).with_(flops={"bf16": 7e14})
    assert measured.matmul_rate("bf16", 1e6) == 7e14 * hw.matmul_efficiency
    assert measured.matmul_rate("fp32", 1e6) == pytest.approx(2e9 * hw.matmul_efficiency)


WRONG = [
    {"memory": 0},
    {"memory": "80GB"},
    {"memory": float("nan")},
    {"memory": True},
    {"memory": 10**400},
    {"memory": None},
    {"bandwidth": -1},
    {"link": 0},
    {"network": "fast"},
    {"price": -0.1},
    {"price": float("inf")},
    {"devices_per_node": 0},
    {"devices_per_node": 1.5},
    {"matmul_efficiency": 1.1},
    {"bandwidth_efficiency": 0},
    {"op_seconds": -1e-6},
    {"flops": 1e12},
    {"flops": {"fp8": 1e15}},
    {"flops": {"bf16": 0}},
    {"kind": "tpu"},
    {"name": " "},
    {"matmul_curve": ((1, 2),)},
    {"matmul_curve": (("bf16", 0, 1),)},
    {"matmul_curve": 3},
    {"measured": 1},
    {"source": None},
    {"price_date": 2026},
]


@pytest.mark.parametrize("figures", WRONG, ids=str)
def test_a_wrong_figure_is_one_line_that_names_it(figures):
    assert next(iter(figures)) in refused(hardware, "a100", **figures)
    assert "did you mean 'bandwidth'?" in refused(hardware, "h100", bandwith=1)


# --------------------------------------------------------------------------- the curve, and to disk


def test_the_curve_is_a_straight_line_between_its_points_on_logarithmic_axes():
    hw = hardware("laptop", matmul_curve=[("fp32", 1e8, 4e10), ("fp32", 1e6, 1e10)], measured=True)
    assert hw.matmul_rate("fp32", 1e6) == pytest.approx(1e10)
    assert hw.matmul_rate("fp32", 1e7) == pytest.approx(2e10)  # half way: the geometric mean
    assert hw.matmul_rate("fp32", 1e8) == pytest.approx(4e10)
    assert hw.matmul_rate("fp32", 1) == pytest.approx(1e10)
    assert hw.matmul_rate("fp32", 1e15) == pytest.approx(4e10)
    assert hw.matmul_rate("fp32") == hw.flops["fp32"]
    assert hw.matmul_rate("bf16", 1e6) == hw.flops["bf16"]  # nothing measured: the peak
    for wrong in (0, -1, float("nan"), "big"):
        assert "FLOPs" in refused(hw.matmul_rate, "fp32", wrong)


positive = st.floats(1e-9, 1e18) | st.integers(1, 2**60)
maybe_text = st.none() | st.text(max_size=5)
any_hardware = st.builds(
    Hardware,
    name=st.text(min_size=1).filter(str.strip),
    kind=st.sampled_from(["gpu", "cpu"]),
    memory=positive,
    flops=st.dictionaries(st.sampled_from(DTYPES), positive, min_size=1),
    bandwidth=positive,
    source=st.just("drawn"),
    link=st.none() | positive,
    network=st.none() | positive,
    devices_per_node=st.integers(1, 99),
    price=st.none() | st.floats(0, 1e6),
    price_date=maybe_text,
    price_source=maybe_text,
    matmul_efficiency=st.floats(0.01, 1),
    bandwidth_efficiency=st.floats(0.01, 1),
    op_seconds=st.floats(0, 1),
    measured=st.booleans(),
    matmul_curve=st.lists(st.tuples(st.sampled_from(DTYPES), positive, positive), max_size=5),
)


@given(any_hardware)
def test_through_json_and_back(hw):
    assert Hardware.from_dict(json.loads(json.dumps(hw.to_dict()))) == hw
    assert hash(hw) == hash(Hardware.from_dict(hw.to_dict()))


@given(any_hardware, st.floats(1e-3, 1e20))
def test_a_rate_lies_between_the_measured_ones(hw, flops):
    for dtype in hw.flops:
        rates = [r for d, _, r in hw.matmul_curve if d == dtype] or [hw.flops[dtype]]
        rate = hw.matmul_rate(dtype, flops) / hw.matmul_efficiency
        assert min(rates) * (1 - 1e-9) <= rate <= max(rates) * (1 + 1e-9)


def test_saved_and_loaded_by_the_variable(home):
    assert load_calibration() is None
    mine = hardware("laptop", name="Jörg's laptop", matmul_curve=[("fp32", 1e6, 1e10)])
    assert save_calibration(mine) == calibration_file() == home / "hardware.json"
    save_calibration(mine)  # in place of the old one
    assert load_calibration() == hardware("here") == hardware("HERE") == mine
    assert hardware("here", price=1).price == 1
    assert os.listdir(home) == ["hardware.json"]  # no scratch file stays


def test_a_save_that_fails_leaves_the_old_file(home, monkeypatch):
    save_calibration(CATALOGUE["laptop"])
    monkeypatch.setattr(json, "dumps", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_calibration(CATALOGUE["binder"])
    assert load_calibration() == CATALOGUE["laptop"]
    assert os.listdir(home) == ["hardware.json"]


GOOD = CATALOGUE["laptop"].to_dict()
DAMAGED = {
    "empty": b"",
    "half": json.dumps(GOOD).encode()[:-9],
    "a list": b"[]",
    "not text": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "no name": json.dumps({**GOOD, "name": ""}).encode(),
    "not a number": json.dumps({**GOOD, "memory": float("nan")}).encode(),
    "of another version": json.dumps({**GOOD, "watts": 700}).encode(),
    "lacks": json.dumps({k: v for k, v in GOOD.items() if k != "flops"}).encode(),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_file_is_one_line_that_says_what_to_delete(how, home):
    home.mkdir()
    calibration_file().write_bytes(DAMAGED[how])
    line = refused(hardware, "here")
    assert f"{calibration_file()} is damaged" in line and "delete it" in line


# ------------------------------------------------------------------------------------- this machine


def test_here_without_a_calibration_is_a_guess_that_says_so():
    hw = hardware("here")
    assert hw.kind == "cpu" and not hw.measured and hw.price is None
    assert "guess" in hw.name and "calibrate()" in hw.source
    assert 0 < hw.memory <= psutil.virtual_memory().total
    assert hw.bandwidth <= 40e9


@pytest.mark.parametrize(
    "limits, expected",
    [
        ({}, 8 * GIB),
        ({"memory.max": "max"}, 8 * GIB),
        ({"memory.max": str(2 * GIB)}, 2 * GIB),
        ({"jobs/memory.max": str(3 * GIB), "jobs/mine/memory.max": "max"}, 3 * GIB),
        ({"memory/memory.limit_in_bytes": "9223372036854771712"}, 8 * GIB),
        ({"memory/old/memory.limit_in_bytes": str(GIB)}, GIB),
        ({"memory.max": str(64 * GIB)}, 8 * GIB),
    ],
)
def test_memory_is_the_lowest_of_the_machines_and_its_cgroups(
    tmp_path, monkeypatch, limits, expected
):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=8 * GIB))
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("5:cpu,memory:/old\n2:cpu:/x\n0::/jobs/mine\nodd\n")
    for name, text in limits.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert usable_memory(tmp_path) == expected


def test_the_file_loads_no_numerics():
    code = (
        "import sys, rlhf_lab.cost.hardware as h; h.hardware('here'); h.hardware('a100');"
        "print(*{'torch', 'numpy', 'pandas', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
