"""The micro-batches of the mini-batch that the training loop is at: what a flush schedule's plan is about.

They are slices of the mini-batch as `training_step` would get it. Each counts in the update by its share of the
samples, or for what `loss_weights` says, so that the update is that of the whole mini-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_cpipe.engine.mini_batch import Source
from lightning_cpipe.stage.randomness import derived_seed, seeded
from lightning_cpipe.strategy.data.drawn import Drawn
from lightning_cpipe.strategy.data.loss_weights import HOOK as WEIGHTS
from lightning_cpipe.strategy.data.loss_weights import loss_weights
from lightning_cpipe.strategy.data.samples import samples_in
from lightning_cpipe.strategy.data.slicing import sliced
from lightning_cpipe.tree import signature

HOOK = "split_batch"
"""The method of a LightningModule that slices a batch its own way."""


@dataclass
class MicroBatch(Drawn):
    """A slice of a mini-batch, in the mini-batch's place.

    Attributes:
        weight: what its loss counts for in that of the mini-batch; at 0, nothing of it counts.
        samples: for how many samples it counts in an epoch's means; None for those that are in it.
    """

    weight: float = 1.0
    samples: float | None = None


class MicroBatches:
    """Slices the mini-batches that the loop comes to, one after the other.

    Args:
        source: has the mini-batches.
        module: may have a `split_batch`.
        most: how many slices a mini-batch has, at most.
        prepare: makes of a mini-batch what `training_step` gets.
        weighs: whether it matters here what each slice counts for.
    """

    def __init__(
        self,
        source: Source,
        module: pl.LightningModule,
        most: int,
        prepare: Callable[[Drawn], Any],
        *,
        weighs: bool = True,
    ) -> None:
        self._source = source
        self._module = module
        self._most = most
        self._prepare = prepare
        self._weighs = weighs
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
            self._sliced = [*micro_batches(drawn, self._prepare(drawn), self._module, self._most, weighs=self._weighs)]
        self.numbers = range(first, first + len(self._sliced))
        return self.numbers

    def mini_batch(self, number: int) -> Drawn | None:
        """Micro-batch `number`, if it is of the mini-batch at hand."""
        return self._sliced[number - self.numbers.start] if number in self.numbers else None


def micro_batches(
    drawn: Drawn, prepared: Any, module: pl.LightningModule, most: int, *, weighs: bool = True
) -> list[MicroBatch]:
    """The slices of a mini-batch.

    Args:
        drawn: the mini-batch.
        prepared: what `training_step` would get.
        module: may have a `split_batch` and a `loss_weights`.
        most: how many slices.
        weighs: whether to ask what each counts for; only who has the losses needs to know.

    Raises:
        MisconfigurationException: if it can't be told how to slice it, or `split_batch` returns none, or too many, or
            `loss_weights` something else than a weight for each.
    """
    users_hook = getattr(module, HOOK, None)
    if users_hook is None:
        slices, sizes = sliced(prepared, most)
    else:
        with seeded(derived_seed(drawn.seed, HOOK)):
            returned = users_hook(prepared, most)
        if not isinstance(returned, Iterable) or isinstance(returned, (Tensor, Mapping, str, bytes)):
            raise MisconfigurationException(
                f"`{HOOK}` returned {type(returned).__name__} where num_microbatches={most}: return a list of the"
                " micro-batches, as many, or fewer for a batch that is too short."
            )
        slices = list(returned)
        if not 1 <= len(slices) <= most:
            raise MisconfigurationException(
                f"`{HOOK}` returned {len(slices)} micro-batches where num_microbatches={most}: return as many, or"
                " fewer for a batch that is too short, and at least one."
            )
        found = [samples_in(each) for each in slices]
        sizes = [1 if None in found else each or 0 for each in found]
    weights, total, samples = [1.0] * len(slices), 1.0, None
    if weighs:
        with seeded(derived_seed(drawn.seed, WEIGHTS)):
            weights = loss_weights(module, slices, sizes)
        if hasattr(module, WEIGHTS):
            total, samples = sum(weights), samples_in(prepared) or 1
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
                "has_record": place == 0,
                "weight": weight,
                "samples": samples * weight / total if samples and total else None,
            }
        )
        for place, (part, weight) in enumerate(zip(slices, weights))
    ]
