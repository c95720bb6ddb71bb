"""A resumed run draws what comes next: no sample is lost, and none comes twice, whatever the loader."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, default_collate
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_cpipe import ContinuousPipeStrategy
from tests.helpers.fits import Watcher, quiet_trainer
from tests.helpers.modules import WIDTH, Chain, noise_loader
from tests.helpers.ranks import run_ranks

EPOCHS, PER_EPOCH = 3, 5


def data() -> Any:
    return noise_loader(samples=3 * PER_EPOCH).dataset


def augmented(samples: list[Any]) -> list[Tensor]:
    """Random numbers of all kinds, as a batch is put together."""
    x, y = default_collate(samples)
    return [x + torch.rand(()) + np.random.rand() + random.random(), y]


def with_own_generator() -> DataLoader[Any]:
    sampler = RandomSampler(data(), generator=torch.Generator().manual_seed(3))
    return DataLoader(data(), 3, sampler=sampler)


class Stream(IterableDataset[Any]):
    """Noise from the global generators; nobody knows how much."""

    def __iter__(self) -> Iterator[Any]:
        for _ in range(3 * PER_EPOCH):
            yield torch.randn(WIDTH), torch.randn(WIDTH)


class KnowsItsPlace:
    """Follows the protocol of torchdata's `StatefulDataLoader`: shuffles, and goes on once from a place it is given."""

    def __init__(self) -> None:
        self.batches = list(DataLoader(data(), 3))
        self.orders = torch.Generator().manual_seed(3)
        self.place, self.order = 0, torch.zeros(0)
        self.is_given = False

    def __iter__(self) -> Iterator[Any]:
        if not self.is_given:
            self.place, self.order = 0, torch.randperm(len(self.batches), generator=self.orders)
        self.is_given = False
        return self._go_on()

    def _go_on(self) -> Iterator[Any]:
        while self.place < len(self.batches):
            x, y = self.batches[int(self.order[self.place])]
            self.place += 1
            yield [x + torch.rand(()), y]

    def __len__(self) -> int:
        return len(self.batches)

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place, "order": self.order, "orders": self.orders.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place, self.order, self.is_given = state["place"], state["order"], True
        self.orders.set_state(state["orders"])


def stateful(**options: Any) -> StatefulDataLoader[Any]:
    # A rank is a daemon, so that none outlives a test; daemons may have no children.
    multiprocessing.current_process().daemon = False
    return StatefulDataLoader(data(), 3, shuffle=True, **options)


LOADERS: dict[str, Any] = {
    "in order": lambda: DataLoader(data(), 3),
    "shuffled, augmented": lambda: DataLoader(data(), 3, shuffle=True, collate_fn=augmented),
    "own generator": with_own_generator,
    "stream": lambda: DataLoader(Stream(), 3),
    "knows its place": KnowsItsPlace,
    "torchdata": partial(stateful, collate_fn=augmented),
    "torchdata, workers": partial(stateful, num_workers=2),
}

BY_DEFAULT = ("torchdata",)


class SavesBefore(pl.Callback):
    """Saves when so many steps are made and the next one has begun."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.path = folder / f"before-{steps}.ckpt"
        self.steps = steps

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.path)


def every_moment(folder: Path) -> list[pl.Callback]:
    """Saves before and after steps, after validations in mid-epoch and at its end, and at the end of each epoch."""
    return [
        ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False),
        ModelCheckpoint(folder, "val-{step}", monitor="val_loss", save_top_k=-1, auto_insert_metric_name=False),
        ModelCheckpoint(
            folder, "end-{step}", save_on_train_epoch_end=True, save_top_k=-1, auto_insert_metric_name=False
        ),
        SavesBefore(folder, 3),
    ]


def batches_of(loader: Any, p: int, callbacks: list[pl.Callback], ckpt_path: Path | None = None) -> list[float]:
    """What a run trains, on this rank."""
    # Another process may have drawn other numbers by then.
    pl.seed_everything(7 if ckpt_path is None else 8, verbose=False)
    watcher = Watcher()
    trainer = quiet_trainer(
        strategy=ContinuousPipeStrategy(),
        devices=p,
        max_epochs=EPOCHS,
        limit_val_batches=1,
        val_check_interval=2,
        enable_checkpointing=True,
        callbacks=[watcher, *callbacks],
    )
    trainer.fit(Chain(), loader(), noise_loader(), ckpt_path=ckpt_path)
    return [float(x.double().sum()) for x, _ in watcher.seen.batches]


MOMENTS = [("2", 2), ("before-3", 3), ("val-7", 7), ("end-5", 5), ("10", 10), ("end-10", 10)]


@pytest.mark.parametrize("p", [3, pytest.param(2, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.full) for name in LOADERS]
)
def test_nothing_is_lost_and_nothing_comes_twice(name: str, p: int, tmp_path: Path) -> None:
    def on_rank(rank: int) -> Any:
        whole = batches_of(LOADERS[name], p, every_moment(tmp_path))
        return whole, [batches_of(LOADERS[name], p, [], tmp_path / f"{file}.ckpt") for file, _ in MOMENTS]

    for whole, resumed in run_ranks(on_rank, p):
        assert (len(set(whole)) > 2 * PER_EPOCH) == (name != "in order")
        assert resumed == [whole[done:] for _, done in MOMENTS]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.full)])
def test_plain_lightning_goes_on_with_torchdatas_loader(workers: int, tmp_path: Path) -> None:
    """From files of the pipeline, in mid-epoch and at an epoch's end: every sample once in each epoch."""

    def samples(callbacks: list[pl.Callback], ckpt_path: Path | None = None, **options: Any) -> list[float]:
        pl.seed_everything(7 if ckpt_path is None else 8, verbose=False)
        watcher = Watcher()
        callbacks = [watcher, *callbacks]
        trainer = quiet_trainer(max_epochs=2, enable_checkpointing=True, callbacks=callbacks, **options)
        trainer.fit(Chain(), stateful(num_workers=workers), ckpt_path=ckpt_path)
        return [float(each.sum()) for x, _ in watcher.seen.batches for each in x]

    def in_pipeline(_: int) -> list[float]:
        first, _, at_end, _ = every_moment(tmp_path)
        return samples([first, at_end], strategy=ContinuousPipeStrategy(), devices=2)

    def alone(_: int) -> list[list[float]]:
        return [samples([], tmp_path / f"{name}.ckpt", devices=1) for name in ("2", f"end-{PER_EPOCH}")]

    whole, every = run_ranks(in_pipeline, 2)[0], sorted(float(x.sum()) for x, _ in data())
    mid_epoch, at_end = run_ranks(alone, 1)[0]
    of_first = mid_epoch[: len(every) - 6]
    assert of_first == whole[6 : len(every)]
    assert sorted(whole[:6] + of_first) == sorted(mid_epoch[len(of_first) :]) == sorted(at_end) == every
