"""Starts the ranks, and says why when they do not come back.

Lightning's own launchers, with two differences: what can't run is refused before a process is started, and the end of
a failed run is told in one sentence that names stage, rank, mini-batch and the first cause.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from torch.multiprocessing.spawn import ProcessException, ProcessExitedException
from typing_extensions import override

from lightning_cpipe.errors import RankLostError
from lightning_cpipe.strategy.lightning_private import (
    MultiProcessingLauncher,
    SubprocessScriptLauncher,
    set_num_threads_if_needed,
    start_children,
)
from lightning_cpipe.strategy.ranks.ending import Ending, in_words, wait_for
from lightning_cpipe.transport.first_cause import FirstCause, say
from lightning_cpipe.transport.last_words import read_last_words
from lightning_cpipe.transport.launched import LAUNCHER
from lightning_cpipe.transport.liveness import GRACE_S

POLL_S = 0.2
"""Seconds between two looks at the children."""


class Launched(Protocol):
    """What the launchers ask of the strategy."""

    words_folder: Path | None

    def refuse_early(self, trainer: pl.Trainer) -> None:
        """Raise if this can't run."""

    def named_stages_of(self, rank: int) -> str:
        """The stages that a rank holds, in words."""


class ScriptLauncher(SubprocessScriptLauncher):
    """Starts the script once more for each further rank."""

    def __init__(
        self, strategy: Launched, cluster_environment: ClusterEnvironment, num_processes: int, num_nodes: int
    ) -> None:
        super().__init__(cluster_environment, num_processes, num_nodes)
        self._strategy = strategy
        self._child_watch: _ChildWatch | None = None

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        if trainer is not None:
            self._strategy.refuse_early(trainer)
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally and not self.procs:
            with _as_launcher():
                start_children(self)
            self._child_watch = _ChildWatch(self.procs, self._strategy)
            self._child_watch.start()
        elif self._child_watch is not None:
            self._child_watch.require_all()
        if self.num_processes > 1:
            # A process alone shares the cores with nobody.
            set_num_threads_if_needed(num_processes=self.num_processes)
        try:
            with self._child_watch.watching() if self._child_watch is not None else nullcontext():
                return function(*args, **kwargs)
        except BaseException as error:
            if self.procs and not dist.is_initialized():
                self._give_up(error)
            raise

    def run_is_over(self) -> None:
        """No rank waits for another one any more, though hooks at the end may still run."""
        if self._child_watch is not None:
            self._child_watch.run_is_over()

    @override
    def kill(self, signum: int) -> None:
        if signum == signal.SIGKILL:
            # So Lightning ends an interrupted run. The children know already; they end by themselves, and tidy up.
            wait_for(self.procs)
        super().kill(signum)

    def _give_up(self, error: BaseException) -> None:
        """This rank, the first, failed before the others met it: they would wait for it."""
        if self._child_watch is not None:
            # What happens to the children from here on is no cause.
            self._child_watch.stop()
        for child in self.procs:
            child.kill()
        cause = FirstCause.of(0, self._strategy.named_stages_of(0), f"before it began: {in_words(error)}")
        Ending().because(cause, error, echo=False)


class ProcessLauncher(MultiProcessingLauncher):
    """Spawns or forks all ranks from this process, which waits for them."""

    def __init__(self, strategy: Any, start_method: Literal["spawn", "fork", "forkserver"]) -> None:
        super().__init__(strategy, start_method=start_method)

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        strategy: Launched = self._strategy  # type: ignore[assignment]
        if trainer is not None:
            strategy.refuse_early(trainer)
        with tempfile.TemporaryDirectory(prefix="lightning_cpipe_") as folder:
            strategy.words_folder = Path(folder)
            try:
                # Lightning leaves the port behind; the next run shall look for one of its own.
                with _as_launcher("MASTER_PORT"):
                    return super().launch(function, *args, trainer=trainer, **kwargs)
            except ProcessException as error:
                raise _explained(error, strategy) from error
            except BaseException:
                # After Ctrl+C the ranks are about to end by themselves, and still write into the folder.
                wait_for(self.procs)
                raise
            finally:
                strategy.words_folder = None

    @override
    def on_exception(self, error: BaseException) -> None:
        # Lightning tells the strategy of an exception in the main process only, which knows nothing of the pipeline.
        self._strategy.on_exception(error)
        if not isinstance(error, Exception):
            # SIGTERM and Ctrl+C would end this process with status 0: the launcher would wait for its result.
            raise SystemExit(1) from error


class _ChildWatch(threading.Thread):
    """Ends the main process if a child is gone and the main thread, which may wait for it, does not notice.

    That is so while the ranks still look for each other; later, every rank watches all others. Between runs nobody
    waits for a child, and what becomes of it does not end this process.

    Args:
        children: the further ranks.
        strategy: knows their stages.
    """

    def __init__(self, children: list[subprocess.Popen[bytes]], strategy: Launched) -> None:
        super().__init__(name="lightning_cpipe-children", daemon=True)
        self._children = children
        self._strategy = strategy
        self._have_met = False
        self._in_run = threading.Event()
        self._stopping = threading.Event()

    def stop(self) -> None:
        """The main thread ends the children itself."""
        self._stopping.set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A run is inside."""
        self._in_run.set()
        try:
            yield
        finally:
            self.run_is_over()

    def run_is_over(self) -> None:
        """Nobody waits for a child any more."""
        self._in_run.clear()

    def require_all(self) -> None:
        """A further run is about to begin, for which all children must be there.

        Raises:
            RankLostError: if one is not.
        """
        if (rank := self._gone(with_success=True)) is not None:
            raise RankLostError(f"{self._cause_of(rank).text} after an earlier run, so no further one can begin", rank)

    def _gone(self, *, with_success: bool) -> int | None:
        """The first rank that has ended.

        Args:
            with_success: whether one counts that ended as it should.
        """
        statuses = ((rank, child.poll()) for rank, child in enumerate(self._children, 1))
        return next((rank for rank, status in statuses if status or (with_success and status == 0)), None)

    @override
    def run(self) -> None:
        while not self._stopping.is_set():
            self._have_met |= dist.is_initialized()
            # Nobody has done its part before all have met.
            gone = self._gone(with_success=not self._have_met)
            if self._in_run.is_set() and gone is not None:
                self._end(gone)
            elif all(child.poll() == 0 for child in self._children):
                return
            time.sleep(POLL_S)

    def _end(self, rank: int) -> None:
        if self._have_met:
            # The main thread may know better why, and end the process first.
            time.sleep(2 * GRACE_S)
        if self._stopping.is_set() or not self._in_run.is_set() or not threading.main_thread().is_alive():
            # It is about to, once the loggers have said goodbye; or it is done with the run.
            return
        say(self._cause_of(rank))
        for child in self._children:
            child.kill()
        os._exit(1)

    def _cause_of(self, rank: int) -> FirstCause:
        status = self._children[rank - 1].returncode
        return FirstCause.of(rank, self._strategy.named_stages_of(rank), f"its process ended with status {status}")


@contextmanager
def _as_launcher(*restored: str) -> Iterator[None]:
    """Processes started inside know that this one launched them, and end with it.

    Args:
        restored: environment variables that are afterwards as they were before.
    """
    before = {name: os.environ.get(name) for name in (LAUNCHER, *restored)}
    os.environ[LAUNCHER] = str(os.getpid())
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _explained(error: ProcessException, strategy: Launched) -> RankLostError:
    """The first cause, from what the rank left behind."""
    rank = error.error_index
    assert strategy.words_folder is not None
    words = read_last_words(strategy.words_folder / f"rank_{rank}")
    how = "its process is gone" if isinstance(error, ProcessExitedException) else "see its error above"
    return RankLostError(
        words or FirstCause.of(rank, strategy.named_stages_of(rank), f"{how}, before it began").text, rank
    )
