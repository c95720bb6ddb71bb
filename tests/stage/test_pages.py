"""Memory that is given back is gone, and there again when it is written to."""

from __future__ import annotations

import pytest
import torch

from lightning_cpipe.stage.pages import drop_numbers, keep_tensors_out_of_the_heap
from tests.helpers.memory import forget_peak, peak, resident
from tests.helpers.ranks import run_ranks

MB = 2**20


def sizes_on_rank(rank: int) -> list[float]:
    # The code that runs takes memory, too.
    sizes(MB)
    return sizes(64 * MB)


def sizes(size: int) -> list[float]:
    """What is given back of a tensor of so many bytes, and taken again."""
    tensor = torch.ones(size // 4)
    beside = torch.ones(1000)
    whole = resident()
    drop_numbers(tensor.untyped_storage())
    given_back = resident()
    assert float(tensor[1024:-1024].abs().max()) == 0
    tensor.fill_(2)
    assert float(tensor.min()) == 2
    assert float(beside.sum()) == 1000
    return [(whole - given_back) / size, (resident() - given_back) / size]


def test_memory_goes_and_comes() -> None:
    ((given_back, taken),) = run_ranks(sizes_on_rank, 1)
    assert given_back == pytest.approx(1, abs=0.03)
    assert taken == pytest.approx(1, abs=0.03)


def test_what_is_smaller_than_a_page_stays() -> None:
    tensor = torch.ones(10)
    drop_numbers(tensor.untyped_storage())
    assert tensor.tolist() == [1] * 10


def freed_on_rank(rank: int) -> float:
    """What is left of tensors that were freed beside small ones that were not."""
    keep_tensors_out_of_the_heap()
    # The code that runs takes memory, too.
    small = [torch.ones(4 * MB), torch.ones(100)]
    del small[0]
    start = forget_peak()
    for _ in range(20):
        tensor = torch.ones(4 * MB)
        small.append(torch.ones(100))
        del tensor
    return (peak() - start) / (16 * MB)


def test_tensors_are_kept_out_of_the_heap() -> None:
    (most,) = run_ranks(freed_on_rank, 1)
    assert most < 1.5
