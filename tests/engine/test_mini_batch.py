"""Equal batches have equal fingerprints, different ones different ones, whatever a loader yields."""

from __future__ import annotations

import copy
import itertools
from collections import UserDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_cpipe.engine.mini_batch import _SAMPLE, fingerprint


@dataclass
class Pair:
    a: Any
    b: Any


class Own:
    """A batch of a class of one's own, whose tensors lie on a part of it; and something that is no data."""

    def __init__(self, x: torch.Tensor) -> None:
        self.store = SimpleNamespace(x=x, read_at=object())


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(int(torch.tensor(shape).prod())).reshape(shape).to(dtype)


# All different from each other.
BATCHES = [
    numbers(4),
    numbers(4) + 1,
    numbers(2, 2),
    numbers(4, 1),
    numbers(4, dtype=torch.float64),
    numbers(4, dtype=torch.bfloat16),
    numbers(4, dtype=torch.float16),
    numbers(4, dtype=torch.int64),
    numbers(4, dtype=torch.int32),
    numbers(4, dtype=torch.uint8),
    numbers(4, dtype=torch.bool),
    numbers(4, dtype=torch.complex64),
    numbers(4).flip(0),
    torch.tensor(3.0),
    torch.tensor(3),
    torch.empty(0),
    torch.empty(0, 5),
    torch.full((4,), torch.nan),
    torch.full((4,), torch.inf),
    [numbers(4), numbers(2)],
    [numbers(2), numbers(4)],
    {"x": numbers(4), "y": [numbers(3), 7]},
    {"x": numbers(4), "y": [numbers(3), 8]},
    {"x": numbers(4), "y": [numbers(3), None]},
    Pair(numbers(4), "text"),
    Pair(numbers(4), "other text"),
    Pair(numbers(4), b"text"),
    UserDict(x=numbers(4)),
    UserDict(x=numbers(4) + 1),
    Own(numbers(4)),
    Own(numbers(4) + 1),
    Own(numbers(2, 2)),
    [np.arange(4.0)],
    [np.arange(4.0) + 1],
    [np.float32(2)],
    [np.float32(3)],
    7,
    7.5,
    None,
    numbers(3 * _SAMPLE),
    numbers(3 * _SAMPLE) + 1,
]


def copied(batch: Any) -> Any:
    """The same again, in other memory."""
    if isinstance(batch, torch.Tensor):
        return batch.clone()
    if isinstance(batch, list):
        return list(map(copied, batch))
    if isinstance(batch, dict):
        return {key: copied(value) for key, value in batch.items()}
    if isinstance(batch, Pair):
        return Pair(copied(batch.a), batch.b)
    return copy.deepcopy(batch)


@pytest.mark.parametrize("number", range(len(BATCHES)))
def test_an_equal_batch_has_the_same_fingerprint(number: int) -> None:
    batch = BATCHES[number]
    assert fingerprint(batch) == fingerprint(copied(batch))
    assert 0 <= fingerprint(batch) < 2**32


def test_different_batches_have_different_fingerprints() -> None:
    found = [fingerprint(batch) for batch in BATCHES]
    alike = [(a, b) for (a, x), (b, y) in itertools.combinations(enumerate(found), 2) if x == y]
    assert not alike


@pytest.mark.parametrize(("rows", "columns"), [(6, 4), (60, 70)], ids=["whole", "sampled"])
def test_memory_layout_does_not_count(rows: int, columns: int) -> None:
    dense = torch.randn(rows, columns)
    gaps = torch.empty(rows, 2 * columns)[:, ::2].copy_(dense)
    assert not gaps.is_contiguous()
    assert fingerprint(gaps) == fingerprint(dense) == fingerprint(dense.t().contiguous().t())
    assert fingerprint(dense.to_sparse()) == fingerprint(dense)
    assert fingerprint(dense[:1, 0]) == fingerprint(dense[:1, 0].clone())


def test_a_fingerprint_touches_neither_the_batch_nor_the_generator() -> None:
    batch = torch.randn(10, requires_grad=True)
    before, state = batch.detach().clone(), torch.get_rng_state()
    fingerprint(batch)
    assert torch.equal(batch, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [_SAMPLE, _SAMPLE + 1, 10 * _SAMPLE + 3, 1_000_000])
def test_a_large_tensor_is_sampled_from_its_beginning_to_its_end(size: int) -> None:
    """Two ranks that drew different batches differ all over; a single element may go by unseen."""
    batch = torch.zeros(size)
    plain = fingerprint(batch)
    step = -(-size // _SAMPLE)
    for place in (0, step * ((size // 2) // step), step * ((size - 1) // step)):
        changed = batch.clone()
        changed[place] = 1
        assert fingerprint(changed) != plain
    if step > 1:
        unseen = batch.clone()
        unseen[1] = 1
        assert fingerprint(unseen) == plain


def test_swapped_neighbours_in_a_batch_are_noticed() -> None:
    images = torch.randn(32, 1, 28, 28)
    swapped = images[[1, 0, *range(2, 32)]]
    assert fingerprint(images) != fingerprint(swapped)


def test_an_unknown_object_counts_by_its_type() -> None:
    class Other:
        pass

    assert fingerprint([object()]) == fingerprint([object()])
    assert fingerprint([object()]) != fingerprint([Other()])
