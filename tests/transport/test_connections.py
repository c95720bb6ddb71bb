"""Neighbours find each other, on one machine and across machines, and let nobody else in."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
from collections.abc import Callable
from itertools import pairwise
from multiprocessing.connection import Client, Connection
from typing import Any

import pytest
import torch.distributed as dist

from lightning_cpipe.errors import RankLostError
from lightning_cpipe.transport import connections
from lightning_cpipe.transport.connections import connect_neighbours
from lightning_cpipe.transport.control import Control
from tests.helpers.ranks import run_ranks

LANES = ("up", "down")


def connected(p: int, then: Callable[[int, dict[tuple[int, str], Connection]], Any]) -> list[Any]:
    """What `then(stage, connections)` returns in each of p processes, the first stage's first."""

    def on_rank(rank: int) -> Any:
        store = f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=p)
        stage = p - 1 - rank
        found = connect_neighbours(Control(p), list(reversed(range(p))), stage, LANES)
        try:
            return then(stage, found)
        finally:
            dist.barrier()
            for connection in found.values():
                connection.close()
            dist.destroy_process_group()

    return list(reversed(run_ranks(on_rank, p)))


def greet(stage: int, found: dict[tuple[int, str], Connection]) -> dict[tuple[int, str], Any]:
    for (upper, lane), connection in found.items():
        connection.send((stage, upper, lane))
    return {place: connection.recv() for place, connection in found.items()}


@pytest.mark.parametrize("p", [2, 4])
def test_every_lane_connects_two_neighbours(p: int) -> None:
    heard = connected(p, greet)
    for stage, found in enumerate(heard):
        uppers = [upper for upper in (stage - 1, stage) if 0 <= upper < p - 1]
        assert found == {
            (upper, lane): (upper + 1 if upper == stage else upper, upper, lane) for upper in uppers for lane in LANES
        }


def test_a_rank_may_have_several_places() -> None:
    """The last rank comes before the first one again, and each two have several lanes."""
    ranks = [2, 1, 0, 2, 1, 0]

    def on_rank(rank: int) -> dict[tuple[int, str], Any]:
        store = f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=3)
        found = connect_neighbours(Control(3), ranks, ranks.index(rank), LANES)
        heard = greet(rank, found)
        dist.barrier()
        for connection in found.values():
            connection.close()
        dist.destroy_process_group()
        return heard

    for rank, heard in enumerate(run_ranks(on_rank, 3)):
        pairs = {upper: {*pair} - {rank} for upper, pair in enumerate(pairwise(ranks)) if rank in pair}
        assert heard == {(upper, lane): (*peer, upper, lane) for upper, peer in pairs.items() for lane in LANES}


def test_ranks_of_other_machines_are_called_by_their_host_names(monkeypatch: pytest.MonkeyPatch) -> None:
    called = multiprocessing.get_context("fork").SimpleQueue()

    def client(address: tuple[str, int], authkey: bytes) -> Connection:
        called.put(address[0])
        # Whatever this machine's name means to its resolver.
        return Client(("127.0.0.1", address[1]), authkey=authkey)

    monkeypatch.setattr(connections, "this_machine", lambda: [str(os.getpid())])
    monkeypatch.setattr(connections, "Client", client)
    assert [len(found) for found in connected(2, greet)] == [2, 2]
    assert [called.get() for _ in LANES] == [socket.gethostname()] * 2


def test_small_records_do_not_wait_for_each_other() -> None:
    def no_delay(stage: int, found: dict[tuple[int, str], Connection]) -> list[int]:
        def option(connection: Connection) -> int:
            with socket.fromfd(connection.fileno(), socket.AF_INET, socket.SOCK_STREAM) as view:
                return view.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

        return [option(connection) for connection in found.values()]

    assert connected(2, no_delay) == [[1, 1], [1, 1]]


class Alone:
    """Stands for the control group of two ranks, of which the other one says what it is told to."""

    def __init__(self, other: Callable[[Any], Any]) -> None:
        self._other = other

    def compare(self, content: Any) -> list[Any]:
        return [content, self._other(content)]

    def share(self, content: Any) -> Any:
        return content


def test_a_neighbour_that_can_not_be_reached_is_named() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        control: Any = Alone(lambda mine: mine if isinstance(mine, list) else (mine[0], port))
        with pytest.raises(RankLostError, match=rf"rank 1 can't be reached at 127\.0\.0\.1, port {port}") as raised:
            connect_neighbours(control, [1, 0], 1, LANES)
    assert raised.value.lost == 1


def test_a_stranger_is_not_let_in(caplog: pytest.LogCaptureFixture) -> None:
    key = b"known to this run"
    callers: list[threading.Thread] = []
    came: list[Any] = []

    def call(port: int) -> None:
        with pytest.raises(multiprocessing.AuthenticationError):
            Client(("127.0.0.1", port), authkey=b"guessed")
        for lane in LANES:
            came.append(Client(("127.0.0.1", port), authkey=key))
            came[-1].send((0, lane))

    class Callers(Alone):
        def share(self, content: Any) -> Any:
            return key

    def other(mine: Any) -> Any:
        if isinstance(mine, tuple):
            callers.append(threading.Thread(target=call, args=(mine[1],)))
            callers[0].start()
        return mine

    control: Any = Callers(other)
    found = connect_neighbours(control, [0, 1], 0, LANES)
    callers[0].join()
    assert "somebody who does not belong to this run" in caplog.text
    for theirs, lane in zip(came, LANES):
        theirs.send(lane)
        assert found[0, lane].recv() == lane
    for connection in (*came, *found.values()):
        connection.close()
