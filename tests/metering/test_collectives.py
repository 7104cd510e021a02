"""What a process sends, as torch's dispatcher runs it.

pytest tests/metering/test_collectives.py

One process alone here: what collectives are called with does not depend on how many there are. Two
are in tests/launch/test_launch.py and tests/ppo/test_distributed.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from rlhf_lab.metering.collectives import listen, ring_bytes
from rlhf_lab.metering.meter import Meter


@pytest.fixture(scope="module", autouse=True)
def alone():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.fixture
def heard():
    calls: list[tuple[str, int, int]] = []
    stop = listen(lambda *call: calls.append(call))
    yield calls
    stop()


def test_kinds_and_bytes_of_what_is_called_from_python(heard):
    four = torch.arange(4.0)
    dist.all_reduce(four)
    dist.all_gather([torch.empty(4)], four)
    dist.all_gather_single(torch.empty(4), four)
    dist.broadcast(four.half(), 0)
    dist.barrier()
    with torch.inference_mode():
        dist.all_reduce(torch.ones(3, dtype=torch.int64))
    sizes = [("all_reduce", 16), ("all_gather", 16), ("all_gather", 16), ("broadcast", 8)]
    assert heard == [(*call, 1) for call in (*sizes, ("all_reduce", 24))]
    assert four.tolist() == [0, 1, 2, 3]


def test_gradients_that_ddp_sums_in_its_own_code(heard):
    """Its reducer is C++ and calls no function of Python's: buckets come by all the same."""
    model = nn.parallel.DistributedDataParallel(nn.Linear(300, 500))
    heard.clear()  # it has compared and sent weights to begin with
    with model.no_sync():
        model(torch.ones(2, 300)).sum().backward()
    assert heard == []
    model(torch.ones(2, 300)).sum().backward()
    assert {kind for kind, *_ in heard} == {"all_reduce"}
    assert sum(size for _, size, _ in heard) == 4 * (300 * 500 + 500)


def test_what_compiled_and_sharded_code_calls(heard):
    """Functional collectives, which DTensor's are."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    tensor = distribute_tensor(torch.ones(6, 4), mesh, [Shard(0)])
    heard.clear()
    torch.distributed._functional_collectives.all_reduce(torch.ones(5), "sum", mesh).sum()
    assert heard == [("all_reduce", 20, 1)]
    assert tensor.full_tensor().sum() == 24


def test_nobody_is_told_after_the_end():
    calls: list[object] = []
    listen(lambda *call: calls.append(call))()
    dist.all_reduce(torch.ones(1))
    assert calls == []


def test_what_a_ring_passes_on():
    """2·(n − 1) pieces of 1/n each to add up, n − 1 to gather."""
    assert ring_bytes("all_reduce", 800, 4) == 2 * 3 * 200
    assert ring_bytes("reduce_scatter", 800, 4) == ring_bytes("all_gather", 800, 4) == 3 * 200
    assert ring_bytes("all_reduce", 800, 1) == 0


def test_the_meter_counts_by_phase_and_goes_on_from_there():
    meter = Meter("sft", flops=False, memory=False)
    with meter.phase("forward", "policy"):
        meter._count_sent("all_gather", 100, 2)
    with meter.phase("backward", "policy"):
        meter._count_sent("all_reduce", 100, 2)
        with meter.phase("reference", "reference"):
            meter._count_sent("all_gather", 10, 2)
    meter._count_sent("all_gather", 1000, 2)  # between phases: logging, checkpoints
    by_phase = {row.phase: row.value for row in meter.ledger().filter(quantity="sent")}
    assert by_phase == {"forward": 50, "backward": 100, "reference": 5}
    again = Meter("sft")
    again.load_state_dict(meter.state_dict())
    assert again.sent == meter.sent
    old = {name: table for name, table in meter.state_dict().items() if name != "sent"}
    again.load_state_dict(old)
    assert again.sent == {}


def test_alone_a_meter_listens_to_nothing():
    meter = Meter("sft", flops=False, memory=False)
    with meter.phase("forward", "policy"):
        dist.all_reduce(torch.ones(1000))
    assert meter._stop_listening is None
    assert not meter.ledger().filter(quantity="sent")
