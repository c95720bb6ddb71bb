"""Watches that all ranks of the pipeline are alive, and agrees on the first cause when one is not.

The data groups never time out, and a rank that waits on them learns of a death only if its own connection breaks. So
each process has a thread that beats twice a second on a key-value store, and looks there for what others said. The
first that has something to say is the first cause, for everyone; what comes after it are echoes.

A process whose main thread does not end by itself once the first cause is known is ended by this thread, after a
moment of grace; so is one whose launcher is gone.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from lightning_cpipe.transport.last_words import LastWords, read_last_words

BEAT_S = 0.5
"""Seconds between two looks."""

GRACE_S = 5.0
"""Seconds that a process has to end by itself once the first cause is known."""

LINGER_S = 1.0
"""Seconds that a process which only follows another one's failure leaves that one to end first: launchers take the
process that ends first for the one that failed."""


class FirstCause(NamedTuple):
    """Why the pipeline ended.

    Attributes:
        rank: that failed first.
        text: one sentence that names stage, rank, mini-batch and error.
        is_mute: whether that rank can't say it itself.
    """

    rank: int
    text: str
    is_mute: bool = False

    @classmethod
    def of(cls, rank: int, stage: int, story: str, *, is_mute: bool = False) -> FirstCause:
        """The cause in one sentence."""
        return cls(rank, f"the pipeline ended because stage {stage} (rank {rank}) failed: {story}", is_mute)


GONE = "its process is gone (killed?)"


def sentence_if_killed(rank: int, stage: int) -> str:
    """The last words of a rank that could not say any."""
    return FirstCause.of(rank, stage, f"{GONE}; it was at mini-batch {{batch}}").text


class Watch:
    """One process's share in watching the pipeline.

    Args:
        rank: this process's global rank.
        stages: the stage of each rank.
        run: tells this run's keys from those of others on the same store.
        silence_s: seconds without a beat after which a rank counts as dead.
        words: this rank's last words.
    """

    def __init__(self, rank: int, stages: list[int], run: str, silence_s: float, words: LastWords) -> None:
        self._rank = rank
        self._stages = stages
        self._silence_s = silence_s
        self._words = words
        self._parent = os.getppid()
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._cause: FirstCause | None = None
        self._beats: dict[int, tuple[bytes, float]] = {}
        self._words_of: dict[int, str] = {}
        self._pids: dict[int, int] = {}
        # A connection of its own: the main thread may hold the other one, waiting.
        self._store = dist.PrefixStore(
            f"lightning_cpipe/{run}",
            dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                timeout=timedelta(seconds=silence_s),
            ),
        )
        self._store.set(f"place/{rank}", json.dumps([_machine(), os.getpid(), str(words.path)]))
        self._thread = threading.Thread(target=self._run, name="lightning_cpipe-watch", daemon=True)

    @property
    def is_spokesman(self) -> bool:
        """Whether this rank is the one to print the first cause: rank 0, or rank 1 if rank 0 can't."""
        cause = self._cause
        return cause is not None and self._rank == (1 if cause.rank == 0 and cause.is_mute else 0)

    def start(self) -> None:
        """Begin; all ranks are there by now."""
        for rank in range(len(self._stages)):
            machine, pid, path = json.loads(self._store.get(f"place/{rank}"))
            if machine == _machine():
                self._pids[rank] = pid
                self._words_of[rank] = path
        self._thread.start()

    def stop(self) -> None:
        """From here on, silence of others means nothing."""
        self._stopping.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def report(self, story: str) -> FirstCause:
        """Say that this rank failed.

        Returns:
            The first cause, which is this one unless another rank was first.
        """
        return self._agree(FirstCause.of(self._rank, self._stages[self._rank], story))

    def explain(self, lost: int | None) -> FirstCause:
        """What was behind a broken connection: waits a moment for whoever failed first to say so.

        Args:
            lost: the rank at its other end, if that is known.
        """
        deadline = time.monotonic() + 4 * BEAT_S
        while self._cause is None and time.monotonic() < deadline:
            self._look()
            self._stopping.wait(0.02)
        if self._cause is None:
            self._agree(self._gone(self._rank if lost is None else lost))
        assert self._cause is not None
        return self._cause

    def linger(self) -> None:
        """Let the rank that failed first end first."""
        time.sleep(LINGER_S)

    def _run(self) -> None:
        while not self._stopping.wait(BEAT_S):
            self._look()
            if self._cause is not None:
                self._end()
                return

    def _look(self) -> None:
        with self._lock:
            if self._cause is not None:
                return
            if not _is_there(self._pids.get(0)):
                # It may hold the store; asking there would fail, and torch would complain at length.
                self._cause = self._gone(0)
                return
            try:
                self._store.set(f"beat/{self._rank}", repr(time.time()))
                if self._store.check(["cause"]):
                    self._cause = FirstCause(*json.loads(self._store.get("cause")))
                    return
                silent = self._silent()
            except dist.DistError:
                # The store lives in the process of rank 0, or in torchrun's agent, which ends after its workers.
                self._cause = None if self._stopping.is_set() else self._gone(0)
                return
            if os.getppid() != self._parent:
                story = "the process that launched it is gone"
                self._cause = FirstCause.of(self._rank, self._stages[self._rank], story)
                return
        if silent is not None:
            story = f"it was silent for {self._silence_s:g} s"
            self._agree(FirstCause.of(silent, self._stages[silent], story, is_mute=True))

    def _silent(self) -> int | None:
        """A rank whose beat has not changed for too long."""
        now = time.monotonic()
        for rank in range(len(self._stages)):
            beat = self._store.get(f"beat/{rank}") if self._store.check([f"beat/{rank}"]) else b""
            if self._beats.setdefault(rank, (beat, now))[0] != beat:
                self._beats[rank] = (beat, now)
            if now - self._beats[rank][1] > self._silence_s:
                return rank
        return None

    def _gone(self, rank: int) -> FirstCause:
        words = read_last_words(self._words_of[rank]) if rank in self._words_of else None
        if words is not None:
            return FirstCause(rank, words, is_mute=GONE in words)
        return FirstCause.of(rank, self._stages[rank], GONE, is_mute=True)

    def _agree(self, cause: FirstCause) -> FirstCause:
        """What is said first counts."""
        with self._lock:
            if self._cause is None:
                try:
                    self._cause = FirstCause(*json.loads(self._store.compare_set("cause", "", json.dumps(cause))))
                except dist.DistError:
                    self._cause = cause if cause.rank == self._rank else self._gone(0)
            return self._cause

    def _end(self) -> None:
        """The main thread may be waiting for a message that will never come."""
        if self._stopping.wait(GRACE_S) or self._cause is None:
            return
        self._words.replace(self._cause.text)
        if self.is_spokesman:
            say(self._cause)
        self.clean_up()
        if self._cause.rank != self._rank and not self._words.is_awaited:
            self._words.forget()
        os._exit(1)

    def clean_up(self) -> None:
        """Remove the words of the rank that failed, once they have been read: rank 0 does it, or rank 1 for rank 0."""
        if self._cause is None or self._words.is_awaited or self._rank != (1 if self._cause.rank == 0 else 0):
            return
        path = self._words_of.get(self._cause.rank)
        if path is not None:
            Path(path).unlink(missing_ok=True)


def _machine() -> list[str]:
    """What two processes share if they see each other's process ids and files."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return [socket.gethostname(), namespace]


def _is_there(pid: int | None) -> bool:
    """Whether a process of this machine lives; True if it is of another machine."""
    if pid is None:
        return True
    try:
        os.kill(pid, 0)
        # A process that is dead and not yet collected by its parent still answers to its number.
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except ProcessLookupError:
        return False
    except OSError:
        return True


def say(cause: FirstCause) -> None:
    """Print the first cause as the last thing on the screen."""
    sys.stderr.write(f"\nlightning_cpipe: {cause.text}\n")
    sys.stderr.flush()
