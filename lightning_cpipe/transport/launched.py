"""Who launched this process, and what to do while the ranks do not watch each other yet if that one is gone."""

from __future__ import annotations

import os
import threading

import torch.distributed as dist

from lightning_cpipe.transport.first_cause import ORPHANED, FirstCause, say

LOOK_S = 0.5
"""Seconds between two looks."""

LAUNCHER = "LIGHTNING_CPIPE_LAUNCHER"
"""The environment variable in which a launcher of this package tells the ranks its process id."""


def launcher() -> int | None:
    """The process that launched this rank; None where a rank does not end with the process that started it.

    Rank 0 of a script, for one: it goes on when the shell that it was started from is closed.
    """
    told = os.environ.get(LAUNCHER)
    if told is not None:
        return int(told)
    return os.getppid() if dist.is_torchelastic_launched() else None


def is_orphan(launcher: int | None) -> bool:
    """Whether the process that launched this one is gone."""
    return launcher is not None and os.getppid() != launcher


class Guard:
    """Ends this process if the one that launched it is gone while the ranks do not watch each other yet.

    Args:
        rank: this process's global rank.
        stage: the stage of this rank.
        launcher: the process that launched this one, if this one is to end with it.
    """

    def __init__(self, rank: int, stage: int | str, launcher: int | None) -> None:
        self._cause = FirstCause.of(rank, stage, ORPHANED)
        self._launcher = launcher
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lightning_cpipe-guard", daemon=True)

    def start(self) -> None:
        """Begin; does nothing where this process may outlive the one that started it."""
        if self._launcher is not None:
            self._thread.start()

    def stop(self) -> None:
        """The ranks watch each other from here on."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.wait(LOOK_S):
            if is_orphan(self._launcher):
                # One is enough to say it; rank 0 may be the launcher.
                if self._cause.rank == 1:
                    say(self._cause)
                os._exit(1)
