"""Limits of the Trainer end training and evaluation where plain Lightning does, and nothing is forwarded in vain."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_cpipe.engine.timeline import BACKWARD, FORWARD
from tests.helpers.fits import fit_alone, fit_in_pipeline
from tests.helpers.modules import Chain, noise_loader

LIMITS: dict[str, dict[str, Any]] = {
    "max_epochs": {"max_epochs": 2},
    "no epoch": {"max_epochs": 0},
    "max_steps": {"max_steps": 11},
    "max_steps first": {"max_steps": 5, "max_epochs": 4},
    "max_epochs first": {"max_steps": 50, "max_epochs": 2},
    "max_steps with accumulation": {"max_steps": 5, "accumulate_grad_batches": 3},
    # The factor is 1 when the first mini-batch is drawn, for the set-up.
    "max_steps with accumulation by schedule": {
        "max_steps": 7,
        "max_epochs": -1,
        "also": lambda: GradientAccumulationScheduler({0: 2, 1: 3}),
    },
    "min_steps": {"max_time": timedelta(microseconds=1), "min_steps": 3, "max_epochs": 2},
    "min_epochs": {"max_time": timedelta(microseconds=1), "min_epochs": 2, "max_epochs": 3},
    "max_time": {"max_time": timedelta(microseconds=1), "max_epochs": 2},
    "limit batches": {"limit_train_batches": 3, "limit_val_batches": 2, "max_epochs": 2},
    "limit shares": {"limit_train_batches": 0.5, "limit_val_batches": 0.4, "max_epochs": 2},
    "no validation": {"limit_val_batches": 0, "max_epochs": 2},
    "fast_dev_run": {"fast_dev_run": True},
    "fast_dev_run of 3": {"fast_dev_run": 3},
    "overfit 2": {"overfit_batches": 2, "max_epochs": 2},
    "overfit a share": {"overfit_batches": 0.3, "max_epochs": 2},
}

REPEATS = {"max_steps first", "max_epochs first", "min_epochs", "limit shares", "fast_dev_run of 3", "overfit a share"}
"""What they limit is limited by another one, too."""

IN_VAIN = {"max_time", "min_steps", "min_epochs"}
"""Nobody knows before where these end."""


class Counts(pl.Callback):
    """Counts hooks."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def on_train_batch_start(self, *_: Any) -> None:
        self.counts["train batches"] += 1

    def on_train_epoch_end(self, *_: Any) -> None:
        self.counts["epochs"] += 1

    def on_validation_batch_start(self, *_: Any) -> None:
        self.counts["validation batches"] += 1

    def on_validation_start(self, *_: Any) -> None:
        self.counts["validations"] += 1


def counted(trainer: pl.Trainer, _: pl.LightningModule) -> dict[str, Any]:
    counts = next(each for each in trainer.callbacks if isinstance(each, Counts)).counts
    return {
        **counts,
        "global_step": trainer.global_step,
        "current_epoch": trainer.current_epoch,
        "should_stop": trainer.should_stop,
        "state": str(trainer.state.status),
    }


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if name in REPEATS else ()) for name in LIMITS]
)
def test_a_limit_ends_training_where_plain_lightning_ends_it(name: str) -> None:
    limits = dict(LIMITS[name])
    also = limits.pop("also", None)
    options = {
        "module": Chain,
        "train": noise_loader,
        "val": partial(noise_loader, samples=15),
        "callbacks": lambda: [Counts(), also()] if also else [Counts()],
        "look": counted,
        **limits,
    }
    plain = fit_alone(**options)
    for of_rank in fit_in_pipeline(2, **options):
        assert of_rank.found == plain.found
        assert of_rank.losses[:1] == plain.losses[:1]
        kinds = Counter(kind for kind, _ in of_rank.spans)
        assert kinds[BACKWARD] == len(plain.losses)
        if name not in IN_VAIN:
            assert kinds[FORWARD] == kinds[BACKWARD]


@pytest.mark.parametrize("changes", [False, True])
def test_a_factor_that_changes_with_the_epoch_refills_the_pipeline(changes: bool) -> None:
    """What is forwarded before the epoch ends would be given to updates by the old factor."""
    callbacks = [GradientAccumulationScheduler({0: 2, 1: 1})] if changes else []
    seen = fit_in_pipeline(2, Chain, noise_loader, max_epochs=2, callbacks=lambda: callbacks)[1]
    length = len(noise_loader())
    assert (seen.spans.index((BACKWARD, length - 1)) < seen.spans.index((FORWARD, length))) == changes
