"""Draws mini-batches ahead of Lightning's loop.

A stage forwards mini-batch i + lag in the local step that backwards mini-batch i, so the fetcher hands mini-batch i to
the loop while it has drawn further ones already, and walks into the next epoch by itself. It never draws what will
not be trained: not past `max_epochs`, and not past the last optimizer step of `max_steps`. So a run that ends as
planned leaves nothing in flight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import CombinedLoader
from typing_extensions import override

from lightning_cpipe.engine.mini_batch import MiniBatch, fingerprint
from lightning_cpipe.engine.timeline import DATA, Timeline
from lightning_cpipe.stage.randomness import derived_seed
from lightning_cpipe.strategy.lightning_private import DataFetcher, set_sampler_epoch
from lightning_cpipe.tree import signature


@dataclass
class Drawn(MiniBatch):
    """A mini-batch that was drawn, with its place in Lightning's counting.

    Attributes:
        epoch: which it belongs to.
        index: its place in the epoch: Lightning's `batch_idx`.
        is_last: whether it ends the epoch.
        global_step: the optimizer steps that come before its own.
        prepared: on the stage's device; made when it is first needed.
    """

    epoch: int = 0
    index: int = 0
    is_last: bool = False
    global_step: int = 0
    prepared: list[Any] = field(default_factory=list)


class Released:
    """Stands for a drawn mini-batch on its way through Lightning's loop, which would prepare it a second time."""

    def __init__(self, drawn: Drawn) -> None:
        self.drawn = drawn


class LookaheadFetcher(DataFetcher):
    """The fetcher of the training loop.

    Args:
        trainer: whose limits and loaders count.
        lag: how many mini-batches are forwarded before the first backward.
        ahead: how many more are drawn, so that their receives can be posted.
        seed: what the mini-batches' random numbers follow from.
        stream: draws inside it see the same random numbers on every rank.
        timeline: where time is noted.
        crosses_epochs: whether the next epoch may begin before this one is done.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        lag: int,
        ahead: int,
        seed: int,
        stream: Callable[[], AbstractContextManager[None]],
        timeline: Timeline,
        crosses_epochs: bool,
    ) -> None:
        super().__init__()
        self._trainer = trainer
        self._room = lag + ahead + 1
        self._seed = seed
        self._stream = stream
        self._timeline = timeline
        self._crosses_epochs = crosses_epochs
        self._queue: list[Drawn] = []
        self._epoch = -1
        self._next_index = 0
        self._held: Any = _NOTHING
        self._exhausted = True
        self._count = 0
        self._first_number = 0
        self._planned_steps: int | None = None
        self.released: Drawn | None = None
        """The mini-batch that the loop is at."""

    @override
    def setup(self, combined_loader: CombinedLoader) -> None:
        """Draw from these loaders; those of an epoch may be made anew when it begins."""
        super().setup(combined_loader)
        self._queue.clear()
        self._epoch = -1

    @override
    def __iter__(self) -> LookaheadFetcher:
        """Be ready for the trainer's current epoch; does nothing if the fetcher has walked into it already."""
        epoch = self._trainer.current_epoch
        if not any(drawn.epoch == epoch for drawn in self._queue) and self._epoch != epoch:
            with self._stream():
                self._begin(epoch)
        self.fetched = 0
        self.done = self.length == 0
        return self

    @override
    def __next__(self) -> tuple[Released, int, int]:
        with self._timeline.measure(DATA, self._queue[0].number if self._queue else self._count):
            self._top_up(self._room)
        if not self._queue:
            self.done = True
            raise StopIteration
        drawn = self.released = self._queue.pop(0)
        self.fetched = drawn.index + 1
        self.done = drawn.is_last
        return Released(drawn), drawn.index, 0

    @override
    def teardown(self) -> None:
        super().teardown()
        self._queue.clear()
        self.released = None
        self._epoch = -1

    def peek(self) -> Drawn | None:
        """The first mini-batch that will be trained; it stays in the queue."""
        self._top_up(1)
        return self._queue[0] if self._queue else None

    def mini_batch(self, number: int) -> Drawn | None:
        """Mini-batch `number`, if it was drawn and is not released yet or released just now."""
        known = self._queue if self.released is None else [self.released, *self._queue]
        return next((drawn for drawn in known if drawn.number == number), None)

    def begin_epoch(self, resumed_at: int) -> None:
        """The loop begins its current epoch, or goes on in it at batch `resumed_at` after a restart."""
        epoch = self._trainer.current_epoch
        first = self._queue[0] if self._queue else None
        if first is not None and (first.epoch, first.index) == (epoch, resumed_at):
            return
        if first is None and (self._epoch, self._next_index) == (epoch, resumed_at):
            return
        # What was drawn for the set-up came before the checkpoint was loaded. The loader starts anew, as it does in
        # Lightning; one that kept its place has been given its state by now.
        self._queue.clear()
        with self._stream():
            self._begin(epoch)
        self._next_index = resumed_at
        self._count = 0
        self._first_number = self._trainer.fit_loop.total_batch_idx + 1
        self._planned_steps = None

    def keep_sampler_epoch(self) -> None:
        """Give the samplers the epoch that is drawn from; the loop gives them the one that it is at."""
        self._set_sampler_epoch(self._epoch)

    def _top_up(self, room: int) -> None:
        while len(self._queue) < room and self._draw():
            pass

    def _draw(self) -> bool:
        """Draw one more mini-batch, if there is one that will be trained."""
        if not self._may_draw():
            return False
        batch: Any = _NOTHING
        with self._stream():
            if not self._exhausted:
                batch = self._next_batch()
            if batch is _NOTHING and self._walk_on():
                batch = self._next_batch()
        if batch is _NOTHING:
            return False
        self._queue.append(self._placed(batch))
        return True

    def _walk_on(self) -> bool:
        """Begin the epoch after the one that was drawn last."""
        if self._epoch < 0 or not self._crosses_epochs:
            return False
        following = self._epoch + 1
        max_epochs = self._trainer.max_epochs
        if max_epochs is not None and 0 <= max_epochs <= following:
            return False
        every = self._trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        if every and following % every == 0:
            # Lightning asks for a new loader there.
            return False
        self._begin(following)
        return True

    def _begin(self, epoch: int) -> None:
        # A loader with workers draws its order at once, so the samplers must know the epoch before.
        self._set_sampler_epoch(epoch)
        super().__iter__()
        self._epoch = epoch
        self._next_index = 0
        self._held = _NOTHING
        self._exhausted = self.length == 0

    def _set_sampler_epoch(self, epoch: int) -> None:
        for loader in self.combined_loader.flattened:
            set_sampler_epoch(loader, epoch)

    def _next_batch(self) -> Any:
        """The next batch of the epoch; where the length is unknown, one is held back to know which is the last."""
        if self.length is None and self._held is _NOTHING:
            self._held = self._pull()
        batch = self._pull() if self.length is not None else self._held
        if self.length is None and batch is not _NOTHING:
            self._held = self._pull()
        reached = self.length is not None and self._next_index + 1 >= self.length
        self._exhausted = batch is _NOTHING or reached or (self.length is None and self._held is _NOTHING)
        return batch

    def _pull(self) -> Any:
        assert self.iterator is not None
        self._start_profiler()
        try:
            batch, _, _ = next(self.iterator)
        except StopIteration:
            return _NOTHING
        finally:
            self._stop_profiler()
        return batch

    def _placed(self, batch: Any) -> Drawn:
        steps_before = self._steps_planned()
        drawn = Drawn(
            number=self._count,
            seed=derived_seed(self._seed, "mini-batch", self._first_number + self._count),
            batch=batch,
            fingerprint=fingerprint(batch),
            signature=signature(batch),
            epoch=self._epoch,
            index=self._next_index,
            is_last=self._exhausted,
            global_step=steps_before,
        )
        self._count += 1
        self._next_index += 1
        if drawn.is_last or (drawn.index + 1) % self._trainer.accumulate_grad_batches == 0:
            self._planned_steps = steps_before + 1
        return drawn

    def _steps_planned(self) -> int:
        if self._planned_steps is None:
            self._planned_steps = self._trainer.global_step
        return self._planned_steps

    def _may_draw(self) -> bool:
        max_steps = self._trainer.max_steps
        return self._steps_planned() < (math.inf if max_steps < 0 else max_steps)


class _Nothing:
    """No batch; a loader may well yield None."""


_NOTHING = _Nothing()
