"""What the steps and hooks log is what plain Lightning makes of it, and every rank knows it when its hooks run."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError

from tests.helpers.fits import Seen, fit_alone, fit_in_pipeline
from tests.helpers.modules import Chain, noise_loader


class Logging(Chain):
    """Logs in every way that Lightning offers."""

    def __init__(self) -> None:
        super().__init__()
        self.train_error = MeanAbsoluteError()
        self.val_errors = MetricCollection([MeanAbsoluteError(), MeanSquaredError()], prefix="val_")
        self.by_hand = MeanMetric()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Any]:
        out = self(batch[0])
        loss = torch.nn.functional.mse_loss(out, batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True, sync_dist=True)
        self.log_dict({"of_step": loss * 2, "batch_idx": float(batch_idx)})
        self.log("most", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("weighted", loss, on_step=False, on_epoch=True, batch_size=1 + batch_idx)
        self.log("only_here", loss, rank_zero_only=True)
        self.train_error(out, batch[1])
        self.log("error", self.train_error, on_step=True, on_epoch=True)
        return {"loss": loss, "extra": out.detach().sum()}

    def on_train_epoch_end(self) -> None:
        self.log("of_epoch", float(self.current_epoch + 1))

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        out = self(batch[0])
        loss = torch.nn.functional.mse_loss(out, batch[1])
        self.log("val_loss", loss, on_step=True, on_epoch=True)
        self.val_errors.update(out, batch[1])
        self.log_dict(self.val_errors)
        self.by_hand.update(loss)
        return loss

    def on_validation_epoch_end(self) -> None:
        self.log("val_by_hand", self.by_hand.compute())
        self.by_hand.reset()


class Reader(pl.Callback):
    """Notes what it can read in its hooks, and logs by itself."""

    def __init__(self) -> None:
        self.read: list[tuple[str, dict[str, float]]] = []

    def note(self, hook: str, trainer: pl.Trainer) -> None:
        logged = {f"logged {name}": value for name, value in trainer.logged_metrics.items()}
        self.read.append((hook, {k: float(v) for k, v in {**trainer.callback_metrics, **logged}.items()}))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pl_module.log("from_callback", float(batch_idx))
        self.note("on_train_batch_end", trainer)

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.note("on_validation_end", trainer)

    def on_validation_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.note("on_validation_epoch_end", trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.note("on_train_epoch_end", trainer)

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.note("on_train_end", trainer)


def read(trainer: pl.Trainer, _: pl.LightningModule) -> list[tuple[str, dict[str, float]]]:
    return next(each for each in trainer.callbacks if isinstance(each, Reader)).read


def callbacks() -> list[pl.Callback]:
    # It needs to know what `on_train_epoch_end` logs, at once and on every rank.
    return [Reader(), EarlyStopping("of_epoch", mode="max", patience=9, check_on_train_epoch_end=True)]


OPTIONS = {
    "module": Logging,
    "train": noise_loader,
    "val": partial(noise_loader, samples=7, seed=6),
    "max_epochs": 2,
    "val_check_interval": 4,
    "callbacks": callbacks,
    "look": read,
}


def fit(p: int) -> list[Seen]:
    return fit_in_pipeline(p, **OPTIONS)


def test_one_stage_reads_at_every_moment_what_plain_lightning_reads() -> None:
    plain = fit_alone(**OPTIONS)
    ours = fit(1)[0]
    assert ours.found == plain.found
    assert ours.metrics == plain.metrics


@pytest.mark.parametrize("p", [2, 3])
def test_every_rank_reads_at_every_moment_what_the_last_stage_reads(p: int) -> None:
    first, *others = fit(p)
    metrics = first.metrics
    expected = {
        "loss", "loss_step", "loss_epoch", "of_step", "batch_idx", "most", "weighted", "only_here", "error",
        "error_step", "error_epoch", "of_epoch", "val_loss", "val_loss_epoch", "val_by_hand",
        "val_MeanAbsoluteError", "val_MeanSquaredError", "from_callback",
    }  # fmt: skip
    assert expected <= metrics.keys()
    for of_rank in others:
        assert of_rank.metrics == metrics
        for (hook, there), (same, here) in zip(of_rank.found, first.found, strict=True):
            assert (hook, there) == (same, here)


def test_the_numbers_are_those_of_the_steps() -> None:
    seen = fit(2)[0]
    metrics, losses = seen.metrics, torch.tensor(seen.losses[len(seen.losses) // 2 :])
    sizes = torch.tensor([3.0] * 7 + [1.0])
    assert metrics["loss_step"] == seen.losses[-1]
    assert metrics["loss_epoch"] == pytest.approx(float((losses * sizes).sum() / sizes.sum()))
    assert metrics["of_step"] == 2 * seen.losses[-1]
    assert metrics["batch_idx"] == len(losses) - 1
    assert metrics["most"] == float(losses.max())
    weights = torch.arange(1.0, len(losses) + 1)
    assert metrics["weighted"] == pytest.approx(float((losses * weights).sum() / weights.sum()))
    assert metrics["of_epoch"] == 2.0
    assert metrics["val_MeanSquaredError"] == pytest.approx(metrics["val_loss_epoch"])
