"""How a rank ends when something went wrong: the first cause is told once, and last."""

from __future__ import annotations

import atexit
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from types import TracebackType

from lightning_cpipe.transport.first_cause import FirstCause, say
from lightning_cpipe.transport.liveness import GRACE_S

log = logging.getLogger(__name__)


class Ending:
    """Says the first cause when the process ends, after every traceback and every logger's goodbye.

    A rank that failed because of another one does not print its own traceback, which would only hide the first; it is
    logged at debug level.
    """

    def __init__(self) -> None:
        # Made before loggers register theirs, so that it runs after them.
        atexit.register(self._at_exit)
        self._cause: FirstCause | None = None
        self._echo: BaseException | None = None
        self._actions: list[Callable[[], object]] = []
        self._hook = sys.excepthook

    def call_off(self) -> None:
        """The run that could have gone wrong is no more."""
        atexit.unregister(self._at_exit)

    def because(self, cause: FirstCause | None, error: BaseException, *, echo: bool) -> None:
        """The process is about to end.

        Args:
            cause: what to say at the end; None if another rank says it.
            error: what this process raises.
            echo: whether that only follows from another rank's failure.
        """
        self._cause = cause
        if echo:
            self._echo = error
            if sys.excepthook != self._quiet:
                self._hook, sys.excepthook = sys.excepthook, self._quiet

    def afterwards(self, action: Callable[[], object]) -> None:
        """Do this when the process ends."""
        self._actions.append(action)

    def _quiet(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if error is self._echo:
            log.debug("this rank ended because another one failed", exc_info=(kind, error, traceback))
        else:
            # Someone else's error: it counts more than ours.
            self._cause = None
            self._hook(kind, error, traceback)

    def _at_exit(self) -> None:
        for action in self._actions:
            action()
        if self._cause is not None:
            say(self._cause)


def in_words(error: BaseException) -> str:
    """An exception as part of a sentence."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted from the keyboard"
    # What a worker of a DataLoader raised brings its whole traceback along.
    text, _, original = str(error).strip().partition("\nOriginal Traceback")
    text = " ".join([text, *original.splitlines()[-1:]])
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def wait_for(children: Sequence[subprocess.Popen[bytes] | BaseProcess]) -> None:
    """Wait until the ranks that this process started have ended by themselves; end those that do not."""
    deadline = time.monotonic() + 2 * GRACE_S
    for child in children:
        wait = child.join if isinstance(child, BaseProcess) else child.wait
        with suppress(subprocess.TimeoutExpired):
            wait(timeout=max(0.0, deadline - time.monotonic()))
        child.kill()
        wait()
