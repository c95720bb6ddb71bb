"""Batches that a rank does not load: it hears from the rank before what each is like, and gets zeros for its numbers.

With ``load_on="ends"`` only the ranks that hold the first and the last stage iterate their loaders: the first one feeds
the batch into the model, the last one compares with its labels. The first rank tells the next one of every batch when
it draws it: that there is one, its place and, where it is not like the batch before, its structure, shapes and types.
Each rank in between hands that on. Fingerprints come with the activations, from the first rank to the last, which
compares them with those of its own batches.

The first rank draws further ahead than any other, so nobody waits for what it tells.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_cpipe.strategy.data.alike import AlikeLoader
from lightning_cpipe.strategy.lightning_private import adopt
from lightning_cpipe.transport.records import Records

Place = tuple[int, int]
"""Of a batch: its `batch_idx`, and its `dataloader_idx`."""


class Hearsay:
    """One rank's ends of a lane on which batches are told of.

    Args:
        hears: from the rank before; None on a rank that loads.
        tells: to the rank after; None if that loads.
    """

    def __init__(self, hears: Records | None = None, tells: Records | None = None) -> None:
        self._hears = hears
        self._tells = tells
        self._last: bytes | None = None

    @property
    def loads(self) -> bool:
        """Whether this rank loads its batches."""
        return self._hears is None

    def tell(self, batch: Any, place: Place) -> None:
        """A batch was drawn.

        Raises:
            MisconfigurationException: if it can't be told.
        """
        assert self._tells is not None
        likeness = _likeness(batch)
        self._tells.send((place, None if likeness == self._last else likeness))
        self._last = likeness

    def tell_end(self) -> None:
        """A batch was asked for, and there is none left."""
        assert self._tells is not None
        self._tells.send(None)

    def hear(self) -> tuple[Any, Place] | None:
        """The next batch, with zeros for the numbers in its tensors, and its place; None if there is none left."""
        assert self._hears is not None
        told = self._hears.receive()
        if self._tells is not None:
            self._tells.send(told)
        if told is None:
            return None
        place, likeness = told
        self._last = likeness or self._last
        assert self._last is not None
        return _Zeros(io.BytesIO(self._last)).load(), place

    def settle(self) -> None:
        """Forget what was told of batches that will not be trained; all ranks must call it."""
        if self._tells is not None:
            self._tells.send_last()
        if self._hears is not None:
            self._hears.discard()
        self._last = None

    def read(self, loader: CombinedLoader, stream: Callable[[], AbstractContextManager[None]]) -> CombinedLoader:
        """The loaders of a loop, as this rank reads them; those that are iterated, inside `stream`."""
        if self._hears is not None:
            hearing = adopt(HearingLoader, loader)
            hearing.hearsay = self
            return hearing
        if self._tells is None:
            alike = adopt(AlikeLoader, loader)
        else:
            alike = adopt(TellingLoader, loader)
            alike.hearsay = self
        alike.stream = stream
        return alike


class TellingLoader(AlikeLoader):
    """Loaders of whose batches another rank is told."""

    hearsay: Hearsay

    @override
    def __next__(self) -> tuple[Any, int, int]:
        try:
            batch, batch_idx, dataloader_idx = super().__next__()
        except StopIteration:
            self.hearsay.tell_end()
            raise
        self.hearsay.tell(batch, (batch_idx, dataloader_idx))
        return batch, batch_idx, dataloader_idx


class HearingLoader(CombinedLoader):
    """Loaders that are not iterated on this rank (see `Unread`): it hears of their batches."""

    hearsay: Hearsay

    @override
    def __next__(self) -> tuple[Any, int, int]:
        heard = self.hearsay.hear()
        if heard is None:
            raise StopIteration
        batch, place = heard
        return batch, *place

    @override
    def _load_state_dicts(self, states: list[dict[str, Any]]) -> None:
        """Nothing: a loader that is not read has no place."""


class Unread:
    """Stands for a loader on a rank that does not iterate it, and has its length, if any.

    Args:
        loader: that one.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        if (length := sized_len(self._loader)) is None:
            raise TypeError("nobody knows how many batches there are")
        return length


LARGEST = 2**16
"""Bytes."""


class _WithoutNumbers(pickle.Pickler):
    @override
    def persistent_id(self, obj: Any) -> Any:
        is_numbers = isinstance(obj, Tensor) or (isinstance(obj, np.ndarray) and not obj.dtype.hasobject)
        return (tuple(obj.shape), obj.dtype) if is_numbers else None


class _Zeros(pickle.Unpickler):
    @override
    def persistent_load(self, pid: Any) -> Any:
        shape, dtype = pid
        return torch.zeros(shape, dtype=dtype) if isinstance(dtype, torch.dtype) else np.zeros(shape, dtype)


def _likeness(batch: Any) -> bytes:
    """A batch without the numbers in its tensors and arrays.

    Raises:
        MisconfigurationException: if it can't be sent, or is large: ranks that hear of it can be behind by a batch,
            which must fit what a socket holds.
    """
    found = io.BytesIO()
    try:
        _WithoutNumbers(found, protocol=pickle.HIGHEST_PROTOCOL).dump(batch)
    except Exception as error:
        raise MisconfigurationException(
            f"load_on='ends': ranks between the first and the last hear what batches are like, and a"
            f" {type(batch).__name__} can't be sent ({type(error).__name__}: {error}). Let the loader yield what can be"
            " pickled, or set load_on='all'."
        ) from error
    if len(likeness := found.getvalue()) > LARGEST:
        raise MisconfigurationException(
            f"load_on='ends': a {type(batch).__name__} without the numbers in its tensors and arrays has"
            f" {len(likeness)} bytes, and {LARGEST} at most are told to the ranks that do not load. Leave texts and the"
            " like out of the batch, or set load_on='all'."
        )
    return likeness
