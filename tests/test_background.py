"""Training in a thread: stopped where it is, its run kept; errors reach who waits."""

from __future__ import annotations

import signal
import threading
import time

import pytest

import rlhf_lab as lab
from rlhf_lab.widgets.background import Stop, Training, check_idle

pytestmark = pytest.mark.usefixtures("few_stories")


def until(what, seconds=30.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_an_armed_loop_is_interrupted_where_it_is():
    stop, seen, inside = Stop(), [], threading.Event()

    def loop():
        try:
            with stop.armed():
                inside.set()
                while True:
                    time.sleep(0.001)
        except KeyboardInterrupt:
            seen.append("interrupted")
        time.sleep(0.05)  # saving
        seen.append("saved")

    thread = threading.Thread(target=loop)
    thread.start()
    inside.wait()
    stop.request()
    stop.request()  # the second one may not hit the saving
    thread.join(5)
    assert seen == ["interrupted", "saved"] and stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_drops_is_still_a_request():
    class Finalised:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    stop, before = Stop(), signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with stop.armed():
            Finalised()
            assert stop(), "no error reached the loop, which asks after its step"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_is_not_armed_is_not_interrupted():
    stop, seen = Stop(), []
    thread = threading.Thread(target=lambda: (time.sleep(0.1), seen.append("saved")))
    thread.start()
    stop.request()
    thread.join(5)
    assert seen == ["saved"]
    with pytest.raises(KeyboardInterrupt), stop.armed():
        raise AssertionError("a loop that begins after the stop must not run")


def test_it_also_stops_when_the_caller_requests_it():
    requests = []
    stop = Stop(lambda: bool(requests))
    assert not stop()
    requests.append(1)
    assert stop()


def test_who_waits_gets_the_run_or_the_error():
    assert Training(lambda **_: "a run", Stop()).wait(5) == "a run"

    def fails(**_):
        raise ValueError("why it failed")

    training = Training(fails, Stop())
    with pytest.raises(ValueError, match="why it failed"):
        training.wait(5)
    assert repr(training) == "Training(failed)"


@pytest.fixture
def interruptible():
    """Ctrl-C as Python has it by itself: a shell starts what is in the background without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_while_waiting_stops_the_training(interruptible):
    """What Ctrl-C and the notebook's stop button do to the cell that waits."""

    def work(should_stop, **_):
        with pytest.raises(KeyboardInterrupt), should_stop.armed():
            main = threading.main_thread().ident
            threading.Timer(0.1, signal.pthread_kill, [main, signal.SIGINT]).start()
            while True:
                time.sleep(0.001)
        return "stopped"

    assert Training(work, Stop()).wait() == "stopped"


def test_one_training_at_a_time():
    door = threading.Event()
    training = Training(lambda **_: door.wait(10), Stop())
    with pytest.raises(TimeoutError):
        training.wait(0.01)
    with pytest.raises(RuntimeError, match="still training in the background"):
        check_idle()
    with pytest.raises(RuntimeError, match="still training in the background"):
        lab.train("sft")
    door.set()
    training.wait(5)
    check_idle()


@pytest.mark.parametrize("stage", ["ppo", "sft"])
def test_a_stopped_run_is_complete_and_loads(stage, tmp_path):
    plan = lab.plan(
        stage, "tiny", per_device_train_batch_size=8, logging_steps=1, max_steps=500, seed=3
    )
    out = tmp_path / "run"
    training = lab.train(plan, out=out, quiet=True, background=True)
    until(lambda: (out / "metrics.jsonl").exists() and lab.Run.load(out).last_step >= 2, 120)
    run = training.stop()
    assert run.status == "stopped" and 2 <= run.last_step < 500
    assert lab.Run.load(out).series("kl" if stage == "ppo" else "loss")[0][-1] == run.last_step
    assert run.ledger.filter(source="measured", quantity="seconds")
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(run.model_path)
    assert "gold_reward" not in run.summary and "before/gold_reward" in run.summary


def test_bad_input_is_said_at_once_and_starts_nothing(tmp_path):
    with pytest.raises(ValueError, match="response_lenth"):
        lab.train(lab.plan("ppo", "tiny", response_lenth=3), out=tmp_path / "x", background=True)
    check_idle()
    assert not (tmp_path / "x").exists()
