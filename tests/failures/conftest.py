"""Runs the script of `tests.helpers.scripts` under a launcher, and sees how it ends and what it leaves."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.helpers import scripts

ROOT = Path(__file__).parents[2]
SCRIPT = scripts.__file__

LAUNCHERS = ("popen", "spawn", "fork", "torchrun")

ENDS_WITHIN_S = 20
"""Seconds after a failure in which every process must have ended."""

LIMIT_S = 100
"""Seconds in which a run must have ended, imports included: many processes on a busy machine take their time."""


@dataclass
class Ended:
    """How a run ended.

    Attributes:
        status: of the launcher.
        seconds: from the fault until the last process was gone; from the start if there was none.
        out: what all ranks together printed.
        err: likewise, on stderr.
    """

    status: int
    seconds: float
    out: str
    err: str

    @property
    def last_words(self) -> str:
        """The last line on stderr; where that ends torchrun's report, the part about the first failure."""
        _, _, report = self.err.rstrip().split("\n\n")[-1].rpartition("Root Cause")
        return report if self.err.rstrip().endswith("=====") else self.err.rstrip().splitlines()[-1]

    @property
    def cause(self) -> str:
        """What the last words on stderr say is the first cause."""
        assert self.causes_in(self.last_words), self.err
        return self.causes_in(self.last_words)[-1]

    @property
    def causes(self) -> list[str]:
        """Every cause that was named."""
        return self.causes_in(self.err)

    @staticmethod
    def causes_in(text: str) -> list[str]:
        lines = [" ".join(line.split()) for line in text.splitlines()]
        return [line[line.index(BEGINNING) + len(BEGINNING) :] for line in lines if BEGINNING in line]


BEGINNING = "the pipeline ended because "


class Process(Protocol):
    """The launcher's process."""

    pid: int

    def wait(self) -> int:
        """Its exit status, when it has ended."""


class Forked:
    """A process that was forked from the one which waits for orders."""

    def __init__(self, home: subprocess.Popen[str], order: dict[str, Any]) -> None:
        assert home.stdin is not None
        assert home.stdout is not None
        home.stdin.write(f"{json.dumps(order)}\n")
        home.stdin.flush()
        self._answers = home.stdout
        self.pid = int(self._answers.readline())

    def wait(self) -> int:
        return int(self._answers.readline())


class Session:
    """A launcher, its ranks, and whatever these start.

    Args:
        folder: made for the session; its working directory.
        temporary: likewise; for temporary files.
        launcher: one of `LAUNCHERS`.
        devices: p.
        home: forks the launcher's process; None to start a Python for it.
        options: of `scripts.fit`.
    """

    def __init__(
        self,
        folder: Path,
        temporary: Path,
        launcher: str,
        devices: int,
        home: subprocess.Popen[str] | None,
        options: dict[str, Any],
    ) -> None:
        self.folder = folder
        self.temporary = temporary
        folder.mkdir()
        temporary.mkdir()
        os.mkfifo(folder / "told")
        self.port = free_port()
        self._began = time.monotonic()
        self._mark = f"CPIPE_TEST={uuid.uuid4().hex}"
        start_method = "popen" if launcher == "torchrun" else launcher
        arguments = [SCRIPT, json.dumps({"launcher": start_method, "devices": devices, **options})]
        environment = {"TMPDIR": str(self.temporary), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
        environment.update([self._mark.split("=")])
        if launcher == "torchrun":
            arguments = ["torchrun", f"--nproc-per-node={devices}", f"--master-port={self.port}", *arguments]
        else:
            environment.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port)})
        self._process: Process
        if home is None:
            self._process = self._start(arguments, environment)
        else:
            order = {"folder": str(folder), "environment": environment, "arguments": arguments}
            self._process = Forked(home, order)
        self._is_over = False

    def _start(self, arguments: list[str], environment: dict[str, str]) -> Process:
        if arguments[0] == "torchrun":
            arguments = ["-m", "torch.distributed.run", *arguments[1:]]
        with open(self.folder / "out", "w") as out, open(self.folder / "err", "w") as err:
            return subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def processes(self) -> list[int]:
        """The living processes: torchrun's workers have sessions of their own, but inherit the environment."""
        return [int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit() and self._owns(each)]

    def _owns(self, process: Path) -> bool:
        try:
            state, _, _, session = (process / "stat").read_text().rpartition(")")[2].split()[:4]
            if state == "Z":
                return False
            return int(session) == self._process.pid or self._mark.encode() in (process / "environ").read_bytes()
        except OSError:
            return False

    def wait_until_told(self) -> None:
        """Wait until a rank has come by its fault of the kind ``tell``."""
        reader = os.open(self.folder / "told", os.O_RDONLY | os.O_NONBLOCK)
        try:
            poll = select.poll()
            poll.register(reader, select.POLLHUP)
            assert poll.poll(LIMIT_S * 1000), "no rank came by its fault"
        finally:
            os.close(reader)

    def signal(self, number: int) -> None:
        """Send a signal to all processes."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self) -> Ended:
        """Wait until all processes are gone by themselves."""
        while pids := self.processes():
            if not _is_gone(pids[0], time.monotonic() + 1) and self._is_late:
                seconds, err = self._seconds, self._read("err")
                self.kill()
                pytest.fail(f"{seconds:.1f} s after the fault, processes {pids} still run; on stderr:\n{err}")
        seconds = self._seconds
        self._is_over = True
        return Ended(self._process.wait(), seconds, self._read("out"), self._read("err"))

    @property
    def _seconds(self) -> float:
        """Since the fault; since the start if there was none."""
        struck = self._read(scripts.STRUCK)
        return time.monotonic() - (float(struck) if struck else self._began)

    @property
    def _is_late(self) -> bool:
        return self._seconds > (2 * ENDS_WITHIN_S if self._read(scripts.STRUCK) else LIMIT_S)

    def require_nothing_left(self) -> None:
        """No port in use, no file of ours."""
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", self.port))
            listener.listen()
        left = [
            str(each)
            for folder in (self.folder, self.temporary)
            for pattern in ("lightning_cpipe_*", "*.lock")
            for each in folder.rglob(pattern)
        ]
        assert not left, f"{left} were left"

    def kill(self) -> None:
        """End what is left, however it is."""
        deadline = time.monotonic() + ENDS_WITHIN_S
        while pids := self.processes():
            self.signal(signal.SIGKILL)
            assert all(_is_gone(pid, deadline) for pid in pids), f"{pids} can't be killed"
        if not self._is_over:
            self._is_over = True
            self._process.wait()

    def _read(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""


def free_port() -> int:
    """A port that no outgoing connection of this machine gets in the meantime."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def _is_gone(pid: int, deadline: float) -> bool:
    """Wait until a process is gone, not longer than until `deadline`."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
    finally:
        os.close(handle)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of this folder have a limit of their own in each run."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(1.2 * LIMIT_S))


@pytest.fixture(scope="session")
def home() -> Iterator[subprocess.Popen[str]]:
    """A process that has imported everything."""
    with subprocess.Popen(
        [sys.executable, SCRIPT, "wait_for_orders"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.stdin.close()  # type: ignore[union-attr]


Start = Callable[..., Session]
Run = Callable[..., Ended]


@pytest.fixture
def start(tmp_path: Path, temporary: Path, home: subprocess.Popen[str]) -> Iterator[Start]:
    """Starts a session; kills what is left of it."""
    sessions: list[Session] = []

    def start(launcher: str, devices: int, *, cold: bool = False, **options: Any) -> Session:
        name = f"run_{len(sessions)}"
        folders = tmp_path / name, temporary / name
        sessions.append(Session(*folders, launcher, devices, None if cold else home, options))
        return sessions[-1]

    yield start
    for session in sessions:
        session.kill()


@pytest.fixture
def run(start: Start) -> Run:
    """Starts a session and waits for its end; requires that nothing is left."""

    def run(launcher: str, devices: int, **options: Any) -> Ended:
        session = start(launcher, devices, **options)
        ended = session.end()
        session.require_nothing_left()
        return ended

    return run
