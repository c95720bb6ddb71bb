"""With one stage there is nothing to cut: whatever plain Lightning trains, the strategy trains the same way."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.fits import fit_alone, fit_in_pipeline, require_same_bits
from tests.helpers.modules import WIDTH, Chain, noise_loader


class OneLayer(Chain):
    """Has no chain of blocks at all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Linear(WIDTH, WIDTH)


class Twice(Chain):
    """Calls every block twice in a step."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.net(x))


class Skips(Chain):
    """Skips some mini-batches."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        return None if batch_idx == 3 else super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    "module",
    [
        OneLayer,
        Twice,
        Skips,
        partial(Chain, dropout=0.0, optimizer="adam"),
    ],
    ids=["one layer", "blocks called twice", "a step that skips", "adam"],
)
def test_one_stage_trains_what_plain_lightning_trains(module: Any) -> None:
    options = {"val": noise_loader, "max_epochs": 2, "callbacks": list}
    ours = fit_in_pipeline(1, module, partial(noise_loader, shuffle=True), **options)[0]
    plain = fit_alone(module, partial(noise_loader, shuffle=True), **options)
    assert ours.losses == plain.losses
    assert ours.metrics == plain.metrics
    require_same_bits(ours.weights, plain.weights)


class EndsItsEpochs(Chain):
    """Ends each epoch after five batches."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 5 else None


def test_one_stage_may_end_its_epochs() -> None:
    """The mini-batch that was left out was missing in the plan."""
    ours = fit_in_pipeline(1, EndsItsEpochs, noise_loader, max_epochs=3)[0]
    plain = fit_alone(EndsItsEpochs, noise_loader, max_epochs=3)
    assert len(plain.losses) == 15
    assert ours.losses == plain.losses
    require_same_bits(ours.weights, plain.weights)
