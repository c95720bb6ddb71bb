"""What all ranks give comes to rank 0 in the background, to the bit and with its strides."""

from __future__ import annotations

import multiprocessing
import os
import socket
import warnings
from collections import OrderedDict
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_cpipe.errors import RankLostError, SaveError
from lightning_cpipe.transport.control import Control
from lightning_cpipe.transport.parcels import Parcels
from tests.helpers.ranks import run_ranks


def with_parcels(p: int, then: Any, givers: int | None = None) -> list[Any]:
    def on_rank(rank: int) -> Any:
        store = f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=p)
        parcels = Parcels(Control(p), rank, givers or p, p)
        try:
            return then(rank, parcels)
        finally:
            dist.barrier()
            parcels.close()
            dist.destroy_process_group()

    return run_ranks(on_rank, p)


def everything(rank: int) -> dict[str, Any]:
    numbers = torch.arange(24.0).reshape(2, 3, 2, 2) + rank
    return {
        "plain": numbers,
        "channels last": numbers.to(memory_format=torch.channels_last),
        "transposed": numbers[0, :, :, 0].clone().t(),
        "a part": numbers[:, 1],
        "scalar": torch.tensor(rank),
        "empty": torch.empty(0, 3),
        "bf16": torch.full((3,), rank / 3, dtype=torch.bfloat16),
        "bool": torch.tensor([True, False, rank == 1]),
        "sparse": torch.eye(2).to_sparse(),
        "nested": OrderedDict(a=[1, (torch.ones(2) * rank, "text")], b=None),
    }


def test_all_that_is_given_comes_in_order_with_its_strides() -> None:
    def give(rank: int, parcels: Parcels) -> Any:
        given = [parcels.give("things", partial(everything, rank + 10 * turn)) for turn in range(3)]
        return [each.result() for each in given]

    first, *others = with_parcels(3, give)
    assert others == [[[], [], []]] * 2
    for turn, of_ranks in enumerate(first):
        for rank, found in enumerate(of_ranks):
            expected = everything(rank + 10 * turn)
            assert found.keys() == expected.keys()
            nested, theirs = found.pop("nested"), expected.pop("nested")
            assert (type(nested), nested["a"][0], nested["a"][1][1]) == (OrderedDict, 1, "text")
            assert torch.equal(nested["a"][1][0], theirs["a"][1][0])
            assert torch.equal(found.pop("sparse").to_dense(), expected.pop("sparse").to_dense())
            for name, tensor in expected.items():
                assert (found[name].dtype, found[name].stride()) == (tensor.dtype, tensor.stride()), name
                assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("givers", [1, 2])
def test_some_things_are_asked_of_all_ranks(givers: int) -> None:
    """And others of the first ones alone."""

    def give(rank: int, parcels: Parcels) -> Any:
        asked = [parcels.give(str(turn), lambda: rank, of_all=bool(turn % 2)) for turn in range(4)]
        return [each.result() for each in asked]

    found = with_parcels(3, give, givers)
    assert found == [[[*range(givers)], [0, 1, 2]] * 2, *[[[]] * 4] * 2]


def test_ranks_that_save_different_things_are_told() -> None:
    def give(rank: int, parcels: Parcels) -> str:
        try:
            parcels.give("weights" if rank else "an optimizer's state", lambda: rank).result()
        except SaveError as error:
            return str(error)
        return ""

    first, second = with_parcels(2, give)
    assert "rank 0 saves an optimizer's state and rank 1 saves weights" in first
    assert second == ""


def test_who_waits_for_a_rank_that_broke_off_learns_of_it() -> None:
    def give(rank: int, parcels: Parcels) -> list[int]:
        parcels.give("numbers", lambda: rank).result()
        if rank:
            parcels.abandon()
            return []
        with pytest.raises(RankLostError, match="rank 1"):
            parcels.give("numbers", lambda: 0).result()
        return [1]

    assert with_parcels(2, give) == [[1], []]


def test_a_time_limit_of_the_scripts_own_sockets_is_not_ours() -> None:
    """`socket.setdefaulttimeout` once made connections that do not wait."""

    def give(rank: int, parcels: Parcels) -> list[int]:
        return [each[0].item() for each in parcels.give("weights", lambda: torch.full((2**20,), rank)).result()]

    socket.setdefaulttimeout(5)
    try:
        assert with_parcels(2, give) == [[0, 1], []]
    finally:
        socket.setdefaulttimeout(None)


def test_rank_0_says_what_it_waits_for_and_goes_on_waiting() -> None:
    """Where rank 0 alone saved, it once waited for ever without a word."""
    said = multiprocessing.get_context("fork").Event()

    def give(rank: int, parcels: Parcels) -> list[int]:
        if rank:
            said.wait()
            parcels.give("weights", lambda: rank).result()
            return []
        parcels.patience = 0.01
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, *_: (lines.append(str(message)), said.set())
            found = parcels.give("weights", lambda: rank).result()
        assert all("for what rank 1 gives to a checkpoint (weights)" in line for line in lines)
        return found

    lines: list[str] = []
    assert with_parcels(2, give) == [[0, 1], []]


def test_a_rank_that_gives_faster_than_is_taken_waits() -> None:
    def give(rank: int, parcels: Parcels) -> int:
        parcels.most = 2
        if rank == 0:
            taken = [parcels.give("numbers", lambda: 0).result()[1] for _ in range(6)]
            return len(taken)
        # Far more than sockets hold.
        for turn in range(6):
            parcels.give("numbers", partial(torch.full, (2**20,), turn))
            assert sum(not each.done() for each in parcels._under_way) <= 2
        parcels.settle()
        return 6

    assert with_parcels(2, give) == [6, 6]
