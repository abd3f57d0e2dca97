"""Two processes train together, are killed, and continue from a checkpoint as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

SCRIPT = Path(__file__).with_name("distributed_training.py")
PROCESSES, STEPS, EVERY, KILLED_AFTER = 2, 10, 3, 5
TIMEOUT, ATTEMPTS = 180, 3
# What a process says when another program took the port between our choice and its use.
PORT_TAKEN = ("Address already in use", "address already in use", "Failed to add port", "Failed to bind")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class PortTakenError(Exception):
    pass


@contextlib.contextmanager
def started(tmp: Path, **arguments) -> Iterator[list[subprocess.Popen]]:
    """The processes, which are killed in any case."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "NPROC": "16",
        "PJRT_NPROC": "16",
    }
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        environment.pop(name, None)  # gRPC would ask it for 127.0.0.1
    port, processes = free_port(), []
    try:
        for i in range(PROCESSES):
            given = arguments | {"port": port, "process": i, "processes": PROCESSES, "result": str(tmp / f"{i}.json")}
            with (tmp / f"{i}.out").open("w") as out, (tmp / f"{i}.err").open("w") as err:
                command = [sys.executable, str(SCRIPT), json.dumps(given)]
                processes.append(subprocess.Popen(command, env=environment, stdout=out, stderr=err))
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def wait_until(tmp: Path, processes: list[subprocess.Popen], done) -> None:
    """Waits until `done(i)` holds of each process; fails if one dies before, or after the time-out."""
    deadline = time.monotonic() + TIMEOUT
    while not all(done(i) for i in range(PROCESSES)):
        failed = [i for i, process in enumerate(processes) if process.poll() not in (None, 0)]
        if failed or time.monotonic() > deadline:
            logs = "\n".join((tmp / f"{i}.err").read_text()[-3000:] for i in range(PROCESSES))
            if any(words in logs for words in PORT_TAKEN):
                raise PortTakenError(logs)
            pytest.fail(f"processes {failed or 'all'} {'failed' if failed else 'took too long'}:\n{logs}")
        time.sleep(0.05)


def train(tmp: Path, wait_after: int | None = None, **arguments) -> list[dict] | None:
    """Trains to the end and returns what each process found; or until `wait_after`, and kills."""
    for attempt in range(ATTEMPTS):
        work = tmp / f"attempt-{attempt}-{wait_after}"
        work.mkdir(parents=True)
        try:
            with started(work, wait_after=wait_after, **arguments) as processes:
                if wait_after is None:
                    wait_until(work, processes, lambda i: processes[i].poll() == 0)
                    return [json.loads((work / f"{i}.json").read_text()) for i in range(PROCESSES)]
                wait_until(work, processes, lambda i: "waiting" in (work / f"{i}.out").read_text())  # noqa: B023
                for process in processes:
                    process.send_signal(signal.SIGKILL)
                return None
        except PortTakenError:
            if attempt + 1 == ATTEMPTS:
                raise
    return None


@pytest.mark.slow
@pytest.mark.skipif(jax.__version_info__ < (0, 5), reason="Orbax in several processes needs a newer jaxlib")
@pytest.mark.parametrize(("algorithm", "packed"), [("rigl", False), ("magnitude", True)])
def test_killed_and_resumed(tmp_path, algorithm, packed):
    common = {"algorithm": algorithm, "packed": packed, "steps": STEPS, "every": EVERY}
    whole = train(tmp_path / "whole", folder=str(tmp_path / "checkpoints-whole"), **common)

    folder = str(tmp_path / "checkpoints")
    train(tmp_path / "killed", wait_after=KILLED_AFTER, folder=folder, **common)
    resumed = train(tmp_path / "resumed", folder=folder, **common)

    assert [found.pop("started") for found in whole] == [0, 0]
    # The steps after the checkpoint were lost and are taken again.
    assert [found.pop("started") for found in resumed] == [KILLED_AFTER // EVERY * EVERY] * PROCESSES
    assert all(found["lies as asked"] and found["count"] == STEPS for found in (*whole, *resumed))
    assert all(0 < kept <= 32 * 64 // 4 for found in whole for kept in found["kept"].values())
    assert resumed == whole
