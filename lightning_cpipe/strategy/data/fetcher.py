"""Draws mini-batches ahead of Lightning's loop.

A stage forwards mini-batch i + lag in the local step that backwards mini-batch i, so the fetcher hands mini-batch i to
the loop while it has drawn further ones already, and walks into the next epoch by itself. It never draws what will
not be trained: not past `max_epochs`, and not past the last optimizer step of `max_steps`. So a run that ends as
planned leaves nothing in flight.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_cpipe.engine.mini_batch import fingerprint
from lightning_cpipe.engine.timeline import DATA, Timeline
from lightning_cpipe.errors import PlanError
from lightning_cpipe.stage.randomness import Stream, derived_seed
from lightning_cpipe.strategy.data.data_place import DataPlace
from lightning_cpipe.strategy.data.drawn import Drawn, Released
from lightning_cpipe.strategy.data.epoch_reader import Batch, EpochReader
from lightning_cpipe.strategy.data.update_count import UpdateCount
from lightning_cpipe.strategy.lightning_private import DataFetcher, reloads_loaders_at
from lightning_cpipe.tree import signature


class LookaheadFetcher(DataFetcher):
    """The fetcher of the training loop.

    Args:
        trainer: whose limits and loaders count.
        lag: how many mini-batches are forwarded before the first backward.
        ahead: how many more are drawn, so that their receives can be posted.
        seed: what the mini-batches' random numbers follow from.
        stream: draws inside it see the same random numbers on every rank; None to draw as Lightning does.
        timeline: where time is noted.
        crosses_epochs: whether the next epoch may begin before this one is done.
        loads: whether batches are loaded here, with numbers of their own.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        lag: int,
        ahead: int,
        seed: int,
        stream: Stream | None,
        timeline: Timeline,
        crosses_epochs: bool,
        loads: bool = True,
    ) -> None:
        super().__init__()
        self._trainer = trainer
        self._room = lag + ahead + 1
        self.seed = seed
        """What the mini-batches' random numbers follow from."""
        self._stream = stream
        self._timeline = timeline
        self._crosses_epochs = crosses_epochs
        self._loads = loads
        self._queue: deque[Drawn] = deque()
        self._empty: set[int] = set()
        """The epochs that were walked over, since there was nothing in them."""
        self._count = 0
        self._first_number = trainer.fit_loop.total_batch_idx + 1
        self._updates = UpdateCount(trainer)
        self._before_released: Drawn | None = None
        self._begun_at: DataPlace | None = None
        self._ended_at: DataPlace | None = None
        self.released: Drawn | None = None
        """The mini-batch that the loop is at."""

    @override
    def setup(self, combined_loader: CombinedLoader) -> None:
        """Draw from these loaders; those of an epoch may be made anew when it begins."""
        super().setup(combined_loader)
        self._reader = EpochReader(combined_loader, self._stream)
        self._queue.clear()
        self._empty.clear()

    @override
    def __iter__(self) -> LookaheadFetcher:
        """Be ready for the trainer's current epoch; does nothing if the fetcher has walked into it already."""
        epoch = self._trainer.current_epoch
        begun = epoch in (self._reader.epoch, *self._empty) or any(drawn.epoch == epoch for drawn in self._queue)
        if not begun:
            self._reader.begin(epoch)
        self.reset()
        return self

    @override
    def __next__(self) -> tuple[Released | None, int, int]:
        with self._timeline.measure(DATA, self._queue[0].number if self._queue else self._count):
            self._top_up(self._room)
        if not self._queue or self._queue[0].epoch > self._trainer.current_epoch:
            # With something in the queue, the epoch had fewer batches than its loader's length.
            self._require_an_end()
            self.done = True
            raise StopIteration
        drawn = self._queue.popleft()
        self._before_released, self.released = self.released, drawn
        self.fetched = drawn.index + 1
        self.done = drawn.is_last
        return None if drawn.batch is None else Released(drawn), drawn.index, 0

    @override
    def teardown(self) -> None:
        super().teardown()
        self._queue.clear()
        self._before_released = self.released = self._begun_at = self._ended_at = None

    def peek(self) -> Drawn | None:
        """The first mini-batch that will be trained; it stays in the queue."""
        self._top_up(1)
        return self._queue[0] if self._queue else None

    def mini_batch(self, number: int) -> Drawn | None:
        """Mini-batch `number`, if it was drawn and is not released yet or released just now."""
        if self.released is not None and self.released.number == number:
            return self.released
        place = number - self._queue[0].number if self._queue else -1
        return self._queue[place] if 0 <= place < len(self._queue) else None

    def begin_epoch(self, resumed_at: int, saved: DataPlace | None = None) -> None:
        """The loop begins its current epoch, or goes on in it at batch `resumed_at` after a restart.

        Args:
            resumed_at: the batches of the epoch that were trained.
            saved: where the checkpoint of a pipeline says that the data is.
        """
        epoch = self._trainer.current_epoch
        self._ended_at = None
        next_one = self._queue[0] if self._queue else None
        place = (self._reader.epoch, self._reader.next_index) if next_one is None else (next_one.epoch, next_one.index)
        if saved is not None:
            self._forget_drawn(saved.number)
            self._begun_at = saved
            if (saved.epoch, saved.index) == (epoch, resumed_at):
                with self._timeline.measure(DATA, 0):
                    self._reader.go_on(saved)
            else:
                # The epoch is at its end, and its hooks are to come.
                self._reader.end(saved.epoch - 1, saved.start)
        elif place != (epoch, resumed_at) and epoch not in self._empty:
            # What was drawn for the set-up came before the checkpoint was loaded. The loader starts anew, as it does
            # in Lightning, unless it knows its place.
            self._forget_drawn(self._trainer.fit_loop.total_batch_idx + 1)
            self._reader.begin(epoch, resumed_at)
        elif self._count == 0:
            self._first_number = self._trainer.fit_loop.total_batch_idx + 1
        # Hooks at the start of an epoch may have changed how many mini-batches make an update.
        self._updates = UpdateCount(self._trainer)
        for drawn in self._queue:
            self._updates.count(drawn)

    def end(self) -> None:
        """Training is over: forget what was drawn and will not be trained. The ranks have drawn more or less of that.

        If it begins again, as after a search for a learning rate, the mini-batches are counted anew.
        """
        self._ended_at = self.place()
        self._queue.clear()
        self._count = 0

    def place(self) -> DataPlace | None:
        """Where the data is, for a run that goes on from here; None where it is drawn as Lightning draws it."""
        drawn = self.released
        if self._ended_at is not None or drawn is None or drawn.start is None:
            return self._ended_at or self._begun_at
        if not self._is_trained(drawn):
            random = None if (last := self._before_in_epoch) is None else last.random
            return DataPlace(drawn.epoch, drawn.index, self._first_number + drawn.number, drawn.start, random)
        following = self._first_number + drawn.number + 1
        if not drawn.is_last:
            return DataPlace(drawn.epoch, drawn.index + 1, following, drawn.start, drawn.random)
        epoch = drawn.epoch + 1
        if self._queue:
            start = self._queue[0].start
        elif self._reader.epoch == epoch:
            start = self._reader.start
        else:
            loader = None if reloads_loaders_at(self._trainer, epoch) else self.combined_loader
            start = self._reader.start_here(loader)
        assert start is not None
        return DataPlace(epoch, 0, following, start)

    def places_of_loaders(self) -> list[Any] | None:
        """Of those that know theirs, behind the last mini-batch that was trained; None if none was."""
        drawn = self.released
        if drawn is not None and not self._is_trained(drawn):
            drawn = self._before_in_epoch
        return None if drawn is None else drawn.places

    @property
    def _before_in_epoch(self) -> Drawn | None:
        """The mini-batch before the released one, if it is of the same epoch."""
        before, here = self._before_released, self.released
        return before if before is not None and here is not None and before.epoch == here.epoch else None

    def _is_trained(self, drawn: Drawn) -> bool:
        """Whether the loop has made the step of the mini-batch that it is at."""
        progress: Any = self._trainer.fit_loop.epoch_loop.batch_progress.current
        return bool(progress.processed > drawn.index)

    def _forget_drawn(self, first_number: int) -> None:
        """Count mini-batches from here, of which so many came before in all runs."""
        self._queue.clear()
        self._before_released = self.released = None
        self._count = 0
        self._first_number = first_number

    def keep_sampler_epoch(self) -> None:
        """Give the samplers the epoch that is drawn from; the loop gives them the one that it is at."""
        self._reader.keep_sampler_epoch()

    def _top_up(self, room: int) -> None:
        while len(self._queue) < room and (batch := self._draw()) is not None:
            self._queue.append(self._placed(batch))

    def _draw(self) -> Batch | None:
        """Draw one more batch, if there is one that will be trained."""
        if self._updates.is_full:
            return None
        self._start_profiler()
        try:
            batch = self._reader.read()
            while batch is None and self._may_walk_on():
                self._reader.begin(self._reader.epoch + 1)
                batch = self._reader.read()
                if batch is None:
                    self._empty.add(self._reader.epoch)
        finally:
            self._stop_profiler()
        return batch

    def _may_walk_on(self) -> bool:
        """Whether the epoch after the one that was drawn last may begin."""
        following = self._reader.epoch + 1
        if following == 0 or not self._crosses_epochs or reloads_loaders_at(self._trainer, following):
            return False
        max_epochs = self._trainer.max_epochs
        return max_epochs is None or not 0 <= max_epochs <= following

    def _placed(self, batch: Batch) -> Drawn:
        if batch.content is None and self._room > 1:
            raise MisconfigurationException(
                f"the training loader yielded None as batch {batch.batch_idx} of epoch {batch.epoch}: skipping a"
                " mini-batch is not supported yet, since all stages run its step. Leave it out in the loader."
            )
        drawn = Drawn(
            number=self._count,
            seed=derived_seed(self.seed, "mini-batch", self._first_number + self._count),
            batch=batch.content,
            fingerprint=fingerprint(batch.content) if self._loads else None,
            signature=signature(batch.content),
            epoch=batch.epoch,
            index=batch.batch_idx,
            is_last=batch.is_last,
            start=batch.start,
            places=batch.places,
            random=batch.random,
        )
        self._count += 1
        self._updates.count(drawn)
        return drawn

    def _require_an_end(self) -> None:
        """There is nothing left to train: that is so if the loader is at its end, or the last update was made."""
        done, planned = self._trainer.global_step, self._updates.planned
        if self._updates.is_full and done < self._trainer.max_steps:
            raise PlanError(
                f"{done} optimizer steps were made where {planned} were planned for the mini-batches drawn so far, so"
                f" max_steps={self._trainer.max_steps} would never be reached: `accumulate_grad_batches` changed in the"
                " middle of an epoch. Change it where an epoch begins, as `GradientAccumulationScheduler` does."
            )
