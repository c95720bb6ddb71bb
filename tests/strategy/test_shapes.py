"""Mini-batches of every length and structure: losses and gradients are those of plain Lightning."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.helpers.fits import fit_in_pipeline, require_plain_results
from tests.helpers.modules import WIDTH, Chain, noise_loader


def lengths_loader(*lengths: int) -> Any:
    """A mini-batch of each length."""
    numbers = torch.Generator().manual_seed(3)
    batches = [tuple(torch.randn(n, 2, WIDTH, generator=numbers) for _ in range(2)) for n in lengths]
    return DataLoader(batches, batch_size=None)


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param((4, 4, 4, 1), id="shorter-last", marks=pytest.mark.full),
        pytest.param((4, 2, 2, 2), id="shorter-from-the-second"),
        pytest.param((4, 2, 4, 2, 4), id="alternating"),
        pytest.param((1, 2, 3, 4, 5, 6), id="all-different"),
        pytest.param((5, 5, 5, 3, 5, 5), id="once-in-between", marks=pytest.mark.full),
    ],
)
def test_lengths_may_change(lengths: tuple[int, ...]) -> None:
    seen = require_plain_results(3, Chain, partial(lengths_loader, *lengths))
    assert [len(batch[0]) for batch in seen.batches] == list(lengths)


@pytest.mark.parametrize("p", [pytest.param(2, marks=pytest.mark.full), 4])
def test_lengths_may_change_in_every_epoch_while_training_streams(p: int) -> None:
    lengths = (4, 2, 4, 1, 3)
    seen = fit_in_pipeline(p, Chain, partial(lengths_loader, *lengths), partial(lengths_loader, 2, 5, 2), max_epochs=3)
    for of_rank in seen:
        assert [len(batch[0]) for batch in of_rank.batches] == 3 * list(lengths)
        assert of_rank.losses == seen[0].losses


@pytest.mark.parametrize("batches", [1, pytest.param(2, marks=pytest.mark.full)])
def test_there_may_be_fewer_mini_batches_than_stages(batches: int) -> None:
    loader = partial(noise_loader, samples=3 * batches)
    require_plain_results(4, Chain, loader)
    seen = fit_in_pipeline(4, Chain, loader, loader, max_epochs=3)
    assert all(len(of_rank.losses) == 3 * batches for of_rank in seen)


class OfDicts(Chain):
    """Takes a dict with tensors in lists, and things that are no tensors."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        assert batch["name"] == f"batch {batch_idx}"
        x, y = batch["pair"]
        if batch["flipped"] is not None:
            x = x.flip(0)
        return super().training_step((x * batch["scale"], y), batch_idx)


def dicts_loader() -> Any:
    numbers = torch.Generator().manual_seed(3)
    return DataLoader(
        [
            {
                "pair": [torch.randn(3, WIDTH, generator=numbers) for _ in range(2)],
                "scale": 1.0 + i,
                "name": f"batch {i}",
                "flipped": True if i % 2 else None,
            }
            for i in range(5)
        ],
        batch_size=None,
    )


def test_a_batch_may_be_a_dict_of_anything() -> None:
    require_plain_results(3, OfDicts, dicts_loader)
