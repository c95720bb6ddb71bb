"""Writes numbers, tables and pictures to whatever loggers the Trainer has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger


def log_numbers(trainer: pl.Trainer, numbers: Mapping[str, float]) -> None:
    """Log at the trainer's current step; nothing where there is nothing to log."""
    for logger in trainer.loggers if numbers else ():
        logger.log_metrics(dict(numbers), step=trainer.global_step)


def declare(trainer: pl.Trainer, names: Iterable[str], summary: str = "last") -> None:
    """Tell W&B what the numbers are plotted over, and what stands in the run's summary.

    Exact names only: Lightning registers ``*`` first, and W&B ignores a later pattern.
    """
    for run in _wandb_runs(trainer.loggers):
        for name in names:
            run.define_metric(name, step_metric="trainer/global_step", summary=summary)


def log_table(trainer: pl.Trainer, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Log a table where the logger knows tables."""
    for run in _wandb_runs(trainer.loggers):
        import wandb

        run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})


def log_picture(trainer: pl.Trainer, name: str, path: Path) -> None:
    """Log a picture where the logger knows pictures."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(key=name, images=[str(path)])
        elif isinstance(logger, TensorBoardLogger):
            import matplotlib.image

            pixels = matplotlib.image.imread(path)
            logger.experiment.add_image(name, pixels, trainer.global_step, dataformats="HWC")


def folder_of(trainer: pl.Trainer) -> Path:
    """Where this run's files belong: the logger's folder, where `ModelCheckpoint` also puts its own."""
    if not trainer.loggers:
        return Path(trainer.default_root_dir)
    logger = trainer.loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version


def _wandb_runs(loggers: Iterable[Logger]) -> list[Any]:
    return [logger.experiment for logger in loggers if isinstance(logger, WandbLogger)]
