"""A forward that runs ahead reads `batch_idx`, `current_epoch` and `global_step` of its own mini-batch everywhere."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
from torch import Tensor

from tests.helpers.fits import fit_alone, fit_in_pipeline
from tests.helpers.modules import Chain, noise_loader

Time = tuple[float, int, int, int, int, int]


class Clock(Chain):
    """Notes at what time each mini-batch takes itself to be."""

    times: list[Time]

    def on_train_start(self) -> None:
        """What came before was the set-up's probe."""
        self.times = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if hasattr(self, "times"):
            trainer = self.trainer
            self.times.append(
                (
                    float(batch[0].sum()), batch_idx, self.current_epoch, trainer.current_epoch, self.global_step,
                    trainer.global_step,
                )
            )  # fmt: skip
        return super().training_step(batch, batch_idx)


class HookClock(pl.Callback):
    """Notes at what time the hooks take themselves to be, between steps that run ahead."""

    def __init__(self) -> None:
        self.times: list[tuple[int, int, int]] = []

    def note(self, trainer: pl.Trainer, *rest: Any) -> None:
        self.times.append((rest[-1], trainer.current_epoch, trainer.global_step))

    on_train_batch_start = on_train_batch_end = note


def times(trainer: pl.Trainer, module: Clock) -> Any:
    return module.times, next(each for each in trainer.callbacks if isinstance(each, HookClock)).times


@pytest.mark.parametrize("accumulate", [1, 3])
def test_steps_and_hooks_read_the_time_that_plain_lightning_would_read(accumulate: int) -> None:
    options = {
        "module": Clock,
        "train": partial(noise_loader, samples=15),
        "val": partial(noise_loader, samples=3),
        "callbacks": lambda: [HookClock()],
        "look": times,
        "max_epochs": 3,
        "accumulate_grad_batches": accumulate,
    }
    plain = fit_alone(**options).found
    assert len(plain[0]) == 15
    for of_rank in fit_in_pipeline(3, **options):
        assert of_rank.found == plain


class TransferClock(Clock):
    """Notes at what time each mini-batch is transferred."""

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        if hasattr(self, "times") and self.trainer.training:
            self.transfers.append((float(batch[0].sum()), self.current_epoch, self.global_step))
        return batch

    def on_train_start(self) -> None:
        super().on_train_start()
        self.transfers: list[tuple[float, int, int]] = []


def test_a_batch_is_transferred_at_its_own_time() -> None:
    """An augmentation that grows with `global_step` gave the first stage inputs that did not fit the last's labels."""
    options = {"module": TransferClock, "train": noise_loader, "look": lambda _, module: module.transfers}
    plain = fit_alone(**options, max_epochs=2).found
    assert len(plain) == 16
    for of_rank in fit_in_pipeline(3, **options, max_epochs=2):
        assert of_rank.found == plain
