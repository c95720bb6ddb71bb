"""Runs ``cpipe`` on every rank of a pipeline, forked from this process, which has imported everything already."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl

# Imported when they are first needed: forked ranks would each do so.
import matplotlib.pyplot as _plots  # noqa: F401
import sklearn.datasets as _datasets  # noqa: F401
import wandb as _wandb  # noqa: F401

from lightning_cpipe.cli import lightning as _  # noqa: F401
from lightning_cpipe.cli.main import main
from tests.helpers.ranks import run_ranks

ROOT = Path(__file__).parents[2]

SMALL = (
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=4",
    "--trainer.limit_val_batches=2",
    "--trainer.enable_progress_bar=false",
)
"""A fit of four steps."""


class Finished(NamedTuple):
    """How a rank's command ended.

    Attributes:
        status: of the process.
        out: what it printed.
        err: what it complained of.
        error: what it raised.
    """

    status: int
    out: str
    err: str
    error: str


class Tell(pl.Callback):
    """Prints what runs."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.say(f"{type(trainer.strategy).__name__} runs {type(pl_module).__name__} on {trainer.world_size}")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.say(f"after step {trainer.global_step} of {stage}")

    def say(self, text: str) -> None:
        print(text)


def cpipe(*words: str, ranks: int = 1) -> list[Finished]:
    """How the command ended on each of its ranks, whose streams go to files in the current folder."""

    def on_rank(rank: int) -> Finished:
        warnings.filterwarnings("ignore", module="lightning")
        files = [Path(f"{name}_{rank}").resolve() for name in ("out", "err")]
        sys.argv = ["cpipe", *words]
        status, error = 0, ""
        with files[0].open("w") as out, files[1].open("w") as err:
            sys.stdout, sys.stderr = out, err
            try:
                main()
            except SystemExit as ended:
                status = _status(ended.code)
            except Exception as raised:
                status, error = 1, f"{type(raised).__name__}: {raised}"
        return Finished(status, *(file.read_text() for file in files), error)

    return run_ranks(on_rank, ranks)


def _status(code: Any) -> int:
    return code if isinstance(code, int) else int(code is not None)
