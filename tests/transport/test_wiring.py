"""Between each two neighbours lie six lanes with groups of their own; each stage gets its ends of them."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.processes import run_ranks
from lightning_cpipe.transport import wiring
from lightning_cpipe.transport.edge import Edge, NcclEdge
from lightning_cpipe.transport.wiring import DOWN, ON_CPU, UP, Wiring
from lightning_cpipe.tree import TensorSpec
from tests.helpers.wire import CPU


def test_every_lane_of_a_real_pipeline_carries_its_own_messages() -> None:
    """Every stage sends on all its lanes before it receives on any; each lane's message arrives on that lane."""
    p = 3
    spec = TensorSpec((2,), torch.int64)
    numbers = {lane: number for number, lane in enumerate((*DOWN, *UP))}

    def on_rank(rank: int) -> dict[str, list[int]]:
        store = f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=p)
        wired = Wiring([2, 1, 0], p - 1 - rank, CPU, "gloo")
        received = {}
        # Fresh ends for a second run, on the same groups.
        for _ in range(2):
            lanes = wired.lanes(in_flight=4)
            for end in lanes.incoming.values():
                end.post([spec])
            for lane, end in lanes.outgoing.items():
                end.send([torch.tensor([rank, numbers[lane]])])
            received = {lane: end.receive()[0].tolist() for lane, end in lanes.incoming.items()}
            for end in lanes.outgoing.values():
                end.flush()
        wired.abandon()
        dist.destroy_process_group()
        return received

    for rank, received in enumerate(run_ranks(on_rank, p)):
        down = {lane: [rank + 1, numbers[lane]] for lane in DOWN if rank < p - 1}
        up = {lane: [rank - 1, numbers[lane]] for lane in UP if rank > 0}
        assert received == {**down, **up}


class Groups:
    """Stands for `torch.distributed` where groups are made."""

    def __init__(self) -> None:
        self.made: list[tuple[tuple[int, ...], str, Any]] = []

    def new_group(self, ranks: list[int], timeout: Any, backend: str) -> int:
        self.made.append((tuple(ranks), backend, timeout))
        return len(self.made)


def wired(monkeypatch: pytest.MonkeyPatch, stage: int, backend: str = "gloo") -> tuple[Wiring, Groups]:
    """A stage of three, without processes."""
    groups = Groups()
    monkeypatch.setattr(wiring, "dist", groups)
    monkeypatch.setattr(Wiring, "_warm_up", lambda self: None)
    return Wiring([2, 1, 0], stage, CPU, backend), groups


@pytest.mark.parametrize(
    ("stage", "incoming", "outgoing"),
    [(0, UP, DOWN), (1, (*DOWN, *UP), (*DOWN, *UP)), (2, DOWN, UP)],
    ids=["first", "middle", "last"],
)
def test_a_stage_has_ends_where_it_has_neighbours(
    monkeypatch: pytest.MonkeyPatch, stage: int, incoming: tuple[str, ...], outgoing: tuple[str, ...]
) -> None:
    lanes = wired(monkeypatch, stage)[0].lanes(4)
    assert set(lanes.incoming) == set(incoming)
    assert set(lanes.outgoing) == set(outgoing)
    for ends, down, up in ((lanes.incoming, stage - 1, stage + 1), (lanes.outgoing, stage + 1, stage - 1)):
        for lane, end in ends.items():
            assert end._peer == 2 - (down if lane in DOWN else up)
    ends = [*lanes.incoming.values(), *lanes.outgoing.values()]
    assert len({end._group for end in ends}) == len(ends), "no two ends share a group"


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_process_makes_every_group_in_the_same_order(monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    _, groups = wired(monkeypatch, stage, "nccl")
    made = [(ranks, backend) for ranks, backend, _ in groups.made]
    pair = [("gloo" if lane in ON_CPU else "nccl") for lane in (*DOWN, *UP)]
    assert made == [((2, 1), backend) for backend in pair] + [((1, 0), backend) for backend in pair]
    # A gloo wait that runs out breaks the connection for good.
    assert all(timeout.days >= 365 for _, _, timeout in groups.made)


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_only_tensors_travel_on_nccl(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    lanes = wired(monkeypatch, 1, backend)[0].lanes(4)
    for lane, end in [*lanes.incoming.items(), *lanes.outgoing.items()]:
        assert type(end) is (NcclEdge if backend == "nccl" and lane not in ON_CPU else Edge)


def test_each_run_gets_fresh_ends_and_an_abandoned_wiring_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = wired(monkeypatch, 1)
    first, second = made.lanes(4), made.lanes(4)
    assert not {id(end) for end in first.incoming.values()} & {id(end) for end in second.incoming.values()}
    assert [end._group for end in first.incoming.values()] == [end._group for end in second.incoming.values()]
    made.abandon()
    assert all(end._group is None for end in [*second.incoming.values(), *second.outgoing.values()])
