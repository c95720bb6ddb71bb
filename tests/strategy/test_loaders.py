"""Every kind of loader: all stages see the mini-batches that plain Lightning sees."""

from __future__ import annotations

import multiprocessing
import random
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset, WeightedRandomSampler

from lightning_cpipe import ContinuousPipeStrategy
from tests.helpers.causes import cause
from tests.helpers.fits import (
    Seen,
    Watcher,
    alone,
    fit_alone,
    fit_in_pipeline,
    in_pipeline,
    quiet_trainer,
    require_plain_results,
)
from tests.helpers.modules import WIDTH, Chain, noise_loader
from tests.helpers.ranks import run_ranks

SAMPLES = 11

DATASET = noise_loader(samples=SAMPLES).dataset


class Stream(IterableDataset[Any]):
    """Pairs of noise, one after the other; nobody knows how many there will be."""

    def __iter__(self) -> Iterator[Any]:
        numbers = torch.Generator().manual_seed(3)
        for _ in range(SAMPLES):
            yield torch.randn(WIDTH, generator=numbers), torch.randn(WIDTH, generator=numbers)


class SizedStream(Stream):
    """The same, and it says how many."""

    def __len__(self) -> int:
        return SAMPLES


def with_worker(persistent: bool) -> Any:
    # A rank is a daemon, so that none outlives a test; daemons may have no children.
    multiprocessing.current_process().daemon = False
    dataset = noise_loader(samples=SAMPLES).dataset
    return DataLoader(dataset, 3, num_workers=1, persistent_workers=persistent)


LOADERS: dict[str, Any] = {
    "iterable": lambda: DataLoader(Stream(), 3),
    "iterable with a length": lambda: DataLoader(SizedStream(), 3),
    "drop_last": lambda: DataLoader(noise_loader(samples=SAMPLES).dataset, 3, drop_last=True),
    "a worker": partial(with_worker, persistent=False),
    "a worker that persists": partial(with_worker, persistent=True),
    "a list": lambda: DataLoader(list(noise_loader(samples=SAMPLES)), batch_size=None),
}


def batches(seen: Seen) -> list[float]:
    return [float(x.sum()) for x, _ in seen.batches]


REPEATS = {"iterable with a length", "a list"}
"""Their batches come as those of another one."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if name in REPEATS else ()) for name in LOADERS]
)
def test_every_rank_sees_the_batches_of_plain_lightning(name: str) -> None:
    options = {"module": Chain, "train": LOADERS[name], "val": LOADERS[name], "max_epochs": 3}
    plain = batches(fit_alone(**options))
    seen = fit_in_pipeline(3, **options)
    assert len(plain) == 3 * (SAMPLES // 3 + (name != "drop_last"))
    for of_rank in seen:
        assert batches(of_rank) == plain
        assert of_rank.metrics == seen[0].metrics


class Endless(IterableDataset[Any]):
    """A stream with an order of its own for each that reads it."""

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield torch.randn(WIDTH), torch.full((WIDTH,), float(np.random.rand() + random.random()))


class Shuffles(Sampler[int]):
    """Knows its epoch, and nothing of a generator."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.epoch)).tolist())

    def __len__(self) -> int:
        return SAMPLES


class Buckets(Sampler[list[int]]):
    """Batches of whatever size, from the global generators, and nobody knows how many."""

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.permutation(SAMPLES).tolist()
        while order:
            yield [order.pop() for _ in range(min(len(order), random.randint(1, 4)))]


def in_two_workers() -> Any:
    multiprocessing.current_process().daemon = False
    return DataLoader(Endless(), 3, num_workers=2)


DRAWING: dict[str, Any] = {
    "endless": lambda: DataLoader(Endless(), 3),
    "endless in two workers": in_two_workers,
    "weighted sampler": lambda: DataLoader(DATASET, 3, sampler=WeightedRandomSampler([1.0] * 5 + [2.0] * 6, SAMPLES)),
    "own sampler": lambda: DataLoader(DATASET, 3, sampler=Shuffles()),
    "own batch sampler": lambda: DataLoader(DATASET, batch_sampler=Buckets()),
    "generator": lambda: (batch for batch in list(noise_loader(samples=15))),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if name != "own batch sampler" else ()) for name in DRAWING]
)
def test_what_loaders_draw_is_drawn_alike_and_as_plain_lightning_draws_it(name: str) -> None:
    """No generator of their own, no length, no end; the first epoch begins from the same state everywhere."""
    options = {"module": Chain, "train": DRAWING[name], "max_epochs": 2, "limit_train_batches": 4}
    plain = batches(fit_alone(**options))
    for of_rank in fit_in_pipeline(3, **options):
        assert batches(of_rank) == plain
    # A generator is spent in the second epoch.
    assert len(set(plain)) == len(plain) == (5 if name == "generator" else 8)


def test_shuffled_epochs_differ_from_each_other_and_not_between_ranks() -> None:
    loader = partial(noise_loader, samples=12, shuffle=True)
    seen = fit_in_pipeline(3, Chain, loader, max_epochs=2)
    samples = [torch.cat([x for x, _ in of_rank.batches]) for of_rank in seen]
    assert all(torch.equal(samples[0], of_rank) for of_rank in samples)
    first, second = samples[0].chunk(2)
    assert not torch.equal(first, second)
    assert torch.equal(first.sort(0).values, second.sort(0).values)


class Draws(pl.Callback):
    """Draws more random numbers on one rank than on another, between all steps and epochs."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        for _ in range(1 + trainer.global_rank):
            torch.rand(()), np.random.rand(), random.random()

    on_train_epoch_start = on_train_batch_end


def augmented_loader() -> Any:
    def augmented(samples: list[Any]) -> tuple[Tensor, Tensor]:
        x, y = map(torch.stack, zip(*samples, strict=True))
        return x + torch.rand(()) + np.random.rand() + random.random(), y

    dataset = noise_loader(samples=12).dataset
    return DataLoader(dataset, 3, shuffle=True, collate_fn=augmented)


def test_orders_and_augmentations_are_everyones_whatever_else_a_rank_draws() -> None:
    seen = fit_in_pipeline(3, Chain, augmented_loader, callbacks=lambda: [Draws()], max_epochs=2)
    assert all(batches(of_rank) == batches(seen[0]) for of_rank in seen)
    assert len(set(batches(seen[0]))) == 8


class SeesValidation(Draws):
    """Keeps what is validated on, and draws between its batches."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_validation_batch_start(self, trainer: pl.Trainer, _: Any, batch: Any, *__: Any) -> None:
        self.seen.append(float(batch[0].sum()))
        self.on_train_batch_end(trainer)


class Noisy(Chain):
    """Augments its batches on the device."""

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        return batch[0] + torch.randn_like(batch[0]), batch[1]


def validated(trainer: pl.Trainer, _: pl.LightningModule) -> list[float]:
    return next(each.seen for each in trainer.callbacks if isinstance(each, SeesValidation))


def test_validations_are_augmented_alike_whatever_else_a_rank_draws() -> None:
    """It was drawn from the rank's own generators: the fingerprint stopped it, or nobody saw it in a transfer hook."""
    options = {"callbacks": lambda: [SeesValidation()], "look": validated, "max_epochs": 2}
    seen = fit_in_pipeline(2, Noisy, augmented_loader, augmented_loader, **options)
    assert seen[0].found == seen[1].found
    assert len(set(seen[0].found)) == len(seen[0].found) >= 8


def several_loaders() -> Any:
    return {"a": noise_loader(samples=7), "b": noise_loader(samples=4, seed=6)}


class OfSeveral(Chain):
    """Trains on batches of two loaders, and validates on two."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        pairs = [pair for pair in batch.values() if pair is not None]
        return self.loss(tuple(map(torch.cat, zip(*pairs, strict=True))))

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        loss = self.loss(batch)
        self.log("val_loss", loss)
        self.log(f"mine/{dataloader_idx}", loss, add_dataloader_idx=False)


@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size", "max_size"])
def test_several_training_loaders_are_combined(mode: Any) -> None:
    require_plain_results(2, OfSeveral, lambda: CombinedLoader(several_loaders(), mode))


@pytest.mark.parametrize("p", [1, 3])
def test_several_validation_loaders_are_validated_apart(p: int) -> None:
    val = lambda: [noise_loader(samples=4), noise_loader(samples=7, batch_size=2, seed=8)]  # noqa: E731
    options = {"max_epochs": 1, "accumulate_grad_batches": 100}
    plain = fit_alone(OfSeveral, several_loaders, val, **options)
    assert {"val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1", "mine/0", "mine/1"} <= plain.metrics.keys()
    for of_rank in fit_in_pipeline(p, OfSeveral, several_loaders, val, **options):
        assert of_rank.metrics == plain.metrics


@pytest.mark.parametrize("val", [list, lambda: noise_loader(samples=0)], ids=["no loader", "no batch"])
def test_validation_may_be_empty(val: Any) -> None:
    for of_rank in fit_in_pipeline(2, Chain, noise_loader, val, max_epochs=2):
        assert len(of_rank.losses) == 16
        assert "val_loss" not in of_rank.metrics


class Data(pl.LightningDataModule):
    """Data that is made in the data module's hooks, and anew at each epoch."""

    def prepare_data(self) -> None:
        self.calls = ["prepare_data"]

    def setup(self, stage: str) -> None:
        self.calls = [*getattr(self, "calls", []), f"setup {stage}"]
        self.numbers = torch.Generator().manual_seed(3)

    def train_dataloader(self) -> Any:
        self.calls.append("train_dataloader")
        x, y = (torch.randn(9, WIDTH, generator=self.numbers) for _ in range(2))
        return DataLoader(list(zip(x, y, strict=True)), 3)

    def val_dataloader(self) -> Any:
        self.calls.append("val_dataloader")
        return noise_loader(samples=4)

    def teardown(self, stage: str) -> None:
        self.calls.append(f"teardown {stage}")


def calls(trainer: pl.Trainer, _: pl.LightningModule) -> list[str]:
    return trainer.datamodule.calls


@pytest.mark.parametrize("reload", [0, pytest.param(1, marks=pytest.mark.full), 2])
def test_a_data_module_makes_the_loaders(reload: int) -> None:
    options = {
        "module": Chain, "train": Data, "max_epochs": 4, "reload_dataloaders_every_n_epochs": reload, "look": calls
    }  # fmt: skip
    plain = fit_alone(**options)
    first, *others = fit_in_pipeline(3, **options)
    # The set-up asks for the training loader before the sanity check asks for the other one.
    assert Counter(first.found) == Counter(plain.found)
    for of_rank in (first, *others):
        assert batches(of_rank) == batches(plain)
    for of_rank in others:
        assert ["prepare_data", *of_rank.found] == first.found


class DataOfEpoch(pl.LightningDataModule):
    """Its batches say in which epoch their loader was made."""

    def train_dataloader(self) -> Any:
        x = torch.full((9, WIDTH), float(self.trainer.current_epoch))
        return DataLoader(list(zip(x, x, strict=True)), 3)


@pytest.mark.parametrize(
    ("every", "made_in"), [(2, [3, 3, 5, 5, 7]), pytest.param(4, [3, 3, 3, 3, 7], marks=pytest.mark.full)]
)
def test_after_a_resume_loaders_are_made_anew_when_plain_lightning_makes_them(
    every: int, made_in: list[int], tmp_path: Path
) -> None:
    """It counts from the epoch of the resume, which nobody knows when the first batch is drawn for the set-up."""
    saving = partial(ModelCheckpoint, tmp_path, "{step}", every_n_train_steps=10, auto_insert_metric_name=False)
    fit_alone(Chain, DataOfEpoch, max_steps=10, callbacks=lambda: [saving()], enable_checkpointing=True)

    def epochs(**options: Any) -> list[float]:
        watcher = Watcher()
        trainer = quiet_trainer(callbacks=[watcher], max_epochs=8, reload_dataloaders_every_n_epochs=every, **options)
        trainer.fit(Chain(), datamodule=DataOfEpoch(), ckpt_path=tmp_path / "10.ckpt")
        return [float(x[0, 0]) for x, _ in watcher.seen.batches]

    plain = alone(epochs)
    assert plain[-3 * len(made_in) :: 3] == made_in
    for of_rank in in_pipeline(3, epochs):
        assert of_rank == plain


class Augmented(Dataset[Any]):
    """Changes each sample at random, in whatever process it is made."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return torch.randn(WIDTH) + index, torch.full((WIDTH,), float(np.random.rand() + random.random()))


def augmented() -> Any:
    multiprocessing.current_process().daemon = False
    return DataLoader(Augmented(), 3, num_workers=1)


def test_seeded_workers_draw_the_same_on_every_rank() -> None:
    """`seed_everything(workers=True)` made Lightning seed them by the rank, so that the first batches differed."""

    def scenario(**options: Any) -> list[Any]:
        pl.seed_everything(7, workers=True, verbose=False)
        watcher = Watcher()
        quiet_trainer(callbacks=[watcher], max_epochs=2, **options).fit(Chain(), augmented(), augmented())
        return [float(batch[0].sum()) for batch in watcher.seen.batches]

    first, second = in_pipeline(2, scenario)
    assert first == second
    assert len(first) == 8


class Short(Stream):
    """Says that there are more than there are."""

    def __len__(self) -> int:
        return SAMPLES + 6


@pytest.mark.parametrize("p", [1, 3])
@pytest.mark.filterwarnings("ignore:Length of IterableDataset:UserWarning")
def test_a_loader_may_yield_less_than_its_length(p: int) -> None:
    """The first stages walked on, and the loop trained batches of the next epoch in this one."""
    loader = partial(DataLoader, Short(), 3)

    def look(trainer: pl.Trainer, _: pl.LightningModule) -> tuple[int, int]:
        return trainer.global_step, trainer.current_epoch

    options = {"module": partial(Chain, optimizer="plain_sgd"), "train": loader, "max_epochs": 3, "look": look}
    plain = fit_alone(**options)
    assert plain.found == (12, 3)
    for of_rank in fit_in_pipeline(p, **options):
        assert of_rank.found == plain.found
        assert len(of_rank.losses) == len(plain.losses)


class KnowsItsPlace:
    """A stateful loader: iterating goes on where it was."""

    def __init__(self) -> None:
        self.batches = list(noise_loader(samples=30))
        self.place = 0

    def __iter__(self) -> Iterator[Any]:
        while self.place < len(self.batches):
            self.place += 1
            yield self.batches[self.place - 1]
        self.place = 0

    def __len__(self) -> int:
        return len(self.batches)

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def saved_in_mid_stream(path: Path, p: int, load_on: Any, _: int) -> list[list[float]]:
    """The batches of a run that saves in mid-epoch, and of the one that goes on from there."""
    found = []
    for file in (None, path / "step=4.ckpt"):
        watcher = Watcher()
        callbacks = [watcher, ModelCheckpoint(path, "{step}", every_n_train_steps=4, save_top_k=-1)]
        strategy = ContinuousPipeStrategy(load_on=load_on)
        options = {"strategy": strategy, "devices": p, "max_epochs": 1, "callbacks": callbacks}
        quiet_trainer(enable_checkpointing=True, **options).fit(Chain(), KnowsItsPlace(), ckpt_path=file)
        found.append([float(batch[0].sum()) for batch in watcher.seen.batches])
    return found


@pytest.mark.parametrize(("p", "load_on"), [(2, "all"), pytest.param(3, "ends", marks=pytest.mark.full)])
def test_a_stateful_loader_goes_on_where_it_was(p: int, load_on: str, tmp_path: Path) -> None:
    """Its place was saved two batches ahead, and not given back to it."""
    every = [float(batch[0].sum()) for batch in noise_loader(samples=30)]
    for rank, of_rank in enumerate(run_ranks(partial(saved_in_mid_stream, tmp_path, p, load_on), p)):
        loads = load_on == "all" or rank in (0, p - 1)
        assert of_rank == ([every, every[4:]] if loads else [[0.0] * 10, [0.0] * 6])


class Longer(pl.LightningDataModule):
    """Some of its loaders have a batch more on rank 0."""

    def __init__(self, training: bool) -> None:
        super().__init__()
        self.training = training

    def loader(self, training: bool) -> Any:
        samples = 6 + 3 * (training == self.training and not self.trainer.global_rank)
        return DataLoader(Subset(DATASET, range(samples)), 3)

    def train_dataloader(self) -> Any:
        return self.loader(training=True)

    def val_dataloader(self) -> Any:
        return self.loader(training=False)


@pytest.mark.parametrize(
    ("training", "told"),
    [(True, "training loaders differ: rank 0 has 3"), (False, "validation_step differ: rank 0 has [3]")],
)
def test_loaders_of_different_lengths_are_refused(training: bool, told: str) -> None:
    """Whoever has a batch more waited for ever for the other one."""
    said = cause(2, Chain(), Longer(training))
    assert f"{told} batches, and rank 1 has" in said


class YieldsNone:
    """Leaves out a batch."""

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(noise_loader()):
            yield None if number == 4 else batch

    def __len__(self) -> int:
        return len(noise_loader())


def test_one_stage_leaves_out_what_plain_lightning_leaves_out() -> None:
    """The step of a batch that is None was asked for, and the next one was out of order."""
    ours, plain = fit_in_pipeline(1, Chain, YieldsNone, max_epochs=2)[0], fit_alone(Chain, YieldsNone, max_epochs=2)
    assert ours.losses == plain.losses
    assert len(plain.losses) == 14


def test_stages_refuse_a_loader_that_yields_none() -> None:
    assert "the training loader yielded None as batch 4 of epoch 0" in cause(2, Chain(), YieldsNone(), where="at mini")
