"""The progress bar and `self.print` speak once, on rank 0, and show what the last stage logged."""

from __future__ import annotations

import re
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor

from tests.helpers.fits import fit_in_pipeline
from tests.helpers.modules import Chain, noise_loader


class Loud(Chain):
    """Says when an epoch ends."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True)

    def on_train_epoch_end(self) -> None:
        self.print(f"epoch {self.current_epoch} ends")


class Bar(TQDMProgressBar):
    """Keeps the numbers that it shows."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=1)
        self.shown: list[dict[str, Any]] = []

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        found = super().get_metrics(trainer, pl_module)
        self.shown.append(dict(found))
        return found


def shown(trainer: pl.Trainer, _: pl.LightningModule) -> tuple[list[dict[str, Any]], bool]:
    bar = trainer.progress_bar_callback
    assert isinstance(bar, Bar)
    return bar.shown, bar.is_disabled


@pytest.mark.parametrize("p", [1, 3])
def test_the_bar_shows_the_metrics_on_rank_0_alone(p: int, capfd: pytest.CaptureFixture[str]) -> None:
    first, *others = fit_in_pipeline(
        p,
        Loud,
        noise_loader,
        noise_loader,
        max_epochs=2,
        enable_progress_bar=True,
        callbacks=lambda: [Bar()],
        look=shown,
    )
    numbers, disabled = first.found
    assert not disabled
    assert [each["loss_step"] for each in numbers if each.keys() == {"loss_step"}] == first.losses[:8]
    assert numbers[-1]["loss_epoch"] == pytest.approx(first.metrics["loss_epoch"], rel=1e-2)
    assert numbers[-1]["val_loss"] == pytest.approx(first.metrics["val_loss"], rel=1e-2)
    for of_rank in others:
        assert not any(of_rank.found[0])
        assert of_rank.found[1]
    printed = capfd.readouterr()
    text = printed.out + printed.err
    assert text.count("epoch 0 ends") == text.count("epoch 1 ends") == 1
    assert re.search(r"Epoch 1: 100%.*8/8.*loss_step=.*val_loss=.*loss_epoch=", text)
