"""A hook that goes over the module's parameters acts on each stage's own, on each rank."""

from __future__ import annotations

import copy
import logging
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor

from tests.helpers.fits import fit_alone, fit_in_pipeline, require_same_bits
from tests.helpers.modules import Chain, noise_loader


class Handy(Chain):
    """Has a hook for everything that users do with all weights or gradients."""

    def __init__(self) -> None:
        super().__init__(schedule="step")

    def on_after_backward(self) -> None:
        for parameter in self.parameters():
            assert parameter.grad is not None
            parameter.grad.add_(parameter.detach(), alpha=0.01)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter in self.net.parameters():
            assert parameter.grad is not None
            parameter.grad.nan_to_num_()

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:  # type: ignore[override]
        for parameter in self.parameters():
            torch.nn.utils.clip_grad_norm_(parameter, 0.3)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        before = [parameter.detach().clone() for parameter in self.parameters()]
        super().optimizer_step(*args, **kwargs)
        for parameter, old in zip(self.parameters(), before, strict=True):
            parameter.data.lerp_(old, 0.1)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()

    def on_train_batch_end(self, *_: Any) -> None:
        for parameter in self.parameters():
            parameter.data.clamp_(-0.3, 0.3)


class OwnAverage(pl.Callback):
    """An average as users write it."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.copy = copy.deepcopy(pl_module)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        for average, parameter in zip(self.copy.parameters(), pl_module.parameters(), strict=True):
            average.lerp_(parameter, 0.2)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with torch.no_grad():
            for average, parameter in zip(self.copy.parameters(), pl_module.parameters(), strict=True):
                parameter.copy_(average)


@pytest.mark.parametrize("p", [pytest.param(2, marks=pytest.mark.full), 3])
def test_what_hooks_do_with_all_weights_is_done_by_all_stages(p: int) -> None:
    options: dict[str, Any] = {"max_epochs": 2, "callbacks": lambda: [OwnAverage()]}
    plain = fit_alone(Handy, noise_loader, **options)
    seen = fit_in_pipeline(p, Handy, noise_loader, strategy={"schedule": "gpipe"}, **options)
    assert seen[0].losses == plain.losses
    require_same_bits(seen[0].weights, plain.weights)


def test_they_act_on_the_newest_version_in_the_stream() -> None:
    """What is in flight keeps the version that it used; on the clamped one the next mini-batches are forwarded."""
    largest: list[list[float]] = []

    def note(trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        largest[-1].append(max(float(each.detach().abs().max()) for each in pl_module.parameters()))

    def callbacks() -> list[pl.Callback]:
        largest.append([])
        return [LambdaCallback(on_train_batch_start=note)]

    seen = fit_in_pipeline(3, Handy, noise_loader, max_epochs=2, callbacks=callbacks, look=lambda *_: largest[-1])
    for rank in seen:
        assert len(rank.found) == 16
        assert rank.found[0] > 0.3
        assert max(rank.found[1:]) == pytest.approx(0.3)
    assert [each.losses for each in seen[1:]] == 2 * [seen[0].losses]


class Looks(Chain):
    """Counts its weights in the step, which runs inside a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.counts.append(len(list(self.parameters())))
        return super().training_step(batch, batch_idx)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.in_hook = len(list(self.parameters()))
        super().optimizer_step(*args, **kwargs)


def test_a_step_sees_all_names() -> None:
    """A sum over a part would be wrong there, and nothing would say so."""
    look = {"look": lambda _, module: (set(module.counts), module.in_hook)}
    assert [each.found for each in fit_in_pipeline(2, Looks, noise_loader, max_epochs=1, **look)] == 2 * [({16}, 8)]


class Hears(logging.Handler):
    """Keeps what Lightning's `rank_zero_info` says."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        logging.getLogger("lightning.pytorch.utilities.rank_zero").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def test_it_is_said_once_that_a_hook_sees_a_part() -> None:
    heard: list[Hears] = []

    def callbacks() -> list[pl.Callback]:
        heard.append(Hears())
        return [OwnAverage()]

    look = lambda *_: [each.split(" goes")[0] for each in heard[-1].messages if "goes over" in each]  # noqa: E731
    seen = fit_in_pipeline(2, Handy, noise_loader, max_epochs=1, callbacks=callbacks, look=look)
    assert "Handy.on_after_backward" in seen[0].found
    assert "OwnAverage.on_train_batch_end" in seen[0].found
    assert len(seen[0].found) == len(set(seen[0].found))
    assert seen[1].found == []
