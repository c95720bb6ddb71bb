"""Optimizers, clipping by value, accumulation, precision: without delay, plain Lightning's bits."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.fits import fit_alone, fit_in_pipeline, require_plain_results, require_same_bits
from tests.helpers.modules import Chain, noise_loader


@pytest.mark.parametrize(
    "optimizer", ["sgd", *(pytest.param(each, marks=pytest.mark.full) for each in ("plain_sgd", "adam")), "adamw"]
)
def test_optimizers(optimizer: str) -> None:
    require_plain_results(3, partial(Chain, optimizer=optimizer), noise_loader)


def test_clipping_by_value() -> None:
    clipped = {"gradient_clip_val": 1e-5, "gradient_clip_algorithm": "value"}
    seen = require_plain_results(3, Chain, noise_loader, **clipped)
    other = require_plain_results(3, Chain, noise_loader)
    assert not torch.equal(seen.weights["net.0.linear.weight"], other.weights["net.0.linear.weight"])


def test_detection_of_anomalies() -> None:
    require_plain_results(2, Chain, noise_loader, detect_anomaly=True)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision(precision: Any) -> None:
    seen = require_plain_results(2, Chain, noise_loader, val=noise_loader, precision=precision)
    dtype = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert {weight.dtype for weight in seen.weights.values()} == {dtype}


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_every_rank_knows_the_metrics_to_the_bit(precision: Any) -> None:
    first, second = fit_in_pipeline(2, Chain, noise_loader, noise_loader, max_epochs=2, precision=precision)
    assert first.metrics == second.metrics
    assert first.losses == second.losses


class TwoGroups(Chain):
    """Trains half of the blocks slowly, and the first one not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        slow, fast = self.net[1], self.net[2:]
        groups = [{"params": list(slow.parameters()), "lr": 0.001}, {"params": list(fast.parameters())}]
        return torch.optim.SGD(groups, 0.1, momentum=0.9)


def test_groups_of_parameters_and_frozen_ones() -> None:
    seen = require_plain_results(3, TwoGroups, noise_loader)
    start = dict(TwoGroups().named_parameters())
    moved = {name.split(".")[1] for name, weight in seen.weights.items() if not torch.equal(weight, start[name])}
    assert moved == {"1", "2", "3"}


def of_stage(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters that are on this stage; the module has those of others by name only."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class OwnStep(Chain):
    """Overrides what Lightning lets one override about a step of the optimizer."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        with torch.no_grad():
            for parameter in of_stage(optimizer):
                parameter.mul_(0.9)

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        nn.utils.clip_grad_value_(of_stage(optimizer), 1e-5)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)

    def on_after_backward(self) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)


def test_overridden_steps_of_the_optimizer() -> None:
    require_plain_results(3, OwnStep, noise_loader)


class Clamps(Chain):
    """Keeps its weights small, in a hook after each step or in the step of the optimizer."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        self.hook = hook

    def _clamp(self) -> None:
        with torch.no_grad():
            for parameter in of_stage(self.optimizers()):
                parameter.clamp_(-0.02, 0.02)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.hook == "on_train_batch_end":
            self._clamp()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.hook == "optimizer_step":
            self._clamp()


@pytest.mark.parametrize("hook", ["on_train_batch_end", "optimizer_step"])
def test_weights_may_be_clamped_after_each_update(hook: str) -> None:
    seen = fit_in_pipeline(3, partial(Clamps, hook), noise_loader, max_epochs=2)[0]
    assert max(float(weight.abs().max()) for weight in seen.weights.values()) <= 0.02
    assert len(seen.losses) == 16


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_one_stage_accumulates_as_plain_lightning(accumulate: int) -> None:
    options = {"max_epochs": 2, "accumulate_grad_batches": accumulate}
    ours = fit_in_pipeline(1, OwnStep, noise_loader, **options)[0]
    plain = fit_alone(OwnStep, noise_loader, **options)
    assert ours.losses == plain.losses
    require_same_bits(ours.weights, plain.weights)
