"""The catalogue of devices against facts worked out by hand: chips, memories, published rates.

pytest tests/cost/test_catalogue.py
"""

import re

import pytest

from rlhf_lab.cost import hardware as hardware_module
from rlhf_lab.cost.device import KINDS
from rlhf_lab.cost.hardware import CATALOGUE, hardware
from rlhf_lab.stages import read_table

GIB = 2**30
GPUS = [name for name, hw in CATALOGUE.items() if hw.kind == "gpu"]


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
    "gh200": (528, 512, 1.83e9),
    "a10": (288, 128, 1.695e9),
    "rtx3060": (112, 64, 1.777e9),
    "rtx3090": (328, 64, 1.695e9),
    "rtx4060ti": (136, 64, 2.535e9),
    "rtx4070": (184, 64, 2.475e9),
    "rtx4080": (304, 64, 2.505e9),
    "rtx5070ti": (280, 64, 2.452e9),
    "rtx5080": (336, 64, 2.617e9),
    "rtx5090": (680, 64, 2.407e9),
    "rtx6000-ada": (568, 128, 2.505e9),
    "l40": (568, 64, 2.49e9),
    "l40s": (568, 128, 2.49e9),
    "rtxpro6000": (752, 128, 2.617e9),
    "mi250x": (440, 128, 1.7e9),  # one die
    "mi300x": (1216, 256, 2.1e9),
    "mi325x": (1216, 256, 2.1e9),
    "mi355x": (1024, 512, 2.4e9),
    "tpu-v5e": (4, 128 * 128, 1.5e9),
    "tpu-v5p": (8, 128 * 128, 1.75e9),
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
    "a10": (384, 12.5e9),
    "p100": (4096, 1.43e9),
    "rtx3060": (192, 15e9),
    "rtx3090": (384, 19.5e9),
    "rtx4060ti": (128, 18e9),
    "rtx4070": (192, 21e9),
    "rtx4080": (256, 22.4e9),
    "rtx5070ti": (256, 28e9),
    "rtx5080": (256, 30e9),
    "rtx5090": (512, 28e9),
    "rtx6000-ada": (384, 20e9),
    "l40": (384, 18e9),
    "l40s": (384, 18e9),
    "rtxpro6000": (512, 28e9),
    "mi250x": (4096, 3.2e9),
    "mi300x": (8192, 5.2e9),
    "m1": (128, 4.266e9),
    "m4": (128, 7.5e9),
}


@pytest.mark.parametrize("name", CHIPS)
def test_16_bit_peaks_are_the_chips_and_dense(name):
    tensor_cores, multiply_adds, clock = CHIPS[name]
    peak = tensor_cores * multiply_adds * 2 * clock
    half = CATALOGUE[name].flops
    assert half.get("fp16", half.get("bf16")) == pytest.approx(peak, rel=0.01)
    if name not in ("t4", "v100"):
        assert CATALOGUE[name].flops["bf16"] == pytest.approx(peak, rel=0.01)


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
    with pytest.raises(ValueError, match="choose from fp32, fp16"):
        CATALOGUE[name].matmul_rate("bf16")


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_entry_names_its_source(name):
    hw = CATALOGUE[name]
    assert hw.source and not hw.measured
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", hw.date)
    assert (hw.price is None) == (hw.price_date is None) == (hw.price_source is None)
    if hw.price_date:
        assert re.fullmatch(r"20\d\d(-\d\d){0,2}", hw.price_date)
        assert 0 <= hw.price < 20


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
    "p100": 16,
    "a10": 24,
    "rtx3060": 12,
    "rtx3090": 24,
    "rtx4060ti": 16,
    "rtx4070": 12,
    "rtx4080": 16,
    "rtx5070ti": 16,
    "rtx5080": 16,
    "rtx5090": 32,
    "rtx6000-ada": 48,
    "l40": 48,
    "l40s": 48,
    "rtxpro6000": 96,
    "gh200": 96,
    "h20": 96,
    "b300": 288,
    "gb200": 186,
    "gb300": 288,
    "mi250x": 64,
    "mi300x": 192,
    "mi325x": 256,
    "mi355x": 288,
}


@pytest.mark.parametrize("name", GPUS)
def test_memory_is_a_little_less_than_on_the_box(name):
    assert 0.9 * NOMINAL[name] <= CATALOGUE[name].memory / GIB < NOMINAL[name]


def test_cpus_are_slow_in_16_bits_and_no_rate_exceeds_the_peak():
    for hw in CATALOGUE.values():
        assert hw.kind != "cpu" or hw.flops["bf16"] < hw.flops["fp32"] / 20
        for dtype, peak in hw.flops.items():
            sizes = [10.0**k for k in range(6, 16)]
            rates = [hw.matmul_rate(dtype, flops) for flops in sizes]
            assert 0 < rates[0] and rates[-1] == pytest.approx(hw.matmul_rate(dtype))
            assert rates[-1] <= peak and rates == sorted(rates)  # larger ones are no slower
    assert (hardware("binder").memory, hardware("binder").price) == (2 * GIB, 0)


@pytest.mark.parametrize("name", CATALOGUE)
def test_figures_are_in_order(name):
    """More bits are never faster; nothing is off by a power of ten or a unit."""
    hw = CATALOGUE[name]
    peaks = [hw.flops[d] for d in ("fp32", "tf32", "bf16") if d in hw.flops]
    assert hw.kind == "cpu" or peaks == sorted(peaks)
    assert hw.flops.get("bf16", 0) in (0, hw.flops.get("fp16", hw.flops.get("bf16")))
    assert GIB <= hw.memory <= 512 * GIB
    assert 10e9 <= hw.bandwidth <= 8e12
    if hw.kind == "gpu":  # a chip reads its memory in 6 to 100 ms
        assert 0.006 < hw.memory / hw.bandwidth < 0.1
        peak = max(rate for dtype, rate in hw.flops.items() if dtype != "fp8")
        assert 20 < peak / hw.bandwidth < 500  # FLOPs a byte
    if "fp8" in hw.flops:  # tensor cores do twice as much with half of the bits
        assert hw.flops["fp8"] == pytest.approx(2 * hw.flops["bf16"], rel=2e-3)
    assert 1e10 <= hw.host < hw.bandwidth or hw.kind == "cpu"
    for speed in (hw.link, hw.network):
        assert speed is None or 1e9 < speed <= hw.bandwidth
    assert hw.network is None or hw.link is None or hw.network <= hw.link


def test_every_name_means_one_device():
    """Names and aliases, as torch and people write them, with every size of memory."""
    meant: dict[str, str] = {}
    entries = read_table(hardware_module.__file__, "devices.json")
    for key, entry in entries.items():
        for name in (key, *entry["aliases"]):
            for size in ("", *entry.get("unified_gb", ())):
                squashed = hardware_module._squash(f"{name}{size}")
                assert squashed and meant.setdefault(squashed, key) == key
                assert hardware(f"{name} {size}GB" if size else name).kind == CATALOGUE[key].kind
    assert len(meant) > 100


# Attention as it was published: TFLOP/s forward and backward (of causal, half the square counted).
ATTENTION = {
    ("a100-80", False): (150.13, 133.44, 312),
    ("a100-80", True): (74.79, 87.91, 312),
    ("rtx4090", False): (151.19, 99.23, 165.2),
    ("rtxpro6000", False): (331.3, 269.66, 503.8),
    ("rtxpro6000", True): (2 * 64.04, 2 * 55.87, 503.8),  # half the square counted there
    ("a6000", False): (57.2, 52.4, 154.8),
}


@pytest.mark.parametrize("name, masked", ATTENTION)
def test_attention_is_as_fast_as_published(name, masked):
    forward, backward, peak = ATTENTION[name, masked]
    whole = 3.5 / (1 / forward + 2.5 / backward)  # the backward pass has 2.5 times the FLOPs
    counted = whole * (1 if masked else 2)  # a plan counts the whole square
    rate = CATALOGUE[name].rates("bf16")[2 if masked else 1]
    assert rate == pytest.approx(counted * 1e12, rel=0.03)
    assert CATALOGUE[name].flops["bf16"] == peak * 1e12


def test_attention_without_a_published_rate_is_a_product():
    hw = CATALOGUE["l4"]
    assert hw.rates("bf16") == (*[hw.matmul_rate("bf16")] * 3, 0)
    a100 = hardware("a100")
    assert a100.rates("fp32") == (*[a100.matmul_rate("fp32")] * 3, 0)  # measured in 16 bits
    h100 = hardware("h100", masked_attention=None)
    assert h100.rates("bf16")[2] == 989e12 * 0.6  # no faster than without a mask


def test_small_products_of_an_a100_are_as_slow_as_published():
    """cuBLAS in Triton's tutorial 03, in fp16; its fastest is 224 TFLOP/s, a large one's."""
    printed = {512: 26.2, 768: 63.2, 1024: 110.4, 1280: 157.5, 1536: 176.9, 2048: 223.7}
    for side, rate in printed.items():
        large = hardware("a100").matmul_rate("fp16")
        share = hardware("a100").matmul_rate("fp16", 2 * side**3) / large
        assert share == pytest.approx(rate / 223.7, abs=0.01)


@pytest.mark.parametrize(
    "name, gib",
    [
        ("m1 16gb", 11453.25e6 / 2**30),  # as llama.cpp logs it
        ("m3-pro", 12),
        ("m3 max", 27),
        ("m3 max 64GB", 48),
        ("Apple M2 Ultra 192GB", 144),
    ],
)
def test_apple_shares_its_memory(name, gib):
    """recommendedMaxWorkingSetSize: two thirds, from 36 GB on three quarters."""
    hw = hardware(name)
    assert hw.kind == "apple" and hw.memory / GIB == pytest.approx(gib, rel=0.05)
    assert ("taken with" in hw.note) == (name in ("m3-pro", "m3 max"))


def test_what_is_not_modelled_is_said():
    assert {kind: bool(text) for kind, text in KINDS.items()} == {
        "gpu": False,
        "cpu": False,
        "tpu": True,
        "apple": True,
    }
    assert hardware("h100").caveat == "" and "not modelled" in hardware("tpu-v5e").caveat
    assert "18 machines of 4" in hardware("gb200").caveat
    assert hardware("m3").caveat.startswith(
        "taken with 8 GB (also 16, 24: name it m3-24); on Apple"
    )
