"""Loaders of an evaluation that draw the same on every rank, whatever else a rank draws between two batches.

Training's fetcher sees to that by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch.utilities import CombinedLoader
from typing_extensions import Self, override


class AlikeLoader(CombinedLoader):
    """Loaders that are iterated in a stream of random numbers of their own."""

    stream: Callable[[], AbstractContextManager[None]]

    @override
    def __iter__(self) -> Self:
        with self.stream():
            return super().__iter__()

    @override
    def __next__(self) -> tuple[Any, int, int]:
        with self.stream():
            found: tuple[Any, int, int] = super().__next__()
            return found
