"""Counts optimizer steps before they are made."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_cpipe.strategy.data.drawn import Drawn


class UpdateCount:
    """The optimizer steps that the mini-batches drawn so far will have taken.

    Args:
        trainer: whose limits and accumulation count.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self.planned = trainer.global_step
        """Optimizer steps once all that was counted is trained."""

    def count(self, drawn: Drawn) -> None:
        """Tell a mini-batch the steps that come before its own; it comes after all that were counted before."""
        drawn.updates_before = self.planned
        if drawn.is_last or (drawn.index + 1) % self._trainer.accumulate_grad_batches == 0:
            self.planned += 1

    @property
    def is_full(self) -> bool:
        """Whether what was counted is all that `max_steps` allows."""
        return 0 <= self._trainer.max_steps <= self.planned
