"""What the stages tell each other beside the activations: the news that travel from the first stage to the last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from lightning_cpipe.engine.figures import Bookkeeper, StageFigures
from lightning_cpipe.engine.mini_batch import Mark, MiniBatch
from lightning_cpipe.engine.timeline import Timeline
from lightning_cpipe.tree import TemplateTable


class Record(NamedTuple):
    """What goes beside an activation.

    Attributes:
        mark: number and fingerprint of the mini-batch, as the sender's loader gave it.
        table: the shapes, where they are new; None where they are known.
        asked: what the stages before ask the last one for; flags of whoever asks.
        figures: what the stages before tell of themselves, by stage; empty most of the time.
    """

    mark: Mark
    table: TemplateTable | None
    asked: int
    figures: dict[int, tuple[Any, ...]]


class News:
    """What one stage tells of itself, and what it heard from those before.

    Args:
        stage: this one.
        timeline: of which it tells.
    """

    def __init__(self, stage: int, timeline: Timeline) -> None:
        self.figures: dict[int, StageFigures] = {}
        """What the stages before told of themselves last, by stage."""
        self.tells_figures: Callable[[int], bool] = lambda number: False
        """Whether the stages' figures are told with a mini-batch; all stages must tell them with the same ones."""
        self.asks: Callable[[], int] = lambda: 0
        """What this stage asks the last one for."""
        self.books = Bookkeeper(timeline)
        self._stage = stage
        self._asked_before = 0

    @property
    def asked(self) -> int:
        """What this stage, or one before it, asks the last one for."""
        return self._asked_before | self.asks()

    def hear(self, record: Record) -> None:
        """Take over what the stages before tell."""
        self._asked_before |= record.asked
        self.figures.update({stage: StageFigures(*told) for stage, told in record.figures.items()})

    def record(self, mini_batch: MiniBatch, table: TemplateTable | None) -> Record:
        """What the stage after learns with a mini-batch."""
        figures: dict[int, tuple[Any, ...]] = {}
        if self.tells_figures(mini_batch.number):
            known = {**self.figures, self._stage: self.books.figures()}
            figures = {stage: tuple(each) for stage, each in known.items()}
        return Record(mini_batch.mark, table, self.asked, figures)
