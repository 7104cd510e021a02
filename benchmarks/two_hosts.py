"""PPO on two hosts: is it the run of one host, and what happens when a host is lost?

    sudo python benchmarks/two_hosts.py          # needs root: network namespaces

Each namespace has its own interfaces and loopback, and reaches the other over a pair of virtual
Ethernet devices alone; both see one disk, as hosts of a cluster do. In each `rlhf-lab train ppo
--nodes 2 --machine-rank N` starts one process of two.

    complete    both hosts to the end, against the same two processes on one host: curves, weights
    killed      all processes of the second host get SIGKILL: how the first one ends, what it says
    unplugged   the link goes down; both hosts' ends, within `ddp_timeout`
    resumed     each of the two last runs, with --resume: curves and weights of the complete one

Writes benchmarks/results/two_hosts.json.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from resume import rows

from rlhf_lab.runs.run import Run

RESULTS = Path(__file__).parent / "results" / "two_hosts.json"
HOSTS = ("rlhf-lab-0", "rlhf-lab-1")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29617
TIMEOUT = 90  # seconds: `ddp_timeout`, after which a collective gives up
STEPS, SAVED, LOST_AFTER = 8, 2, 4  # iterations; between checkpoints; when a host is lost
SETTINGS = {
    "per_device_train_batch_size": 8,
    "response_length": 12,
    "num_ppo_epochs": 1,
    "save_steps": SAVED,
    "ddp_timeout": TIMEOUT,
}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def why_not() -> str | None:
    """What is missing here; None where all is there."""
    if os.geteuid() or shutil.which("ip") is None:
        return "network namespaces need root and iproute2 (`ip`)"
    tried = subprocess.run(["ip", "netns", "add", "rlhf-lab-try"], capture_output=True, text=True)
    if tried.returncode:
        return f"no network namespaces here: {tried.stderr.strip()}"
    ip("netns", "delete", "rlhf-lab-try")
    return None


@contextmanager
def two_hosts() -> Iterator[None]:
    """Two namespaces and a link, taken away at the end."""
    try:
        for host in HOSTS:
            ip("netns", "add", host)
        one, two = HOSTS
        ip("link", "add", "up0", "netns", one, "type", "veth", "peer", "name", "up0", "netns", two)
        for host, address in zip(HOSTS, ADDRESSES, strict=True):
            ip("-n", host, "addr", "add", f"{address}/24", "dev", "up0")
            for device in ("lo", "up0"):
                ip("-n", host, "link", "set", device, "up")
        yield
    finally:
        for host in HOSTS:
            for pid in processes(host):
                os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", host], check=False)


def processes(host: str) -> list[int]:
    listed = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def line(data: Path, out: Path, *more: str) -> list[str]:
    """The command of every host."""
    settings = [x for name, value in SETTINGS.items() for x in ("--set", f"{name}={value}")]
    how = ["--accelerate", "cpu", "--processes", "2", "--steps", str(STEPS), "--quiet"]
    where = ["--model", "mini", "--data", str(data), "--out", str(out)]
    return [sys.executable, "-m", "rlhf_lab.cli", "train", "ppo", *where, *how, *settings, *more]


class Training:
    """One run on both hosts, under way."""

    def __init__(self, data: Path, out: Path, *more: str) -> None:
        env = {**os.environ, "GLOO_SOCKET_IFNAME": "up0", "OMP_NUM_THREADS": "1"}
        self.out, self.logs = out, [out.with_suffix(f".{n}.txt") for n in range(len(HOSTS))]
        self.hosts = []
        for number, (host, log) in enumerate(zip(HOSTS, self.logs, strict=True)):
            placed = ["--nodes", "2", "--machine-rank", str(number)]
            placed += ["--main-address", f"{ADDRESSES[0]}:{PORT}"]
            command = ["ip", "netns", "exec", host, *line(data, out, *placed, *more)]
            with log.open("w") as file:
                self.hosts.append(
                    subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)
                )

    def until(self, step: int) -> None:
        """Wait until so many iterations are logged. Raises RuntimeError where it ends before."""
        while True:
            run = Run.load(self.out) if (self.out / "run.json").is_file() else None
            if run is not None and run.last_step >= step:
                return
            if any(host.poll() is not None for host in self.hosts):
                raise RuntimeError("\n".join(log.read_text() for log in self.logs))
            time.sleep(0.2)

    def ends(self, which: tuple[int, ...] = (0, 1)) -> dict:
        """Seconds from now until these hosts' commands end, exit codes and last messages."""
        began, found = time.monotonic(), {}
        for number in which:
            code = self.hosts[number].wait(timeout=10 * TIMEOUT)
            said = [x for x in self.logs[number].read_text().splitlines() if "rlhf-lab: " in x]
            found[f"host {number}"] = {
                "seconds": round(time.monotonic() - began, 1),
                "exit code": code,
                "says": said[-1] if said else "",
            }
        return found


def compared(one: Path, other: Path) -> dict:
    """How far two finished runs are apart: in what they logged, and in the weights."""
    from safetensors.torch import load_file

    curves = [Run.load(path).metrics for path in (one, other)]
    timed = ("seconds", "per_second", "eta", "time", "memory")
    apart = max(
        (
            abs(a[name] - b[name])
            for a, b in zip(*curves, strict=True)
            for name in a.keys() & b.keys()
            if isinstance(a[name], float) and not any(word in name for word in timed)
        ),
        default=0.0,
    )
    mine, theirs = (load_file(path / "model" / "model.safetensors") for path in (one, other))
    weights = max(float((w - theirs[name]).abs().max()) for name, w in mine.items())
    return {"iterations": len(curves[0]), "curves": apart, "weights": weights}


def lost(data: Path, whole: Path, out: Path, how: str) -> dict:
    """Lose the second host after some iterations, then resume."""
    training = Training(data, out)
    training.until(LOST_AFTER)
    if how == "killed":
        for pid in processes(HOSTS[1]):
            os.kill(pid, signal.SIGKILL)
        found = training.ends((0,))
    else:
        ip("-n", HOSTS[1], "link", "set", "up0", "down")
        found = training.ends()
        ip("-n", HOSTS[1], "link", "set", "up0", "up")
    found["checkpoints"] = [path.name for path in Run.load(out).checkpoints]
    again = Training(data, out, "--resume")
    found["resumed"] = again.ends() | compared(whole, out)
    return found


def main() -> int:
    if why := why_not():
        print(f"not run: {why}")
        return 0
    found: dict[str, object] = {"steps": STEPS, "settings": SETTINGS, "timeout, s": TIMEOUT}
    with tempfile.TemporaryDirectory() as name, two_hosts():
        folder = Path(name)
        data, one, whole = rows(folder), folder / "one", folder / "two"
        subprocess.run(line(data, one), check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        found["complete"] = Training(data, whole).ends() | compared(one, whole)
        print("complete", found["complete"], flush=True)
        for how in ("killed", "unplugged"):
            found[how] = lost(data, whole, folder / how, how)
            print(how, found[how], flush=True)
    found["versions"] = {p: version(p) for p in ("torch", "transformers", "accelerate")}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
