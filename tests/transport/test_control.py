"""All ranks together: what rank 0 has, what everyone has, and the same calls where there is only one rank."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_cpipe.errors import RankLostError
from lightning_cpipe.transport import control
from lightning_cpipe.transport.control import Control
from tests.helpers.ranks import run_ranks


def with_control(ranks: int, act: Callable[[Control, int], Any]) -> list[Any]:
    """What `act` returns on each of `ranks`."""

    def on_rank(rank: int) -> Any:
        store = f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
        try:
            return act(Control(ranks), rank)
        finally:
            dist.destroy_process_group()

    return run_ranks(on_rank, ranks)


def use(together: Control, rank: int) -> dict[str, Any]:
    """Everything, once."""
    weights = torch.full((4, 3), float(rank))
    columns = weights[:, 1:]
    flags = torch.tensor([rank == 0])
    together.share_tensors([columns, flags])
    together.barrier()
    return {
        "shared": together.share({"rank": rank, "big": "x" * 100_000 * (rank + 1)}),
        "collected": together.collect((rank, "y" * rank * 5_000)),
        "compared": together.compare(None if rank == 1 else rank),
        "weights": weights.tolist(),
        "flags": flags.tolist(),
    }


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_all_ranks_do_together(ranks: int) -> None:
    everyones = with_control(ranks, use)
    for rank, seen in enumerate(everyones):
        assert seen["shared"] == {"rank": 0, "big": "x" * 100_000}
        assert seen["collected"] == ([(each, "y" * each * 5_000) for each in range(ranks)] if rank == 0 else [])
        assert seen["compared"] == [None if each == 1 else each for each in range(ranks)]
        # Only the columns were shared, through the gaps between them.
        assert seen["weights"] == [[float(rank), 0.0, 0.0]] * 4
        assert seen["flags"] == [True]


def test_a_single_rank_needs_no_group() -> None:
    alone = use(Control(1), 0)
    assert alone["shared"] == {"rank": 0, "big": "x" * 100_000}
    assert alone["collected"] == [(0, "")]
    assert alone["compared"] == [0]


@pytest.mark.parametrize(
    "act",
    [
        lambda together: together.barrier(),
        lambda together: together.share(1),
        lambda together: together.share_tensors([torch.zeros(1)]),
        lambda together: together.collect(1),
        lambda together: together.compare(1),
    ],
)
def test_a_broken_connection_is_a_lost_rank(act: Callable[[Control], object], monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            def run(*_: Any, **__: Any) -> Any:
                if name in ("new_group", "get_rank"):
                    return 0
                raise RuntimeError("Connection reset by peer")

            return run

    monkeypatch.setattr(control, "dist", Broken())
    with pytest.raises(RankLostError, match="a rank is gone"):
        act(Control(2))
