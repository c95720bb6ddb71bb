"""Reads the loaders' batches, one epoch after another, and knows of each whether it is its epoch's last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_cpipe.stage.randomness import GeneratorState, Stream
from lightning_cpipe.strategy.data.data_place import DataPlace, EpochStart
from lightning_cpipe.strategy.lightning_private import give_states, set_sampler_epoch, states_of_loaders


class Batch(NamedTuple):
    """A batch and its place.

    Attributes:
        content: as the loader gave it.
        epoch: which it belongs to.
        batch_idx: its place in the epoch.
        is_last: whether it ends the epoch.
        start: how its epoch began; None where nothing is kept of that.
        places: of those loaders that know theirs, after this batch.
        random: the stream's state after this batch, if a loader knows its place.
    """

    content: Any
    epoch: int
    batch_idx: int
    is_last: bool
    start: EpochStart | None
    places: list[Any]
    random: GeneratorState | None


class EpochReader:
    """Reads a combined loader. Before `begin` there is nothing to read.

    Args:
        loader: of all training loaders, with the limits of the trainer.
        stream: draws inside it see the same random numbers on every rank; None to draw as Lightning does.
    """

    def __init__(self, loader: CombinedLoader, stream: Stream | None = None) -> None:
        self._loader = loader
        self._stream = stream
        self._iterator: Iterator[Any] = iter(())
        self._length: int | None = None
        self._held: tuple[Any, list[Any], GeneratorState | None] | None = None
        self.start: EpochStart | None = None
        """How the epoch began that is read from."""
        self.epoch = -1
        """The epoch that is read from."""
        self.next_index = 0
        """The place of the next batch in it."""
        self.is_at_end = True
        """Whether the epoch's last batch has been read."""

    def begin(self, epoch: int, at: int = 0) -> None:
        """Read an epoch from its loader's start.

        Args:
            epoch: which.
            at: what the first batch counts as; after a resume, a loader goes on where it was, or starts anew.
        """
        # A loader with workers draws its order at once, so the samplers must know the epoch before.
        self.epoch = epoch
        self.keep_sampler_epoch()
        start = self.start_here(self._loader)
        with self._drawing():
            self._iterator = iter(self._loader)
        self.start = None if start is None else replace(start, places=states_of_loaders(self._loader))
        self._length = sized_len(self._loader)
        self._held = None
        self.next_index = at
        self.is_at_end = self._length == 0

    def go_on(self, place: DataPlace) -> None:
        """Read an epoch that was begun before, from a place in it: each loader must have been given its own."""
        assert self._stream is not None
        if place.random is not None:
            place.start.restore_seeds(self._loader)
            self._stream.state = place.start.random
            self.begin(place.epoch, place.index)
            self._stream.state = place.random
            return
        place.start.restore(self._stream, self._loader)
        give_states(self._loader, place.start.places)
        self.begin(place.epoch)
        if place.index:
            rank_zero_info(
                f"Batches 0 to {place.index - 1} of epoch {place.epoch} are drawn once more, and not trained: the"
                " training loader has no `state_dict`, so it can't be told its place."
            )
        for _ in range(place.index):
            self.read()

    def end(self, epoch: int, following: EpochStart) -> None:
        """All of an epoch was read before, and this is how the next one begins."""
        assert self._stream is not None
        following.restore(self._stream, self._loader)
        self.epoch, self._iterator, self._held, self.is_at_end = epoch, iter(()), None, True

    def start_here(self, loader: CombinedLoader | None) -> EpochStart | None:
        """How an epoch would begin now; see `EpochStart.here`."""
        return None if self._stream is None else EpochStart.here(self._stream, loader)

    def keep_sampler_epoch(self) -> None:
        """Give the samplers the epoch that is read from."""
        for each in self._loader.flattened:
            set_sampler_epoch(each, self.epoch)

    def read(self) -> Batch | None:
        """The next batch of the epoch; None if there is none left."""
        if self.is_at_end:
            return None
        content, places, random = self._pull() if self._held is None else self._held
        if self._length is None:
            # Where the length is unknown, one is held back to know which is the last.
            self._held = self._pull() if content is not _NOTHING else None
            self.is_at_end = self._held is None or self._held[0] is _NOTHING
        else:
            self.is_at_end = content is _NOTHING or self.next_index + 1 >= self._length
        if content is _NOTHING:
            return None
        self.next_index += 1
        return Batch(content, self.epoch, self.next_index - 1, self.is_at_end, self.start, places, random)

    def _pull(self) -> tuple[Any, list[Any], GeneratorState | None]:
        try:
            with self._drawing():
                content, _, _ = next(self._iterator)
        except StopIteration:
            return _NOTHING, [], None
        places = states_of_loaders(self._loader)
        return content, places, self._stream.state if places and self._stream is not None else None

    def _drawing(self) -> AbstractContextManager[None]:
        return nullcontext() if self._stream is None else self._stream()


_NOTHING = object()
"""No batch; a loader may well yield None."""
