"""The micro-batches of the mini-batch that the training loop is at: what a flush schedule's plan is about.

They are slices of the mini-batch as `training_step` would get it. Each counts in the update by its share of the
samples, so that for a loss that is a mean over samples the update is that of the whole mini-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cpipe.engine.mini_batch import Source
from lightning_cpipe.stage.randomness import derived_seed, seeded
from lightning_cpipe.strategy.drawn import Drawn
from lightning_cpipe.strategy.samples import samples_in
from lightning_cpipe.strategy.slicing import sliced
from lightning_cpipe.tree import signature

HOOK = "split_batch"
"""The method of a LightningModule that slices a batch its own way."""


@dataclass
class MicroBatch(Drawn):
    """A slice of a mini-batch, in the mini-batch's place.

    Attributes:
        weight: its share of the mini-batch; those of all slices add up to 1.
    """

    weight: float = 1.0


class MicroBatches:
    """Slices the mini-batches that the loop comes to, one after the other.

    Args:
        source: has the mini-batches.
        module: may have a `split_batch`.
        most: how many slices a mini-batch has, at most.
        prepare: makes of a mini-batch what `training_step` gets.
    """

    def __init__(self, source: Source, module: pl.LightningModule, most: int, prepare: Callable[[Drawn], Any]) -> None:
        self._source = source
        self._module = module
        self._most = most
        self._prepare = prepare
        self._sliced: list[Drawn] = []
        self.numbers = range(0)
        """Those of the mini-batch at hand."""

    def begin(self, number: int) -> range:
        """Slice mini-batch `number`; the numbers of its micro-batches, different in the whole run."""
        drawn = self._source.mini_batch(number)
        assert isinstance(drawn, Drawn)
        first = number * self._most
        if self._most == 1:
            self._sliced = [drawn]
        else:
            self._sliced = list(micro_batches(drawn, self._prepare(drawn), self._module, self._most))
        self.numbers = range(first, first + len(self._sliced))
        return self.numbers

    def mini_batch(self, number: int) -> Drawn | None:
        """Micro-batch `number`, if it is of the mini-batch at hand."""
        return self._sliced[number - self.numbers.start] if number in self.numbers else None


def micro_batches(drawn: Drawn, prepared: Any, module: pl.LightningModule, most: int) -> list[MicroBatch]:
    """The slices of a mini-batch.

    Args:
        drawn: the mini-batch.
        prepared: what `training_step` would get.
        module: may have a `split_batch`.
        most: how many slices.

    Raises:
        MisconfigurationException: if it can't be told how to slice it, or `split_batch` returns none, or too many.
    """
    users_hook = getattr(module, HOOK, None)
    if users_hook is None:
        slices, sizes = sliced(prepared, most)
    else:
        with seeded(derived_seed(drawn.seed, HOOK)):
            slices = list(users_hook(prepared, most))
        if not 1 <= len(slices) <= most:
            raise MisconfigurationException(
                f"`{HOOK}` returned {len(slices)} micro-batches where num_microbatches={most}: return as many, or"
                " fewer for a batch that is too short, and at least one."
            )
        found = [samples_in(each) for each in slices]
        sizes = [1 if None in found else each or 0 for each in found]
    total = sum(sizes)
    return [
        MicroBatch(
            **{
                **vars(drawn),
                "number": drawn.number * most + place,
                "seed": derived_seed(drawn.seed, "micro-batch", place),
                "batch": part,
                # Never one of a mini-batch as its loader gave it.
                "signature": ("micro-batch", signature(part)),
                "prepared": [part],
                "weight": size / total if total else 1 / len(slices),
            }
        )
        for place, (part, size) in enumerate(zip(slices, sizes))
    ]
