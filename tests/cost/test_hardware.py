"""Devices: names, overrides, nodes, the curve, this machine; the catalogue is in test_catalogue.py.

pytest tests/cost/test_hardware.py
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lab.cost.device import KINDS
from rlhf_lab.cost.hardware import (
    CATALOGUE,
    DTYPES,
    Hardware,
    calibration_file,
    hardware,
    is_here,
    load_calibration,
    nodes_for,
    save_calibration,
    usable_memory,
)

GIB = 2**30


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
        ("rtx 3090", "rtx3090"),
        ("RTX3090", "rtx3090"),
        ("RTX 4060 Ti 16GB", "rtx4060ti"),
        ("rtx5090", "rtx5090"),
        ("NVIDIA GeForce RTX 5070 Ti", "rtx5070ti"),
        ("l40s", "l40s"),
        ("L40", "l40"),
        ("A10", "a10"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000-ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtxpro6000"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("gh200", "gh200"),
        ("NVIDIA B300 SXM6 AC", "b300"),
        ("gb200", "gb200"),
        ("NVIDIA GB300", "gb300"),
        ("AMD Instinct MI300X", "mi300x"),
        ("mi300x", "mi300x"),
        ("tpu-v5e", "tpu-v5e"),
        ("TPU v5e", "tpu-v5e"),
        ("v5litepod", "tpu-v5e"),
        ("v6e", "tpu-v6e"),
        ("m3 max", "m3-max"),
        ("Apple M3 Max", "m3-max"),
        ("m3", "m3"),
        ("colab t4", "t4"),
        ("kaggle p100", "p100"),
        ("Tesla P100-PCIE-16GB", "p100"),
        ("colab tpu", "tpu-v5e"),
    ],
)
def test_aliases(name, meant):
    assert hardware(name) is CATALOGUE[meant]


def test_another_device_is_not_taken_for_one_we_know():
    for name in ("NVIDIA H100 PCIe", "Tesla V100-SXM2-16GB", "NVIDIA A100-PCIE-40GB", "MI300A", ""):
        assert "choose from laptop" in refused(hardware, name)
    assert "a name or a Hardware, not int" in refused(hardware, 8)


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("h10", "h100"),
        ("a1000-80", "a100-80"),
        ("rtx4085", "rtx4080"),
        ("l45s", "l40s"),
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
        ("kaggle 2xT4", "t4", 2),
        ("Kaggle T4 x2", "t4", 2),
        ("kaggle tpu v5e-8", "tpu-v5e", 8),
        ("4 gb200", "gb200", 4),
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
    {"flops": {"fp4": 1e15}},
    {"flops": {"bf16": 0}},
    {"kind": "npu"},
    {"causal_attention": 0},
    {"masked_attention": 1.5},
    {"note": None},
    {"date": 2026},
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


# ------------------------------------------------------------------------------------ nodes


@pytest.mark.parametrize(
    "gpus, device, nodes",
    [
        (8, "h100", 1),
        (16, "h100", 2),
        (12, "h100", 2),
        (9, "h100", 3),
        (17, "h100", 17),
        (64, "gb200", 1),
        (144, "gb200", 2),
        (8, "t4", 2),
        (1_000_003, "h100", 1_000_003),
    ],
)
def test_more_devices_than_a_machine_holds_are_more_machines(gpus, device, nodes):
    assert nodes_for(gpus, hardware(device)) == nodes


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
    kind=st.sampled_from(list(KINDS)),
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


def test_a_browser_has_no_machine_and_plans_for_others(monkeypatch):
    assert is_here("here") and is_here(hardware("here")) and not is_here("h100")
    monkeypatch.setattr("rlhf_lab.cost.hardware.IN_A_BROWSER", True)
    assert "name a device" in refused(hardware, "here")
    assert hardware("h100").memory > 70 * GIB and not is_here("h100")
