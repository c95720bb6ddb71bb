"""Steps that need what a run makes before them: attributes from the first hooks, optimizers, metrics made late."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from lightning_cpipe import ContinuousPipeStrategy, assert_pipeline_parity
from tests.helpers.causes import cause
from tests.helpers.fits import (
    alone,
    fit_alone,
    fit_in_pipeline,
    in_pipeline,
    quiet_trainer,
    require_plain_results,
    require_same_bits,
)
from tests.helpers.modules import WIDTH, Chain, noise_loader


class BeginsInHooks(Chain):
    """Its hooks make what its steps use, as in many examples of Lightning's."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [MeanMetric()]

    def on_train_start(self) -> None:
        self.scale = torch.tensor(2.0)

    def on_train_epoch_start(self) -> None:
        self.log("begun", 1.0)
        self.losses: list[Tensor] = []
        self.child = MeanMetric()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.factor = float(len(batch))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.scale * self.factor * self.loss(batch)
        self.losses.append(loss.detach())
        self.child.update(loss.detach())
        self.log("lr", self.optimizers().param_groups[0]["lr"])
        self.trainer.strategy.barrier()
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("mean", torch.stack(self.losses).mean())
        self.log("child", self.child.compute())

    def on_validation_epoch_start(self) -> None:
        self.late = MeanMetric()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        loss = self.loss(batch)
        self.late.update(loss)
        self.hidden[0].update(loss)

    def on_validation_epoch_end(self) -> None:
        """Metrics that hang where no search finds them once waited here for all ranks, which do not come."""
        self.log("val_late", self.late.compute())
        self.log("val_hidden", self.hidden[0].compute())
        self.hidden[0].reset()


@pytest.mark.parametrize("p", [2, pytest.param(3, marks=pytest.mark.full)])
def test_steps_may_use_what_the_hooks_before_them_make(p: int) -> None:
    """They are tried at set-up, before any hook, and once failed there for want of an attribute."""
    seen = require_plain_results(p, BeginsInHooks, noise_loader, val=noise_loader)
    assert {"begun", "lr", "mean", "child", "val_late", "val_hidden"} <= seen.metrics.keys()


def test_with_a_flush_too_through_epochs() -> None:
    options = {"module": BeginsInHooks, "train": noise_loader, "val": noise_loader, "max_epochs": 2}
    seen = fit_in_pipeline(2, strategy={"schedule": "gpipe"}, **options)[0]
    plain = fit_alone(**options)
    assert (seen.losses, seen.metrics) == (plain.losses, plain.metrics)
    require_same_bits(seen.weights, plain.weights)


def fit_and_validate(**options: Any) -> list[int]:
    module = BeginsInHooks()
    trainer = quiet_trainer(max_epochs=1, **options)
    trainer.fit(module, noise_loader(), noise_loader())
    trainer.validate(module, noise_loader(), verbose=False)
    return [len(trainer.optimizers), len(trainer.lr_scheduler_configs)]


def test_a_validation_leaves_the_optimizers_of_the_fit_before() -> None:
    assert in_pipeline(2, fit_and_validate) == 2 * [alone(fit_and_validate)]


def test_parity_can_be_asked_of_them() -> None:
    assert_pipeline_parity(BeginsInHooks(), (torch.randn(3, WIDTH), torch.randn(3, WIDTH)), 2)


class WritesWeights(BeginsInHooks):
    def on_fit_start(self) -> None:
        with torch.no_grad():
            self.net[0].linear.weight.zero_()


def test_weights_that_would_be_written_twice_are_refused() -> None:
    said = cause(2, WritesWeights())
    assert "a hook before `training_step` (on_fit_start, on_train_start, on_train_epoch_start) writes the param" in said


def test_a_set_up_that_fails_leaves_no_patch() -> None:
    """Metrics of any later run in this process would not have been computed over its ranks."""
    of_metrics, of_modules = Metric.sync, nn.Module.named_parameters
    trainer = quiet_trainer(strategy=ContinuousPipeStrategy(num_stages=2), devices=1, max_epochs=1)
    with (
        mock.patch.dict(os.environ),
        mock.patch("lightning_cpipe.strategy.strategy.show_stages", side_effect=ValueError("here")),
        pytest.raises(ValueError, match="here"),
    ):
        trainer.fit(Chain(), noise_loader())
    assert (Metric.sync, nn.Module.named_parameters) == (of_metrics, of_modules)


class NeverBegins(Chain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch) * self.nowhere


def test_an_attribute_that_nobody_makes_is_told_of() -> None:
    assert "no attribute 'nowhere'" in cause(2, NeverBegins())
