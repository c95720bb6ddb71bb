"""What the stages tell each other beside the activations: the news that travel from the first stage to the last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from lightning_cpipe.engine.figures import Bookkeeper, StageFigures
from lightning_cpipe.engine.mini_batch import MiniBatch
from lightning_cpipe.engine.timeline import Timeline
from lightning_cpipe.tree import TemplateTable


class Record(NamedTuple):
    """What goes beside an activation.

    Attributes:
        mark: number and fingerprint of the mini-batch, as the sender's loader gave it.
        table: the shapes, where they are new; None where they are known.
        hand_raised: whether a stage before wants training to stop.
        figures: what the stages before tell of themselves, by stage; empty most of the time.
    """

    mark: tuple[int, int]
    table: TemplateTable | None
    hand_raised: bool
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
        self.hand_raised: Callable[[], bool] = lambda: False
        """Whether this stage wants training to stop."""
        self.books = Bookkeeper(timeline)
        self._stage = stage
        self._hand_raised_before = False

    def is_hand_raised(self) -> bool:
        """Whether this stage, or one before it, wants training to stop."""
        return self._hand_raised_before or self.hand_raised()

    def hear(self, record: Record) -> None:
        """Take over what the stages before tell."""
        self._hand_raised_before |= record.hand_raised
        self.figures.update({stage: StageFigures(*told) for stage, told in record.figures.items()})

    def record(self, mini_batch: MiniBatch, table: TemplateTable | None) -> Record:
        """What the stage after learns with a mini-batch."""
        figures: dict[int, tuple[Any, ...]] = {}
        if self.tells_figures(mini_batch.number):
            known = {**self.figures, self._stage: self.books.figures()}
            figures = {stage: tuple(each) for stage, each in known.items()}
        return Record(mini_batch.mark, table, self.is_hand_raised(), figures)
