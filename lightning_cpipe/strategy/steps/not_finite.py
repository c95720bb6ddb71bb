"""Tells which mini-batch had a loss that is not finite."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_cpipe.strategy.data.drawn import Drawn
from lightning_cpipe.strategy.loops import fetcher_of


class NotFinite:
    """Warns of the first one.

    Args:
        trainer: whose loop is at it.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._told = False

    def see(self, loss: float) -> None:
        """The loss of the mini-batch that the loop is at, as a number: nothing here waits for a device."""
        drawn = None if self._told or math.isfinite(loss) else fetcher_of(self._trainer).released
        if drawn is not None:
            self._told = True
            rank_zero_warn(
                f"{_of(drawn, loss)}, the first one that is not finite. Training goes on with its gradient."
                " `Trainer(detect_anomaly=True)` makes it an error, and `EarlyStopping(check_finite=True)` stops."
            )


def refuse_nan(drawn: Drawn, loss: Tensor) -> None:
    """Where anomalies are to be detected, a loss that is no number is one, whatever its gradient.

    Raises:
        RuntimeError: as torch does where a gradient is none.
    """
    if torch.is_anomaly_enabled() and bool(loss.isnan().any()):
        raise RuntimeError(f"{_of(drawn, float('nan'))}.")


def _of(drawn: Drawn, loss: float) -> str:
    return f"the loss of mini-batch {drawn.number} (batch_idx {drawn.index} of epoch {drawn.epoch}) is {loss}"
