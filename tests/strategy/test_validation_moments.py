"""Validations inside `fit` come when plain Lightning has them, at the same step on every rank."""

from __future__ import annotations

import math
from datetime import timedelta
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest

from tests.helpers.fits import fit_alone, fit_in_pipeline
from tests.helpers.modules import Chain, noise_loader

MOMENTS: dict[str, dict[str, Any]] = {
    "every epoch": {},
    "no sanity check": {"num_sanity_val_steps": 0},
    "the whole as a sanity check": {"num_sanity_val_steps": -1},
    "every second epoch": {"check_val_every_n_epoch": 2},
    "every 3 steps": {"val_check_interval": 3},
    "every third of an epoch": {"val_check_interval": 0.34},
    "every 5 steps across epochs": {"val_check_interval": 5, "check_val_every_n_epoch": None},
    "with accumulation": {"val_check_interval": 3, "accumulate_grad_batches": 2},
}


class Moments(pl.Callback):
    """Notes when validations run, and on what."""

    def __init__(self) -> None:
        self.moments: list[Any] = []

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.moments.append(("start", trainer.global_step, trainer.current_epoch, trainer.sanity_checking))

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        assert not pl_module.training
        self.moments.append((batch_idx, float(batch[0].sum())))

    def on_train_batch_start(self, trainer: Any, pl_module: pl.LightningModule, *_: Any) -> None:
        assert pl_module.training


def moments(trainer: pl.Trainer, _: pl.LightningModule) -> list[Any]:
    return next(each for each in trainer.callbacks if isinstance(each, Moments)).moments


REPEATS = {"the whole as a sanity check", "every third of an epoch"}
"""Their moments are those of another number."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if name in REPEATS else ()) for name in MOMENTS]
)
def test_validations_come_when_plain_lightning_has_them(name: str) -> None:
    options = {
        "module": Chain,
        "train": noise_loader,
        "val": partial(noise_loader, samples=7),
        "max_epochs": 2,
        "callbacks": lambda: [Moments()],
        "look": moments,
        **MOMENTS[name],
    }
    plain = fit_alone(**options).found
    assert plain
    for of_rank in fit_in_pipeline(2, **options):
        assert of_rank.found == plain


class Late(Moments):
    """The clock of rank 0 says that a validation is due after these steps; those of the others say other things."""

    AFTER = (3, 4, 6)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        due = trainer.global_step in self.AFTER if trainer.is_global_zero else trainer.global_step % 2
        trainer._last_val_time = -math.inf if due else math.inf


@pytest.mark.parametrize("p", [1, 2])
def test_a_timed_validation_comes_when_it_is_time_on_rank_0(p: int) -> None:
    """Each rank looked at its own clock, and those that validated waited for the others."""
    options = {
        "max_epochs": 1,
        "val_check_interval": timedelta(hours=1),
        "callbacks": lambda: [Late()],
        "look": moments,
    }
    plain = fit_alone(Chain, noise_loader, partial(noise_loader, samples=7), **options).found
    assert [moment[1] for moment in plain if moment[0] == "start"] == [0, *Late.AFTER]
    for of_rank in fit_in_pipeline(p, Chain, noise_loader, partial(noise_loader, samples=7), **options):
        assert of_rank.found == plain
