"""A data module is asked and told what plain Lightning asks and tells it, on every rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler

from tests.helpers.fits import alone, in_pipeline, quiet_trainer
from tests.helpers.modules import WIDTH, Chain, noise_loader

TWO = 2
"""Validation loaders."""


class OfTwo(Chain):
    """Validates on two loaders."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def on_fit_start(self) -> None:
        """What was transferred before was for the set-up's look at the first batches."""
        data = self.trainer.datamodule
        data.calls = [call for call in data.calls if not call.startswith(("before", "after"))]


class Diary(pl.LightningDataModule):
    """Notes every call, with what tells one from another."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.known = 0

    def setup(self, stage: str) -> None:
        self.calls.append(f"setup {stage}")

    def train_dataloader(self) -> Any:
        return noise_loader(samples=9)

    def val_dataloader(self) -> Any:
        return [noise_loader(samples=4, seed=seed) for seed in range(TWO)]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls.append(f"before {self.where} {dataloader_idx}")
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls.append(f"after {self.where} {dataloader_idx}")
        return batch

    @property
    def where(self) -> str:
        return "training" if self.trainer.training else "validating"

    def state_dict(self) -> dict[str, Any]:
        self.known += 1
        return {"known": self.known}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls.append(f"load {state}")

    def teardown(self, stage: str) -> None:
        self.calls.append(f"teardown {stage}")


def diary(path: Path, **options: Any) -> tuple[Counter[str], Counter[str]]:
    """What is noted in a fit that saves once, and in one that goes on from there; from the start of the fit on."""
    saving = ModelCheckpoint(path, "saved", every_n_epochs=1, enable_version_counter=False)
    trainer = quiet_trainer(max_epochs=2, callbacks=[saving], enable_checkpointing=True, **options)
    first, second = Diary(), Diary()
    trainer.fit(OfTwo(), datamodule=first)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(OfTwo(), datamodule=second, ckpt_path=path / "saved.ckpt")
    return Counter(first.calls), Counter(second.calls)


def test_it_hears_of_each_batch_and_of_its_own_state(tmp_path: Path) -> None:
    plain = alone(partial(diary, tmp_path / "alone"))
    assert plain[0]["after training 0"] == 6
    assert plain[0]["after validating 1"] > 0
    for of_rank in in_pipeline(2, partial(diary, tmp_path / "pipeline")):
        assert of_rank == plain


class Growing(IterableDataset[Any]):
    """Yields nothing the first time it is read, and three samples later."""

    def __init__(self) -> None:
        self.times = 0

    def __iter__(self) -> Iterator[Any]:
        self.times += 1
        return iter([(torch.full((WIDTH,), 1.0), torch.zeros(WIDTH))] * (0 if self.times == self.empty else 3))

    empty = 3


class OfEpoch(Sampler[int]):
    """Yields the number of the epoch that it was told."""

    def __init__(self) -> None:
        self.epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter([self.epoch])

    def __len__(self) -> int:
        return 1


class Validated(Chain):
    """Keeps what it validates on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def on_validation_batch_start(self, batch: tuple[Tensor, ...], *_: Any) -> None:
        self.seen.append(float(batch[0].sum()))


def validated(val: Any, **options: Any) -> list[float]:
    module = Validated()
    trainer = quiet_trainer(max_epochs=3, num_sanity_val_steps=0, limit_val_batches=2, **options)
    trainer.fit(module, noise_loader(samples=6), val())
    return module.seen


class Endless(IterableDataset[Any]):
    """Counts, and never ends."""

    def __iter__(self) -> Iterator[Any]:
        number = 0
        while True:
            number += 1
            yield torch.full((WIDTH,), float(number)), torch.zeros(WIDTH)


def of_epoch() -> Any:
    x = torch.arange(4.0)[:, None].expand(4, WIDTH)
    return DataLoader(list(zip(x, x, strict=True)), sampler=OfEpoch())


@pytest.mark.full
@pytest.mark.parametrize(
    "val",
    [of_epoch, lambda: DataLoader(Endless(), 2), lambda: [noise_loader(samples=4)]],
    ids=["sampler", "endless", "list"],
)
def test_validations_see_what_they_see_in_plain_lightning(val: Any) -> None:
    plain = alone(partial(validated, val))
    assert len(plain) >= 3
    for of_rank in in_pipeline(3, partial(validated, val)):
        assert of_rank == plain


def trained(**options: Any) -> tuple[int, int]:
    module, data = Chain(), DataLoader(Growing(), 1)
    trainer = quiet_trainer(max_epochs=4, **options)
    trainer.fit(module, data)
    return trainer.global_step, trainer.current_epoch


@pytest.mark.full
def test_a_stream_may_be_empty_in_one_epoch() -> None:
    plain = alone(trained)
    for of_rank in in_pipeline(2, trained):
        assert of_rank == plain
