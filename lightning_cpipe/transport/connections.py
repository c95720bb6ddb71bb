"""Connects processes by sockets: each stage with its neighbours, and all ranks with rank 0.

Through a process group, a record would cost each end two messages and wake two further threads. Through a socket it
is one write and one read, which counts where a mini-batch takes milliseconds or stages share cores.
"""

from __future__ import annotations

import logging
import secrets
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any, TypeVar

from lightning_cpipe.errors import RankLostError
from lightning_cpipe.transport.control import Control
from lightning_cpipe.transport.machine import this_machine

log = logging.getLogger(__name__)

Which = TypeVar("Which")

_HERE = "127.0.0.1"
_EVERYWHERE = ""


def connect_neighbours(
    control: Control, ranks: Sequence[int], place: int, lanes: Sequence[str]
) -> dict[tuple[int, str], Connection]:
    """One connection for each lane to each neighbour; all ranks must call it.

    Args:
        control: of all ranks.
        ranks: the global rank at each place, in the order of the stages; one may have several places.
        place: one of this process's.
        lanes: their names.

    Returns:
        This process's ends, by the earlier place of the two and the lane.

    Raises:
        RankLostError: if a neighbour can't be reached.
    """
    mine = ranks[place]
    calls, answers = _calls_and_answers(ranks, mine)
    # The first rank calls nobody and answers at once; then the second is free to answer, and so on.
    to_call = {(upper, lane): peer for upper, peer in calls.items() for lane in lanes}
    return _connect(control, mine, to_call, len(answers) * len(lanes))


def connect_to_first(control: Control, rank: int, num_ranks: int) -> dict[int, Connection]:
    """One connection between rank 0 and each other of the first ranks; all ranks must call it.

    Args:
        control: of all ranks.
        rank: this process's.
        num_ranks: how many are connected.

    Returns:
        This process's ends, by the rank that is not rank 0.

    Raises:
        RankLostError: if rank 0 can't be reached.
    """
    calls = {rank: 0} if 0 < rank < num_ranks else {}
    return _connect(control, rank, calls, num_ranks - 1 if rank == 0 else 0)


def _connect(control: Control, mine: int, calls: Mapping[Which, int], num_answers: int) -> dict[Which, Connection]:
    """Call some ranks and answer others.

    Those on one machine meet at its loopback address; otherwise a rank is called by the name of its machine. Only who
    knows this run's key is let in.

    Args:
        control: of all ranks.
        mine: this process's rank.
        calls: the connections to call for, each with the rank that is called.
        num_answers: how many calls will come.
    """
    machines = control.compare(this_machine())
    key = control.share(secrets.token_bytes(32))
    found: dict[Which, Connection] = {}
    address = _HERE if all(each == machines[mine] for each in machines) else _EVERYWHERE
    with Listener((address, 0), backlog=max(1, num_answers), authkey=key) as listener:
        places = control.compare((socket.gethostname(), listener.address[1]))
        for which, peer in calls.items():
            host, port = places[peer]
            found[which] = _call(_HERE if machines[peer] == machines[mine] else host, port, key, peer)
            found[which].send(which)
        for _ in range(num_answers):
            # Several may call at the same time.
            connection, which = _answer(listener)
            found[which] = connection
    for connection in found.values():
        _send_at_once(connection)
    return found


def _calls_and_answers(ranks: Sequence[int], mine: int) -> tuple[dict[int, int], dict[int, int]]:
    """The pairs of neighbours in which a rank calls and those in which it answers: the earlier place, and the peer.

    Of two ranks that one calls whose first place comes later.
    """
    calls: dict[int, int] = {}
    answers: dict[int, int] = {}
    for upper, pair in enumerate(pairwise(ranks)):
        if mine in pair:
            (peer,) = {*pair} - {mine}
            (calls if ranks.index(peer) < ranks.index(mine) else answers)[upper] = peer
    return calls, answers


def _call(host: str, port: int, key: bytes, peer: int) -> Connection:
    try:
        return Client((host, port), authkey=key)
    except (OSError, EOFError) as error:
        raise RankLostError(
            f"rank {peer} can't be reached at {host}, port {port} ({error}): the machines must find each other by"
            " their host names.",
            peer,
        ) from error


def _answer(listener: Listener) -> tuple[Connection, Any]:
    while True:
        try:
            connection = listener.accept()
            return connection, connection.recv()
        except (AuthenticationError, EOFError, ConnectionError):
            log.warning("somebody who does not belong to this run called at port %d", listener.address[1])


def _send_at_once(connection: Connection) -> None:
    """By default, a small message waits until the one before it has been acknowledged."""
    with line_of(connection) as line:
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


@contextmanager
def line_of(connection: Connection) -> Iterator[socket.socket]:
    """The socket under a connection: bytes go by it without a copy."""
    line = socket.socket(fileno=connection.fileno())
    # Under `socket.setdefaulttimeout` it would have become one that does not wait, and the connection with it.
    line.settimeout(None)
    try:
        yield line
    finally:
        line.detach()
