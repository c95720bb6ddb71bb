"""Trainers that follow each other in one process leave nothing behind."""

from __future__ import annotations

import atexit
import gc
import threading
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from lightning_cpipe import ContinuousPipeStrategy
from tests.helpers.fits import quiet_trainer
from tests.helpers.modules import Chain, noise_loader
from tests.helpers.ranks import run_ranks


def held() -> tuple[int, int, int]:
    """Process groups, threads, and open files of this process."""
    gc.collect()
    return (
        len(dist.distributed_c10d._world.pg_map),
        threading.active_count(),
        len(list(Path("/proc/self/fd").iterdir())),
    )


def test_connections_end_with_their_strategy() -> None:
    """Folds of a cross-validation ran out of files, in the end."""

    def on_rank(rank: int) -> list[Any]:
        found = []
        registered: list[Any] = []
        with (
            mock.patch.object(atexit, "register", side_effect=registered.append),
            mock.patch.object(atexit, "unregister", side_effect=registered.remove),
        ):
            for _ in range(4):
                trainer = quiet_trainer(strategy=ContinuousPipeStrategy(), devices=2, max_epochs=1)
                trainer.fit(Chain(), noise_loader())
                del trainer
                found.append((*held(), len(registered)))
        return found

    for found in run_ranks(on_rank, 2):
        # A file of the first may be open for a moment longer.
        assert all(last <= first for first, last in zip(found[0], found[-1])), found


def test_a_second_fit_finds_the_groups_of_parameters_of_the_first() -> None:
    """Stand-ins stayed frozen on other ranks, so what is chosen by `requires_grad` was chosen otherwise."""

    class Penalized(Chain):
        def configure_optimizers(self) -> Any:
            self.groups = [name for name, p in self.named_parameters() if p.requires_grad]
            return super().configure_optimizers()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            # Touches weights of other stages, without a gradient.
            self.sizes = [float(p.numel()) for p in self.parameters() if p.shape == (8, 8)]
            return super().training_step(batch, batch_idx)

    def on_rank(rank: int) -> list[list[str]]:
        module, found = Penalized(), []
        trainer = quiet_trainer(strategy=ContinuousPipeStrategy(), devices=2, max_epochs=1)
        for epochs in (1, 2):
            trainer.fit_loop.max_epochs = epochs
            trainer.fit(module, noise_loader())
            found.append(module.groups)
        return found

    for first, second in run_ranks(on_rank, 2):
        assert first == second


class LogsItsMean(Chain):
    """Logs a value whose mean over ranks Lightning would advise."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("mean", loss, on_step=False, on_epoch=True)
        return loss


def test_lightning_advises_as_ever_after_a_pipeline() -> None:
    def on_rank(rank: int) -> list[int]:
        found = []
        for strategy in (ContinuousPipeStrategy(), "ddp"):
            trainer = quiet_trainer(strategy=strategy, devices=2, max_steps=1, max_epochs=1)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                trainer.fit(LogsItsMean(), noise_loader(samples=2))
            found.append(sum("self.log('mean', ..., sync_dist=True)" in str(each.message) for each in caught))
        return found

    assert run_ranks(on_rank, 2) == [[0, 1], [0, 0]]
