"""A load's figures against a server of known speed, and against what GuideLLM makes of the same.

pytest tests/deploy/test_load.py         (one test needs GuideLLM: pip install 'rlhf-lab[bench]')
"""

import json
import os
import shutil
import statistics
import sys
from pathlib import Path

import pytest
from openai_server import openai_server

import rlhf_lab as lab
from rlhf_lab.cli.main import main
from rlhf_lab.deploy.load import Answer, Level, Load, _places, read_answers

GUIDELLM = shutil.which(os.environ.get("GUIDELLM") or "guidellm", path=_places())
REPORT = json.loads((Path(__file__).parent / "guidellm_report.json").read_text())
"""Of GuideLLM 0.8.1, cut to the fields that are read: 1 and 4 requests in flight at a server of
50 ms to the first token and 10 ms between tokens, then one that answers every third with 500."""


@pytest.fixture
def no_guidellm(monkeypatch, tmp_path):
    monkeypatch.delenv("GUIDELLM", raising=False)
    monkeypatch.setattr("rlhf_lab.deploy.load._places", lambda: str(tmp_path))


@pytest.fixture
def any_guidellm(monkeypatch):
    """A program that a load which is refused before never starts."""
    monkeypatch.setenv("GUIDELLM", sys.executable)


# --------------------------------------------------------------------------------- what is figured


@pytest.mark.parametrize("place, streams", [(0, 1), (1, 4)])
def test_a_report_gives_the_times_that_guidellm_gives(place, streams):
    rows = REPORT["benchmarks"][place]["requests"]["successful"]
    level = Level(streams, read_answers(REPORT["benchmarks"][place], 8))
    for ours, theirs in (
        ("first_token", "time_to_first_token_ms"),
        ("per_token", "inter_token_latency_ms"),
    ):
        for share, pick in ((1.0, max), (0.5, statistics.median_low)):
            expected = pick(row[theirs] for row in rows) / 1000
            assert level.percentile(ours, share) == pytest.approx(expected, rel=1e-4)
    assert 0.05 <= level.percentile("first_token", 0.5) < 0.1
    assert 0.01 <= level.percentile("per_token", 0.5) < 0.02
    assert level.tokens == 80


def test_throughput_is_tokens_over_the_time_from_first_to_last():
    """Two at once, by hand: 3 tokens in 0 .. 2 s, 5 tokens in 1 .. 4 s."""
    level = Level(2, (Answer(7, 3, 0.0, 1.0, 2.0), Answer(9, 5, 1.0, 2.0, 4.0)))
    assert level.seconds == 4 and level.tokens_per_second == 2
    assert [a.per_token for a in level.answers] == [0.5, 0.5]
    assert level.percentile("latency", 0.5) == 2 and level.percentile("latency", 0.51) == 3
    found = {(r.phase, r.quantity): r.value for r in level.ledger}
    assert found["prefill", "seconds"] == 1 and found["decode", "seconds"] == 3
    assert found["prefill", "tokens"] == 16 and found["decode", "tokens"] == 8


def test_it_stands_beside_the_plan():
    plan = lab.plan("inference", "mini", per_device_train_batch_size=2, response_length=4)
    level = Level(2, (Answer(7, 3, 0.0, 1.0, 2.0), Answer(9, 5, 1.0, 2.0, 4.0)))
    beside = lab.compare(plan, Load([level], "http://x", "mini", "0.8.1"))
    (seconds,) = [r for r in beside.rows if r["phase"] == "decode" and r["quantity"] == "seconds"]
    assert seconds["measured"] == "3 s" and seconds["predicted"] != "–"


def levels_of(plan, step, request, arrival):
    """A server that takes the plan's passes, and so much for each step, request and arrival."""
    for n in (1, 4, 16):
        told = plan.estimate.serving_at(n)
        first = told.first_token + step + n * request + arrival
        end = first + 10 * (told.per_token + step + n * request)
        yield Level(n, (Answer(7, 11, 0.0, first, end),) * n)


def test_what_a_server_adds_is_found_and_planned_with():
    sizes = {"prompt_length": 7, "response_length": 11, "per_device_train_batch_size": 8}
    adds = {"step_seconds": 0.004, "request_seconds": 0.0005, "arrival_seconds": 0.03}
    plan = lab.plan("inference", "mini", **sizes)
    load = Load(list(levels_of(plan, *adds.values())), "http://x", "mini", "0.8.1")
    assert load.around(plan) == pytest.approx(adds)
    with pytest.raises(ValueError, match="two levels"):
        Load(load.levels[:1], "http://x", "mini", "0.8.1").around(plan)
    served, bare = (
        lab.plan("inference", "tiny", hardware=lab.hardware("here", **figures), **sizes)
        for figures in (adds, {})
    )
    told, without = served.estimate.serving, bare.estimate.serving
    assert told.per_token - without.per_token == pytest.approx(0.004 + 8 * 0.0005)
    assert told.first_token - without.first_token == pytest.approx(0.004 + 8 * 0.0005 + 0.03)
    longer = told.latency - without.latency
    assert longer == pytest.approx(11 * (0.004 + 8 * 0.0005) + 0.03)
    assert served.ledger.total(quantity="seconds") == pytest.approx(told.latency)


# --------------------------------------------------------------------------------- what is refused


def test_a_load_in_which_requests_failed_has_no_figures():
    with pytest.raises(ValueError, match="2 of 6 requests failed, the first: .*500") as refused:
        read_answers(REPORT["benchmarks"][2], 6)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="8 of 9 requests are in GuideLLM's report"):
        read_answers(REPORT["benchmarks"][0], 9)
    silent = json.loads(json.dumps(REPORT["benchmarks"][0]))
    silent["requests"]["successful"][3]["output_tokens"] = 0
    with pytest.raises(ValueError, match="without a token"):
        read_answers(silent, 8)


def test_a_server_that_does_not_answer_is_refused_before_the_load(any_guidellm):
    with openai_server(0, 0, token="right") as server:
        with pytest.raises(ValueError, match="answers with 401: .*wrong token"):
            lab.bench(server.url, token="wrong")
    with pytest.raises(ValueError, match="no server answers at http://127.0.0.1:9"):
        lab.bench("http://127.0.0.1:9/v1")
    with pytest.raises(ValueError, match="at least 1"):
        lab.bench("http://127.0.0.1:9", concurrency=(0,))


@pytest.mark.parametrize("address", ["notaurl", "127.0.0.1:8000", "http://", 3])
def test_an_address_is_looked_at_first(no_guidellm, address):
    with pytest.raises(ValueError, match="is no address; one is http://127.0.0.1:8000"):
        lab.bench(address)


@pytest.mark.parametrize("named", ["", "/nowhere/guidellm"])
def test_without_guidellm_it_says_what_to_install(no_guidellm, monkeypatch, capsys, named):
    monkeypatch.setenv("GUIDELLM", named)
    assert main(["bench", "http://127.0.0.1:9"]) == 2
    assert "pip install 'rlhf-lab[bench]'" in capsys.readouterr().err


def test_a_program_that_writes_no_report_is_said(any_guidellm):
    with openai_server(0, 0) as server, pytest.raises(ValueError, match="wrote no report: .*run"):
        lab.bench(server.url, concurrency=(1,))  # Python is asked for a file called "run"


# ------------------------------------------------------------------------------- the program itself


@pytest.mark.skipif(not GUIDELLM, reason="needs GuideLLM: pip install 'rlhf-lab[bench]'")
def test_guidellm_keeps_so_many_in_flight_and_each_is_counted_once(capsys):
    with openai_server(0.03, 0.01, token="right") as server:
        line = ["bench", f"{server.url}/v1", "--token", "right", "--concurrency", "1,3"]
        assert main([*line, "--requests", "6", "--max-tokens", "5"]) == 0
        assert (server.asked, server.most) == (12, 3)
    said = capsys.readouterr().out
    assert "known-speed" in said and "GuideLLM 0." in said
