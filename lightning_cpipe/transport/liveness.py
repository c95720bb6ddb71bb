"""Watches that all ranks of the pipeline are alive, and agrees on the first cause when one is not.

The data groups never time out, and a rank that waits on them learns of a death only if its own connection breaks. So
each process has a thread that beats twice a second on a key-value store, and looks there for what others said, and
whether the next rank still beats. The first that has something to say is the first cause, for everyone; what comes
after it are echoes.

A second thread asks nobody, so nothing can keep it waiting, not even a store whose process hangs. It ends a process
whose main thread does not end by itself once the first cause is known, after a moment of grace; so is one ended whose
launcher is gone. A rank of this machine that hangs is killed: its launcher would wait for it.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from lightning_cpipe.transport.first_cause import GONE, ORPHANED, SILENT, FirstCause, say
from lightning_cpipe.transport.last_words import LastWords, read_last_words
from lightning_cpipe.transport.launched import is_orphan
from lightning_cpipe.transport.machine import is_alive, this_machine

BEAT_S = 0.5
"""Seconds between two looks."""

GRACE_S = 5.0
"""Seconds that a process has to end by itself once the first cause is known."""

LINGER_S = 1.0
"""Seconds that a process which only follows another one's failure leaves that one to end first: launchers take the
process that ends first for the one that failed."""


class Watch:
    """One process's share in watching the pipeline.

    Args:
        rank: this process's global rank.
        stages: the stage of each rank; in words where it holds several.
        run: tells this run's keys from those of others on the same store.
        silence_s: seconds without a beat after which a rank counts as dead.
        words: this rank's last words.
        launcher: the process that launched this one, if this one is to end with it.
    """

    def __init__(
        self,
        rank: int,
        stages: Sequence[int | str],
        run: str,
        silence_s: float,
        words: LastWords,
        launcher: int | None = None,
    ) -> None:
        self._rank = rank
        self._stages = stages
        self._silence_s = silence_s
        self._words = words
        self._launcher = launcher
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._cause: FirstCause | None = None
        self._looks = 0
        # In a ring: whoever is silent, the nearest rank before it that is not will notice.
        self._watched = (rank + 1) % len(stages)
        self._beat = b""
        self._unchanged = 0
        self._words_of: dict[int, Path] = {}
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
        self._store.set(f"place/{rank}", json.dumps([this_machine(), os.getpid(), str(words.path)]))
        self._threads = [
            threading.Thread(target=self._ask, name="lightning_cpipe-beat", daemon=True),
            threading.Thread(target=self._watch, name="lightning_cpipe-watch", daemon=True),
        ]

    @property
    def is_spokesman(self) -> bool:
        """Whether this rank is the one to print the first cause: rank 0, or rank 1 if rank 0 can't."""
        cause = self._cause
        return cause is not None and self._rank == (1 if cause.rank == 0 and cause.is_mute else 0)

    @property
    def is_orphan(self) -> bool:
        """Whether the process that launched this one is gone."""
        return is_orphan(self._launcher)

    def start(self) -> None:
        """Begin; all ranks are there by now."""
        for rank in range(len(self._stages)):
            machine, pid, path = json.loads(self._store.get(f"place/{rank}"))
            if machine == this_machine():
                self._pids[rank] = pid
                self._words_of[rank] = Path(path)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """From here on, silence of others means nothing."""
        self._stopping.set()
        for thread in self._threads:
            if thread.is_alive():
                # A store that hangs would keep it.
                thread.join(GRACE_S)

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
            # Connections break a moment before a killed process counts as gone.
            self._stopping.wait(0.05)
            self._look()
        if lost is None:
            # All ranks met there; on other machines it can't be seen who is missing.
            lost = next((rank for rank, pid in self._pids.items() if not is_alive(pid)), self._rank)
        return self._cause or self._agree(self._gone(lost))

    def linger(self) -> None:
        """Let the rank that failed first end first."""
        time.sleep(LINGER_S)

    def _ask(self) -> None:
        """The thread that beats and listens."""
        while self._cause is None and not self._stopping.wait(BEAT_S):
            self._look(listen=True)
            self._looks += 1

    def _watch(self) -> None:
        """The thread that asks nobody."""
        looks = unanswered = 0
        while self._cause is None and not self._stopping.wait(BEAT_S):
            looks, before = self._looks, looks
            unanswered = unanswered + 1 if looks == before else 0
            if self._is_silence(unanswered) and not self._may_store_be_slow():
                self._conclude(self._silence(0))
        if self._cause is not None:
            if self._cause.tells(SILENT, self._stages[self._cause.rank]):
                self._put_down(self._cause)
            self._end()

    def _look(self, *, listen: bool = False) -> None:
        """Say that this rank lives, and see what others said, and with `listen` whether the next one lives."""
        if not is_alive(self._pids.get(0)):
            # It may hold the store; asking there would fail, and torch would complain at length.
            self._conclude(self._gone(0))
            return
        if self.is_orphan:
            self._conclude(self._orphaned())
            return
        try:
            self._store.set(f"beat/{self._rank}", repr(time.time()))
            if self._store.check(["cause"]):
                self._conclude(FirstCause(*json.loads(self._store.get("cause"))))
                return
            is_silent = listen and self._is_next_silent()
        except dist.DistError:
            if not self._stopping.is_set():
                self._conclude(self._without_store())
            return
        if is_silent:
            self._agree(self._silence(self._watched))

    def _is_next_silent(self) -> bool:
        """Whether the next rank's beat has not changed for too long."""
        key = f"beat/{self._watched}"
        beat = self._store.get(key) if self._store.check([key]) else b""
        self._unchanged = self._unchanged + 1 if beat == self._beat else 0
        self._beat = beat
        return self._is_silence(self._unchanged)

    def _is_silence(self, looks: int) -> bool:
        """Whether nothing new in that many looks is too long.

        Looks are counted, not seconds: when all processes were suspended for a while, nobody was silent.
        """
        return looks * BEAT_S > self._silence_s

    def _may_store_be_slow(self) -> bool:
        """Whether the store may hang while all ranks live: torchrun's agent holds it, and was suspended alone."""
        return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and 0 in self._pids

    def _silence(self, rank: int) -> FirstCause:
        return FirstCause.of(rank, self._stages[rank], f"{SILENT} {self._silence_s:g} s", is_mute=True)

    def _put_down(self, cause: FirstCause) -> None:
        """Kill a rank of this machine that hangs, and say why in its place."""
        if cause.rank in self._pids and cause.rank != self._rank:
            with suppress(OSError):
                self._words.replace_at(self._words_of[cause.rank], cause.text)
            with suppress(OSError):
                os.kill(self._pids[cause.rank], signal.SIGKILL)

    def _without_store(self) -> FirstCause:
        """Why there is no store: it lives in the process of rank 0, or in torchrun's agent, which launched this one."""
        return self._orphaned() if self.is_orphan else self._gone(0)

    def _orphaned(self) -> FirstCause:
        return FirstCause.of(self._rank, self._stages[self._rank], ORPHANED)

    def _gone(self, rank: int) -> FirstCause:
        words = read_last_words(self._words_of[rank]) if rank in self._words_of else None
        if words is not None:
            cause = FirstCause(rank, words)
            stage = self._stages[rank]
            return cause._replace(is_mute=cause.tells(GONE, stage) or cause.tells(SILENT, stage))
        return FirstCause.of(rank, self._stages[rank], GONE, is_mute=True)

    def _agree(self, cause: FirstCause) -> FirstCause:
        """What is said first counts."""
        if self._cause is not None:
            return self._cause
        try:
            return self._conclude(FirstCause(*json.loads(self._store.compare_set("cause", "", json.dumps(cause)))))
        except dist.DistError:
            return self._conclude(cause if cause.rank == self._rank else self._without_store())

    def _conclude(self, cause: FirstCause) -> FirstCause:
        """What this process found out first counts here. Nothing is asked while the lock is held."""
        with self._lock:
            self._cause = self._cause or cause
            return self._cause

    def _end(self) -> None:
        """The main thread may be waiting for a message that will never come."""
        if self._stopping.wait(GRACE_S) or self._cause is None:
            return
        self._words.replace(self._cause.text)
        if self.is_spokesman:
            say(self._cause)
        self.clean_up()
        if self.is_orphan or (self._cause.rank != self._rank and not self._words.is_awaited):
            self._words.forget(with_folder=self.is_orphan)
        os._exit(1)

    def clean_up(self) -> None:
        """Remove the words of the rank that failed, once they have been read: rank 0 does it, or rank 1 for rank 0."""
        if self._cause is None or self._words.is_awaited or self._rank != (1 if self._cause.rank == 0 else 0):
            return
        path = self._words_of.get(self._cause.rank)
        if path is not None:
            path.unlink(missing_ok=True)
