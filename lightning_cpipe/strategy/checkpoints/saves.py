"""The checkpoints that rank 0 still has to write, and what is to be done after them, in order.

A save only notes what is to be saved. The file is written when the parts of all ranks are there: at the end of a local
step, or in the background. Meanwhile an older file stays as it is, and what was to come after the new one, such as the
removal of the older one, waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_cpipe.errors import RankLostError, SaveError
from lightning_cpipe.strategy.checkpoints.optimizer_states import State
from lightning_cpipe.strategy.checkpoints.promised import as_it_is_now, settled
from lightning_cpipe.transport.parcels import Parcels

Write = Callable[[State, Any, Any], None]


@dataclass(frozen=True)
class _Due:
    """Something that is to be done.

    Attributes:
        act: does it; waits if it is not due yet.
        is_due: whether `act` would not wait.
        path: the file that it is about; None if about none.
        leaves_file: whether there is a file afterwards.
        takes_all: whether it needs all ranks to go on.
    """

    act: Callable[[], object]
    is_due: Callable[[], bool] = lambda: True
    path: str | None = None
    leaves_file: bool = False
    takes_all: bool = False


class Saves:
    """One rank's; other ranks than rank 0 have nothing to write.

    Args:
        parcels: brings the parts of all ranks.
        write: writes a checkpoint to a path, with the user's storage options.
        in_background: whether nobody waits for the disk.
    """

    def __init__(self, parcels: Parcels, write: Write, *, in_background: bool) -> None:
        self._parcels = parcels
        self._write = write
        self._in_background = in_background
        self._pace: bool | None = None
        """Whether who saves waits for the file; None where that is for the user's options to say."""
        self._due: deque[_Due] = deque()

    def save(self, checkpoint: State, path: str | Path, storage_options: Any | None, *, at_once: bool) -> None:
        """Write a checkpoint, of which parts may still be promised.

        Args:
            checkpoint: may change afterwards.
            path: where.
            storage_options: see Lightning.
            at_once: whether the file must be there when this returns.
        """
        if at_once or self._waits or (self._parcels.is_alone and not self._in_background):
            self.finish()
            self._write(settled(checkpoint), path, storage_options)
            return
        write = partial(_write_whole, self._write, as_it_is_now(checkpoint), path, storage_options)
        come = self._parcels.afterwards(write if self._in_background else _nothing)
        act = come.result if self._in_background else write
        self._due.append(_Due(partial(_naming, path, act), come.done, str(path), leaves_file=True))
        self.proceed()

    def save_shard(self, write: Callable[[], None], path: str | Path, *, at_once: bool, leads: bool) -> None:
        """Write this rank's part of a folder; all ranks must call it.

        Args:
            write: does it, together with the other ranks.
            path: of the folder.
            at_once: whether the folder must be there when this returns.
            leads: whether this rank waits for the folder where somebody needs it.
        """
        done = self._parcels.afterwards(write)
        act = partial(_naming, path, done.result)
        self._due.append(_Due(act, done.done, str(path), leaves_file=True, takes_all=True))
        if at_once or (leads and self._waits):
            self.finish()
        else:
            self.proceed()

    @property
    def _waits(self) -> bool:
        return not self._in_background if self._pace is None else self._pace

    def unhurried(self) -> AbstractContextManager[None]:
        """Inside, whoever saves does not need the file."""
        return self._at_pace(False)

    def hurried(self) -> AbstractContextManager[None]:
        """Inside, whoever saves needs the file."""
        return self._at_pace(True)

    @contextmanager
    def _at_pace(self, pace: bool) -> Iterator[None]:
        before, self._pace = self._pace, pace
        try:
            yield
        finally:
            self._pace = before

    def then(self, act: Callable[[], object], path: str | Path | None = None, *, leaves_file: bool = False) -> None:
        """Do something when all that was saved before is written; at once if it is.

        Args:
            act: does it.
            path: the file that it is about.
            leaves_file: whether there is a file of that name afterwards.
        """
        self._due.append(_Due(act, path=None if path is None else str(path), leaves_file=leaves_file))
        self.proceed()

    @property
    def are_done(self) -> bool:
        """Whether there is nothing left to do."""
        return not self._due

    def will_exist(self, path: str | Path) -> bool | None:
        """Whether there will be a file of that name, once everything is done; None if that changes nothing."""
        return next((each.leaves_file for each in reversed(self._due) if each.path == str(path)), None)

    def proceed(self) -> None:
        """Do what can be done without waiting for another rank.

        Raises:
            SaveError: if a checkpoint can't be written; nothing that was to come after it is done.
        """
        while self._due and self._due[0].is_due():
            self._do_next()

    def finish(self) -> None:
        """Do all there is to do, and let other ranks have this one's parts; waits for them.

        Raises:
            SaveError: see `proceed`.
        """
        while self._due:
            self._do_next()
        self._parcels.settle()

    def break_off(self) -> None:
        """The pipeline is broken: write what has come whole. After the first that has not, files stay as they are."""
        self._parcels.abandon()
        waits = True
        while self._due:
            waiting = [each.path for each in self._due if each.leaves_file]
            try:
                if self._due[0].takes_all and not self._due[0].is_due():
                    waits = False
                    raise RankLostError("not all ranks have written their parts")
                self._do_next()
            except Exception as error:
                self._due.clear()
                rank_zero_warn(f"no checkpoint at {waiting}: the pipeline broke before it was whole ({error}).")
        self._parcels.rest(waits=waits)

    def _do_next(self) -> None:
        try:
            self._due.popleft().act()
        except BaseException:
            self._due.clear()
            raise


def _write_whole(write: Write, checkpoint: State, path: Any, storage_options: Any) -> None:
    write(settled(checkpoint), path, storage_options)


def _naming(path: str | Path, act: Callable[[], object]) -> None:
    try:
        act()
    except RankLostError:
        raise
    except Exception as error:
        raise SaveError(f"the checkpoint {path} was not written ({type(error).__name__}: {error})") from error


def _nothing() -> None:
    pass
