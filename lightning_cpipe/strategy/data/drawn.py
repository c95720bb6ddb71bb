"""A mini-batch that was drawn ahead of Lightning's loop, and what stands for it on its way through the loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_cpipe.engine.mini_batch import MiniBatch
from lightning_cpipe.stage.randomness import GeneratorState
from lightning_cpipe.strategy.data.data_place import EpochStart


@dataclass
class Drawn(MiniBatch):
    """A mini-batch that was drawn, with its place in Lightning's counting.

    Attributes:
        epoch: which it belongs to.
        index: its place in the epoch: Lightning's `batch_idx`.
        is_last: whether it ends the epoch.
        start: how its epoch began; None where nothing is kept of that.
        places: of those loaders that know theirs, after it was drawn.
        random: the state of the generators that loaders draw from, after it was drawn, if one knows its place.
        prepared: on the stage's device; made when it is first needed.
    """

    epoch: int = 0
    index: int = 0
    is_last: bool = False
    start: EpochStart | None = None
    places: list[Any] = field(default_factory=list)
    random: GeneratorState | None = None
    prepared: list[Any] = field(default_factory=list)


class Released:
    """Stands for a drawn mini-batch on its way through Lightning's loop, which would prepare it a second time."""

    def __init__(self, drawn: Drawn) -> None:
        self.drawn = drawn
