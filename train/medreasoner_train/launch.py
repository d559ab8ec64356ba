"""Starts the processes of a run on this machine; on several, ``torchrun`` does."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from medreasoner_train.distributed import ProcessesError, ScaleOptions, launch_line

__all__ = ["launch"]

LAST_LINES = 20  # of what a failed process has said
GRACE_S = 10.0  # for a process to end when it is told to


def launch(options: ScaleOptions, arguments: Sequence[str]) -> int:
    """Run ``medreasoner-cli`` with these arguments in each process to the end; returns the exit code.

    The first process has this one's output; what another says is shown if it is the first to fail. When one fails the
    others are ended, as they are when this one is interrupted or told to end.

    Raises
    ------
    ProcessesError
        If the settings ask for several machines (the message is what to type on each), or a process was killed.
    """
    if options.nodes > 1:
        raise ProcessesError(
            f"[scale] asks for {options.nodes} machines; type on each: {launch_line(options, arguments[-1])}"
        )
    with tempfile.TemporaryDirectory(prefix="medreasoner-run-") as folder, _ended_with_us():
        said = [Path(folder) / f"{index}.txt" for index in range(options.processes)]
        port = _free_port()
        running: list[subprocess.Popen[bytes]] = []
        try:
            for index in range(options.processes):
                running.append(_start(index, options.processes, port, arguments, said[index]))
            failed = _wait(running)
        finally:
            _end(running)
        if failed is None:
            return 0
        if failed:  # the first has said it itself
            lines = said[failed].read_text(encoding="utf-8", errors="replace").splitlines()
            told = [f"process {failed + 1} of {options.processes}:", *lines[-LAST_LINES:]]
            sys.stderr.write("\n".join(told) + "\n")
        code = running[failed].returncode
        if code < 0:
            raise ProcessesError(f"process {failed + 1} of {options.processes} was ended by signal {-code}")
        return code


def _start(index: int, count: int, port: int, arguments: Sequence[str], said: Path) -> "subprocess.Popen[bytes]":
    environment = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)),
        **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
        **os.environ,
        "RANK": str(index),
        "LOCAL_RANK": str(index),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with said.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "medreasoner_cli", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stderr=file if index else None,
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(running: Sequence["subprocess.Popen[bytes]"]) -> int | None:
    """Number of the first process that fails, None if all come to a good end."""
    while True:
        codes = [each.poll() for each in running]
        for index, code in enumerate(codes):
            if code:
                return index
        if all(code is not None for code in codes):
            return None
        time.sleep(0.1)


def _end(running: Sequence["subprocess.Popen[bytes]"]) -> None:
    for each in running:
        each.terminate()
    deadline = time.monotonic() + GRACE_S
    for each in running:
        try:
            each.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            each.kill()
            each.wait()


@contextmanager
def _ended_with_us() -> Iterator[None]:
    """SIGTERM leads through what must be done at the end, as Ctrl-C does."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
