"""Validations inside `fit` come when plain Lightning has them, at the same step on every rank."""

from __future__ import annotations

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
