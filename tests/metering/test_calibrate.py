"""Calibration: this machine measured in seconds, and what a GPU takes from the catalogue.

pytest tests/metering/test_calibrate.py
"""

import time
import warnings
from types import SimpleNamespace

import pytest

import rlhf_lab as lab
from rlhf_lab.cost.hardware import CATALOGUE, load_calibration


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home of its own: no test reads or writes the calibration of whoever runs it."""
    monkeypatch.setenv("RLHF_LAB_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """This machine in three seconds, and the seconds that it took."""
    import torch

    from rlhf_lab.metering.calibrate import calibrate

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("RLHF_LAB_HOME", str(tmp_path_factory.mktemp("calibrated")))
        warnings.simplefilter("ignore")  # a busy machine is no failure here
        start, state = time.perf_counter(), torch.random.get_rng_state()
        hw = calibrate(seconds=3)
        took = time.perf_counter() - start
        assert torch.equal(state, torch.random.get_rng_state())  # it draws from a seed of its own
        assert torch.is_grad_enabled() and load_calibration() == hw
    return hw, took


def test_calibration_measures_everything(calibrated):
    hw, took = calibrated
    assert hw.measured and hw.source.startswith("calibrated on 20")
    assert {"fp32", "bf16", "fp16"} <= set(hw.flops) or hw.kind == "gpu"
    assert all(rate > 1e6 for rate in hw.flops.values())
    assert 1e8 < hw.bandwidth < 1e14
    assert 1e-8 < hw.op_seconds < 1e-2 and 1e-8 < hw.launch_seconds < 1e-2
    assert 1e6 < hw.function_rate < 1e14
    assert hw.matmul_efficiency == hw.bandwidth_efficiency == 1
    sizes = [f for d, f, _ in hw.matmul_curve if d == "fp32"]
    if hw.kind == "cpu":
        assert 1e8 < hw.operand_bandwidth < 1e14 and not sizes
    else:
        assert sizes == sorted(set(sizes)) and len(sizes) >= 2
        assert hw.matmul_rate("fp32", sizes[-1]) == pytest.approx(hw.flops["fp32"])
    assert took < 30  # about 9: three rounds of small models; other tests may take the machine


def test_the_rate_is_that_of_a_product_timed_here(calibrated):
    import torch

    hw, _ = calibrated
    device = "cuda" if hw.kind == "gpu" else "cpu"
    a, b = (torch.rand(1024, 1024, device=device) for _ in range(2))
    expected, seen = hw.matmul_rate("fp32", 2 * 1024**3), []
    for _ in range(5):  # tries: another program may hold the cores for a moment
        start = time.perf_counter()
        for _ in range(3):
            (a @ b)[0, 0].item()
        seen.append(3 * 2 * 1024**3 / (time.perf_counter() - start))
    assert expected / 2 <= max(seen) and min(seen) <= 2 * expected


def test_calibration_saves_only_when_asked_and_refuses_in_one_line(home):
    from rlhf_lab.metering.calibrate import calibrate

    for wrong in ({"seconds": 0}, {"seconds": "1"}):
        with pytest.raises(ValueError) as refused:
            calibrate(**wrong)
        assert "seconds" in str(refused.value)
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="figure='netwerk': did you mean 'network'"):
        calibrate(netwerk=1e9)
    hw = calibrate(save=False, seconds=0.01, network=1e9)
    assert hw.measured and not home.exists()
    assert lab.plan("sft", "tiny", hardware=hw, gpus=2).ledger.total(quantity="seconds") > 0


def test_a_gpu_takes_its_links_and_price_from_the_catalogue(monkeypatch):
    """What can be tested of the GPU's side without one."""
    import torch

    from rlhf_lab.metering import calibrate

    fake = {
        "get_device_name": lambda: "NVIDIA H100 80GB HBM3",
        "device_count": lambda: 4,
        "get_device_properties": lambda _: SimpleNamespace(total_memory=9),
        "get_device_capability": lambda: (7, 5),
    }
    for name, answer in fake.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    made = calibrate._description(torch.device("cuda"), taken=0.0)
    assert (made["kind"], made["memory"], made["devices_per_node"]) == ("gpu", 9, 4)
    assert (made["link"], made["price"]) == (450e9, CATALOGUE["h100"].price)
    assert calibrate._dtypes(torch.device("cuda")) == ["fp32", "fp16"]
