"""Learning-rate schedules step on every rank as in plain Lightning, and a plateau is what the last stage measured."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.optim import lr_scheduler

from tests.helpers.fits import Seen, fit_alone, fit_in_pipeline
from tests.helpers.modules import Chain, noise_loader

EPOCHS = 3


def every_step(optimizer: torch.optim.Optimizer, trainer: pl.Trainer) -> dict[str, Any]:
    return {"scheduler": lr_scheduler.StepLR(optimizer, 3, gamma=0.7), "interval": "step"}


def every_second_step(optimizer: torch.optim.Optimizer, trainer: pl.Trainer) -> dict[str, Any]:
    return {"scheduler": lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step", "frequency": 2}


def every_epoch(optimizer: torch.optim.Optimizer, trainer: pl.Trainer) -> dict[str, Any]:
    return {"scheduler": lr_scheduler.ExponentialLR(optimizer, 0.5), "interval": "epoch"}


def one_cycle(optimizer: torch.optim.Optimizer, trainer: pl.Trainer) -> dict[str, Any]:
    steps = int(trainer.estimated_stepping_batches)
    return {"scheduler": lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps), "interval": "step"}


def plateau_of_epochs(optimizer: torch.optim.Optimizer, trainer: pl.Trainer) -> dict[str, Any]:
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.3)
    return {"scheduler": scheduler, "monitor": "val_loss"}


def plateau_of_steps(optimizer: torch.optim.Optimizer, trainer: pl.Trainer) -> dict[str, Any]:
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    return {"scheduler": scheduler, "monitor": "loss_step", "interval": "step"}


class Scheduled(Chain):
    """A chain with a scheduler of the test's choice."""

    def __init__(self, schedule: Callable[[torch.optim.Optimizer, pl.Trainer], dict[str, Any]]) -> None:
        super().__init__()
        self.make = schedule

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": self.make(optimizer, self.trainer)}


class Rates(pl.Callback):
    """Notes the learning rate of each step, and the metric of each validation."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.validated: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.validated.append(float(trainer.callback_metrics["val_loss"]))


def found(trainer: pl.Trainer, _: pl.LightningModule) -> tuple[list[float], list[float]]:
    rates = next(each for each in trainer.callbacks if isinstance(each, Rates))
    # What the scheduler would use next counts too.
    return [*rates.rates, trainer.optimizers[0].param_groups[0]["lr"]], rates.validated


def options_of(schedule: Any) -> dict[str, Any]:
    return {
        "module": partial(Scheduled, schedule),
        "train": noise_loader,
        "val": noise_loader,
        "max_epochs": EPOCHS,
        "num_sanity_val_steps": 0,
        "callbacks": lambda: [Rates()],
        "look": found,
    }


def fit(p: int, schedule: Any) -> list[Seen]:
    return fit_in_pipeline(p, **options_of(schedule))


@pytest.mark.parametrize("schedule", [every_step, every_second_step, every_epoch, one_cycle])
def test_rates_are_plain_lightnings_on_every_rank(schedule: Any) -> None:
    plain = fit_alone(**options_of(schedule)).found[0]
    assert len(set(plain)) > 2
    for of_rank in fit(2, schedule):
        assert of_rank.found[0] == plain


@pytest.mark.parametrize("schedule", [plateau_of_epochs, plateau_of_steps])
def test_one_stage_sees_the_plateaus_of_plain_lightning(schedule: Any) -> None:
    plain = fit_alone(**options_of(schedule)).found
    assert len(set(plain[0])) > 1
    assert fit(1, schedule)[0].found == plain


@pytest.mark.parametrize(("schedule", "of_steps"), [(plateau_of_epochs, False), (plateau_of_steps, True)])
def test_a_plateau_lowers_the_rate_everywhere_by_what_the_last_stage_measured(schedule: Any, of_steps: bool) -> None:
    seen = fit(3, schedule)
    rates, validated = seen[0].found
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.05)
    scheduler = schedule(optimizer, None)["scheduler"]
    per_epoch = len(seen[0].losses) // EPOCHS
    expected = []
    for step, loss in enumerate(seen[0].losses):
        expected.append(optimizer.param_groups[0]["lr"])
        if of_steps:
            scheduler.step(loss)
        elif (step + 1) % per_epoch == 0:
            scheduler.step(validated[step // per_epoch])
    assert rates == [*expected, optimizer.param_groups[0]["lr"]]
    assert len(set(rates)) > 1
    for of_rank in seen[1:]:
        assert of_rank.found == seen[0].found
