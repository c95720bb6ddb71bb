"""Between each two neighbours lie six lanes, each with a connection of its own; each stage gets its ends of them."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_cpipe.errors import RankLostError
from lightning_cpipe.transport import wiring
from lightning_cpipe.transport.control import Control
from lightning_cpipe.transport.edge import Edge, NcclEdge
from lightning_cpipe.transport.wiring import RECORD_LANES, TENSOR_LANES, UP, Wiring
from lightning_cpipe.tree import TensorSpec
from tests.helpers.ranks import run_ranks
from tests.helpers.wire import CPU

LANES = (*TENSOR_LANES, *RECORD_LANES)
DOWN = tuple(lane for lane in LANES if lane not in UP)


def test_every_lane_of_a_real_pipeline_carries_its_own_messages() -> None:
    """Every stage sends on all its lanes before it receives on any; each lane's message arrives on that lane."""
    p = 3
    spec = TensorSpec((2,), torch.int64)
    numbers = {lane: number for number, lane in enumerate(LANES)}

    def on_rank(rank: int) -> dict[str, list[int]]:
        store = f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=p)
        wired = Wiring(Control(p), [2, 1, 0], p - 1 - rank, CPU, "gloo")
        received: dict[str, list[int]] = {}
        # Fresh ends for a second run, on the same connections.
        for _ in range(2):
            (lanes,) = wired.lanes(in_flight=4)
            for end in lanes.incoming.values():
                end.post([spec])
            for lane, end in lanes.outgoing.items():
                end.send([torch.tensor([rank, numbers[lane]])])
            for name, records in lanes.records_out.items():
                records.send([rank, numbers[name]])
            received = {lane: end.receive()[0].tolist() for lane, end in lanes.incoming.items()}
            received |= {name: records.receive() for name, records in lanes.records_in.items()}
            for end in lanes.outgoing.values():
                end.flush()
        dist.barrier()
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


class Socket:
    """Stands for a connection."""

    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True

    def recv_bytes(self) -> bytes:
        raise OSError("handle is closed")


def wired(monkeypatch: pytest.MonkeyPatch, stage: int, backend: str = "gloo") -> tuple[Wiring, Groups]:
    """A stage of three, without processes."""
    groups = Groups()
    places = [(upper, lane) for upper in (stage - 1, stage) if 0 <= upper < 2 for lane in RECORD_LANES]
    monkeypatch.setattr(wiring, "dist", groups)
    monkeypatch.setattr(wiring, "connect_neighbours", lambda *_: {place: Socket() for place in places})
    monkeypatch.setattr(Wiring, "_warm_up", lambda self: None)
    control: Any = None
    return Wiring(control, [2, 1, 0], stage, CPU, backend), groups


@pytest.mark.parametrize(
    ("stage", "incoming", "outgoing"),
    [(0, UP, DOWN), (1, LANES, LANES), (2, DOWN, UP)],
    ids=["first", "middle", "last"],
)
def test_a_stage_has_ends_where_it_has_neighbours(
    monkeypatch: pytest.MonkeyPatch, stage: int, incoming: tuple[str, ...], outgoing: tuple[str, ...]
) -> None:
    (lanes,) = wired(monkeypatch, stage)[0].lanes(4)
    received: dict[str, Any] = {**lanes.incoming, **lanes.records_in}
    sent: dict[str, Any] = {**lanes.outgoing, **lanes.records_out}
    assert set(received) == set(incoming)
    assert set(sent) == set(outgoing)
    for ends, down, up in ((received, stage - 1, stage + 1), (sent, stage + 1, stage - 1)):
        for lane, end in ends.items():
            assert end._peer == 2 - (down if lane in DOWN else up)
    own = [end._group if isinstance(end, Edge) else end._connection for end in (*received.values(), *sent.values())]
    assert len({id(each) for each in own}) == len(own), "no two ends share a connection"


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_process_makes_every_group_in_the_same_order(monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    _, groups = wired(monkeypatch, stage, "nccl")
    made = [(ranks, backend) for ranks, backend, _ in groups.made]
    assert made == [((2, 1), "nccl")] * 3 + [((1, 0), "nccl")] * 3
    # A gloo wait that runs out breaks the connection for good.
    assert all(timeout.days >= 365 for _, _, timeout in groups.made)


@pytest.mark.parametrize(("backend", "kind"), [("gloo", Edge), ("nccl", NcclEdge)])
def test_tensors_travel_on_the_backend(monkeypatch: pytest.MonkeyPatch, backend: str, kind: type[Edge]) -> None:
    (lanes,) = wired(monkeypatch, 1, backend)[0].lanes(4)
    assert {type(end) for end in (*lanes.incoming.values(), *lanes.outgoing.values())} == {kind}


def test_each_run_gets_fresh_ends_and_an_abandoned_wiring_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = wired(monkeypatch, 1)
    (first,), (second,) = made.lanes(4), made.lanes(4)
    assert not {id(end) for end in first.incoming.values()} & {id(end) for end in second.incoming.values()}
    assert [end._group for end in first.incoming.values()] == [end._group for end in second.incoming.values()]
    connections = list(made._connections.values())
    made.abandon()
    assert all(end._group is None for end in [*second.incoming.values(), *second.outgoing.values()])
    assert all(connection.closed for connection in connections)
    with pytest.raises(RankLostError):
        second.records_in["records"].receive()
