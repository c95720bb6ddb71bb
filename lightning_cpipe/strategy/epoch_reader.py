"""Reads the loaders' batches, one epoch after another, and knows of each whether it is its epoch's last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities import CombinedLoader

from lightning_cpipe.strategy.lightning_private import set_sampler_epoch, states_of_loaders


class Batch(NamedTuple):
    """A batch and its place.

    Attributes:
        content: as the loader gave it.
        epoch: which it belongs to.
        batch_idx: its place in the epoch.
        is_last: whether it ends the epoch.
        places: of those loaders that know theirs, after this batch.
    """

    content: Any
    epoch: int
    batch_idx: int
    is_last: bool
    places: list[Any]


class EpochReader:
    """Reads a combined loader. Before `begin` there is nothing to read.

    Args:
        loader: of all training loaders, with the limits of the trainer.
    """

    def __init__(self, loader: CombinedLoader) -> None:
        self._loader = loader
        self._iterator: Iterator[Any] = iter(())
        self._length: int | None = None
        self._held: tuple[Any, list[Any]] | None = None
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
        self._iterator = iter(self._loader)
        self._length = sized_len(self._loader)
        self._held = None
        self.next_index = at
        self.is_at_end = self._length == 0

    def keep_sampler_epoch(self) -> None:
        """Give the samplers the epoch that is read from."""
        for each in self._loader.flattened:
            set_sampler_epoch(each, self.epoch)

    def read(self) -> Batch | None:
        """The next batch of the epoch; None if there is none left."""
        if self.is_at_end:
            return None
        content, places = self._pull() if self._held is None else self._held
        if self._length is None:
            # Where the length is unknown, one is held back to know which is the last.
            self._held = self._pull() if content is not _NOTHING else None
            self.is_at_end = self._held is None or self._held[0] is _NOTHING
        else:
            self.is_at_end = content is _NOTHING or self.next_index + 1 >= self._length
        if content is _NOTHING:
            return None
        self.next_index += 1
        return Batch(content, self.epoch, self.next_index - 1, self.is_at_end, places)

    def _pull(self) -> tuple[Any, list[Any]]:
        try:
            content, _, _ = next(self._iterator)
        except StopIteration:
            return _NOTHING, []
        return content, states_of_loaders(self._loader)


_NOTHING = object()
"""No batch; a loader may well yield None."""
