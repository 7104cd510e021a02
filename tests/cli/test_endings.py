"""How the command line ends where nobody typed anything wrong: a traceback that was asked for, a
reader who left, a process that lost another.

pytest tests/cli/test_endings.py
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from rlhf_lab.cli.main import main
from rlhf_lab.pipeline import usable, why_unusable


def test_debug_shows_the_traceback():
    command = [sys.executable, "-m", "rlhf_lab.cli", "train", "sft", "--model", "x", "--debug"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "Traceback" in done.stderr


def test_a_reader_who_has_seen_enough_is_no_error():
    """`rlhf-lab plan … | head -1`: the pipe closes while the plan is still being printed."""
    command = [sys.executable, "-m", "rlhf_lab.cli", "list", "models"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # nobody reads: the first flush finds the pipe broken
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (
            "[/x/gloo/transport/tcp/pair.cc:537] Read error [10.0.0.2]:99: "
            "Connection reset by peer. This is typically caused by a remote worker hanging. GLHF!",
            "Read error [10.0.0.2]:99: Connection reset by peer; its own last line",
        ),
        (
            "[/x/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 90000ms for recv",
            "Timed out waiting 90000ms for recv; its own last line",
        ),
    ],
)
def test_a_process_that_lost_another_says_so(said, kept, monkeypatch, capsys):
    """As gloo says it, where one host of two was killed or its link went down."""

    def lost(args):
        raise RuntimeError(said)

    monkeypatch.setattr("rlhf_lab.cli.main._doctor", lost)
    assert main(["doctor"]) == 1
    assert "internal error: RuntimeError" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["doctor"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("rlhf-lab: process 1 of 2: another process is gone")
    assert kept in error and "--resume" in error and error.count("\n") == 1


@pytest.mark.parametrize(("words", "code"), [(3, 0), (2000, 2)])
def test_data_of_which_no_row_fits_end_as_an_error(words, code, tmp_path, capsys):
    """Shown all the same: the table says what is wrong with them."""
    rows = [{"prompt": f"a{i} " * words, "completion": "b"} for i in range(20)]
    (file := tmp_path / "rows.json").write_text(json.dumps(rows))
    assert main(["data", str(file)]) == code
    told = capsys.readouterr()
    assert "demonstrations" in told.out and "too long" in told.out
    line = f"rlhf-lab: {file}: no row can be used within 512 tokens (--max-length)\n"
    assert told.err == line * (code == 2)


def test_data_of_which_the_template_writes_nothing_end_with_the_reason(tmp_path, capsys):
    """Not with the length, by which no row was dropped; pairs that are alike are dropped too."""
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    pair = {"chosen": "b", "rejected": "c", "tools": [tool]}
    rows = [{"prompt": f"look at a{i}", **pair} for i in range(20)]
    (file := tmp_path / "rows.json").write_text(json.dumps(rows))
    assert main(["data", str(file)]) == 2
    reason = "the chat template leaves out tools; take it out of these rows"
    assert f"{file}: no row can be used: {reason}" in capsys.readouterr().err
    described = [
        {"set": "preferences", "train": 18, "held out": 2, "dropped: identical": 12}
        | {"dropped: too long": 8, "truncated": 3}
    ]
    assert not any(map(usable, described))
    expected = "no row can be used: identical, too long within 512 tokens (--max-length)"
    assert why_unusable(described, 512) == expected
