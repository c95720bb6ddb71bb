"""Watches that all ranks of the pipeline are alive, and agrees on the first cause when one is not.

The data groups never time out; a rank that waits on them learns of a death only if the connection breaks. So each
process has a thread that beats twice a second on a key-value store, and looks there for what others said. The first
that has something to say is the first cause, for everyone; what comes after it are echoes.

A rank ends when the first cause is known: by itself, if its main thread gets an error from the transport, else by
this thread, after a moment of grace. It also ends when the process that launched it is gone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from lightning_cpipe.transport.last_words import LastWords, read_last_words

log = logging.getLogger(__name__)

BEAT_S = 0.5
"""Seconds between two looks."""

GRACE_S = 5.0
"""Seconds that a process has to end by itself once the first cause is known."""


@dataclass(frozen=True)
class FirstCause:
    """Why the pipeline ended.

    Attributes:
        stage: of the rank that failed first.
        rank: its global rank.
        story: what it was doing, and the error.
    """

    stage: int
    rank: int
    story: str

    def __str__(self) -> str:
        return f"the pipeline ended because stage {self.stage} (rank {self.rank}) failed: {self.story}"


class Watch:
    """One process's share in watching the pipeline.

    Args:
        rank: this process's global rank.
        stages: the stage of each rank.
        timeout_s: seconds of silence after which a rank counts as dead.
        words: this rank's last words.
    """

    def __init__(self, rank: int, stages: list[int], timeout_s: float, words: LastWords) -> None:
        self._rank = rank
        self._stages = stages
        self._timeout_s = timeout_s
        self._words = words
        self._parent = os.getppid()
        self._stop = threading.Event()
        self._cause: FirstCause | None = None
        self._heard: dict[int, tuple[str, float]] = {}
        self._paths: dict[int, str] = {}
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection of its own: the main thread may hold the other one, waiting.
        client = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=timeout_s))
        self._store = dist.PrefixStore("lightning_cpipe", client)
        self._store.set(self._key("words"), json.dumps([socket.gethostname(), str(words.path)]))
        self._thread = threading.Thread(target=self._run, name="lightning_cpipe-watch", daemon=True)

    def start(self, generation: str) -> None:
        """Begin to watch. All ranks are there by now.

        Args:
            generation: tells this run from earlier ones on the same store.
        """
        self._generation = generation
        host = socket.gethostname()
        for rank in range(len(self._stages)):
            their_host, path = json.loads(self._store.get(self._key("words", rank)))
            if their_host == host:
                self._paths[rank] = path
        self._thread.start()

    def stop(self) -> None:
        """End well: from here on, silence of others means nothing."""
        self._stop.set()
        self._thread.join()
        self._words.forget()

    def report(self, story: str) -> FirstCause:
        """Say that this rank failed.

        Returns:
            The first cause, which is this one unless another rank was first.
        """
        return self._agree(FirstCause(self._stages[self._rank], self._rank, story))

    def explain(self, error: BaseException) -> FirstCause:
        """What was behind an error of the transport: waits a moment for whoever failed first to say so."""
        deadline = time.monotonic() + 4 * BEAT_S
        while time.monotonic() < deadline and self._cause is None:
            self._look()
            self._stop.wait(0.05)
        return self._cause or self.report(f"{type(error).__name__}: {error}")

    def _run(self) -> None:
        while not self._stop.wait(BEAT_S):
            self._look()
            if self._cause is not None:
                self._end()
                return

    def _look(self) -> None:
        if self._cause is not None:
            return
        if os.getppid() != self._parent:
            self._cause = FirstCause(self._stages[self._rank], self._rank, "the process that launched it is gone")
            return
        try:
            self._store.set(self._key("beat"), repr(time.time()))
            if self._store.check([self._key("cause", None)]):
                self._cause = FirstCause(**json.loads(self._store.get(self._key("cause", None))))
                return
            self._listen()
        except dist.DistError:
            if not self._stop.is_set():
                # The store lives in the process of rank 0, or in torchrun's agent, which ends after its workers.
                self._cause = self._gone(0)

    def _listen(self) -> None:
        now = time.monotonic()
        for rank in range(len(self._stages)):
            key = self._key("beat", rank)
            beat = self._store.get(key).decode() if self._store.check([key]) else ""
            last, since = self._heard.get(rank, ("", now))
            self._heard[rank] = (beat, now if beat != last else since)
            if now - self._heard[rank][1] > self._timeout_s:
                self._agree(self._gone(rank, f"it was silent for {self._timeout_s:g} s"))
                return

    def _gone(self, rank: int, how: str = "its process is gone (killed?)") -> FirstCause:
        words = read_last_words(self._paths.get(rank))
        return FirstCause(self._stages[rank], rank, f"{how}; {words}" if words else how)

    def lost(self, rank: int) -> FirstCause:
        """Say that the connection to `rank` broke."""
        return self._agree(self._gone(rank))

    def _agree(self, cause: FirstCause) -> FirstCause:
        """The first one said counts."""
        try:
            agreed = self._store.compare_set(self._key("cause", None), "", json.dumps(asdict(cause)))
            self._cause = FirstCause(**json.loads(agreed))
        except dist.DistError:
            self._cause = cause if cause.rank == self._rank else self._gone(0)
        return self._cause

    def _end(self) -> None:
        """Wait for the main thread to end the process; end it if it does not."""
        if self._stop.wait(GRACE_S):
            return
        self._words.replace(str(self._cause))
        with contextlib.suppress(OSError):
            print(f"lightning_cpipe: {self._cause}", file=sys.stderr, flush=True)
        os._exit(1)

    def _key(self, what: str, rank: int | None = -1) -> str:
        rank = self._rank if rank == -1 else rank
        return f"{what}" if rank is None else f"{what}/{rank}"


Describe = Callable[[], str]
