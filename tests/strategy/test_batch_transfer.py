"""The hooks around a batch's way to the device see each batch once, and what they make of it is trained."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from tests.helpers.fits import fit_alone, fit_in_pipeline, require_plain_results
from tests.helpers.modules import Chain, noise_loader


class Transfers(pl.core.hooks.DataHooks):
    """Changes each batch in all three hooks, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, float]] = []

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        self.calls.append(("before", float(x.sum())))
        return x + 1, y

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        self.calls.append(("transfer", float(batch[0].sum())))
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        self.calls.append(("after", float(x.sum())))
        return 2 * x, y


class OwnTransfers(Transfers, Chain):
    """A module with these hooks."""

    def on_fit_start(self) -> None:
        """What came before was for the set-up's look at the first batches."""
        self.calls.clear()


class Data(Transfers, pl.LightningDataModule):
    """A data module with these hooks."""

    def train_dataloader(self) -> Any:
        return noise_loader()

    def val_dataloader(self) -> Any:
        return noise_loader(samples=4)


def calls(_: pl.Trainer, module: OwnTransfers) -> list[tuple[str, float]]:
    return module.calls


@pytest.mark.parametrize("p", [1, 3])
@pytest.mark.parametrize(("module", "data"), [(OwnTransfers, noise_loader), (Chain, Data)], ids=["module", "data"])
def test_what_the_hooks_make_of_a_batch_is_trained(p: int, module: Any, data: Any) -> None:
    seen = require_plain_results(p, module, data)
    x, _ = next(iter(noise_loader()))
    assert torch.equal(seen.batches[0][0], 2 * (x + 1))


@pytest.mark.parametrize("p", [1, 2])
def test_each_batch_is_transferred_once_on_every_rank(p: int) -> None:
    fit = {"module": OwnTransfers, "train": noise_loader, "val": partial(noise_loader, samples=4), "look": calls}
    plain = fit_alone(**fit, max_epochs=2).found
    for of_rank in fit_in_pipeline(p, **fit, max_epochs=2):
        # In another order than Lightning's: a batch that runs ahead is transferred ahead.
        assert sorted(of_rank.found) == sorted(plain)


class Noisy(Chain):
    """Augments batches with random numbers."""

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        return batch[0] + torch.randn_like(batch[0]), batch[1]


def test_random_augmentations_are_the_same_on_every_rank() -> None:
    seen = fit_in_pipeline(3, Noisy, noise_loader, max_epochs=2)
    batches = [torch.cat([x for x, _ in of_rank.batches]) for of_rank in seen]
    assert all(torch.equal(batches[0], of_rank) for of_rank in batches)
    first, second = batches[0].chunk(2)
    assert not torch.equal(first, second)
