"""Loggers get from rank 0, and from it alone, what they would get from plain Lightning."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import Tensor

from tests.helpers.fits import Seen, fit_alone, fit_in_pipeline
from tests.helpers.modules import Chain, noise_loader

LOSSES = ("loss", "val_loss")


class Speaking(Chain):
    """Has hyperparameters, and gives its loggers more than numbers to log."""

    def __init__(self) -> None:
        super().__init__(schedule="step")
        self.save_hyperparameters({"depth": 4})

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if isinstance(self.logger, TensorBoardLogger):
            # Only the last stage comes to this line, and on rank 0 there is something to write to.
            self.logger.experiment.add_text("words", f"batch {batch_idx}", self.global_step)
        return loss


def fit(p: int, make: Any, **options: Any) -> list[Seen]:
    """Fit with a logger; p = 0 is plain Lightning."""
    settings = {
        "module": Speaking,
        "train": noise_loader,
        "val": noise_loader,
        "max_epochs": 2,
        "log_every_n_steps": 2,
        "callbacks": lambda: [LearningRateMonitor("step")],
        "logger": make,
        **options,
    }
    return fit_in_pipeline(p, **settings) if p else [fit_alone(**settings)]


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def cells(rows: list[dict[str, str]]) -> list[tuple[str, str, str]]:
    """Every cell with something in it, by step and column."""
    return [(row["step"], name, value) for row in rows for name, value in row.items() if value]


def test_one_stage_writes_plain_lightnings_csv(tmp_path: Path) -> None:
    fit(0, CSVLogger("plain"))
    fit(1, CSVLogger("one"))
    for file in ("metrics.csv", "hparams.yaml"):
        plain, one = (tmp_path / run / "lightning_logs" / "version_0" / file for run in ("plain", "one"))
        assert plain.read_text() == one.read_text()


def logged_steps(accumulate: int) -> list[int]:
    """Which of 2 x 8 mini-batches are logged, if every second one is that ends an optimizer step."""
    ends = [i for i in range(8) if (i + 1) % accumulate == 0 or i == 7]
    return [epoch * 8 + i for epoch in range(2) for i in ends if (epoch * len(ends) + ends.index(i) + 1) % 2 == 0]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_csv_holds_the_values_that_were_seen_at_the_steps_of_plain_lightning(
    tmp_path: Path, accumulate: int
) -> None:
    fit(0, CSVLogger("plain"), accumulate_grad_batches=accumulate)
    seen = fit(3, CSVLogger("three"), accumulate_grad_batches=accumulate)[0]
    assert [path.name for path in (tmp_path / "three" / "lightning_logs").iterdir()] == ["version_0"]
    plain, ours = (rows_of(tmp_path / run / "lightning_logs" / "version_0") for run in ("plain", "three"))
    # All is as it is there, but for the losses, which the delay changes.
    columns = {name for name in ours[0] if name.startswith(LOSSES)}
    assert {"loss_step", "loss_epoch", "val_loss"} <= columns
    assert [cell[:2] for cell in cells(ours)] == [cell[:2] for cell in cells(plain)]
    assert [cell for cell in cells(ours) if cell[1] not in columns] == [
        cell for cell in cells(plain) if cell[1] not in columns
    ]
    assert {cell[1] for cell in cells(ours)} > {"lr-SGD", "epoch"}
    logged = [float(row["loss_step"]) for row in ours if row["loss_step"]]
    assert logged == pytest.approx([seen.losses[i] for i in logged_steps(accumulate)])
    assert float(ours[-1]["loss_epoch"] or ours[-2]["loss_epoch"]) == seen.metrics["loss_epoch"]


def test_tensorboard_is_written_by_rank_0_alone(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = fit(3, TensorBoardLogger("three", log_graph=True))[0]
    folder = tmp_path / "three" / "lightning_logs" / "version_0"
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1
    events = EventAccumulator(str(folder))
    events.Reload()
    scalars = {name: [(each.step, each.value) for each in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert scalars["loss_step"] == [(step, pytest.approx(seen.losses[step])) for step in range(1, 16, 2)]
    assert [step for step, _ in scalars["val_loss"]] == [7, 15]
    assert scalars["val_loss"][-1][1] == pytest.approx(seen.metrics["val_loss"])
    assert [step for step, _ in scalars["lr-SGD"]] == list(range(1, 16, 2))
    assert len(events.Tensors("words/text_summary")) > 0


class Rank(Logger):
    """Fails where somebody else than rank 0 writes."""

    name = "rank"
    version = 0

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    @pl.utilities.rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.steps.append(-1 if step is None else step)


def steps(trainer: pl.Trainer, _: pl.LightningModule) -> tuple[int, list[list[int]]]:
    return len(trainer.loggers), [each.steps for each in trainer.loggers if isinstance(each, Rank)]


def test_several_loggers_at_once() -> None:
    loggers = [CSVLogger("csv"), TensorBoardLogger("tb"), Rank()]
    seen = fit(2, loggers, look=steps)
    plain = fit(0, [CSVLogger("csv"), TensorBoardLogger("tb"), Rank()], look=steps)
    assert seen[0].found == plain[0].found
    assert seen[1].found == (3, [[]])
