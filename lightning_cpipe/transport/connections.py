"""Connects each stage with its neighbours by sockets, for the small records that go beside the tensors.

Through a process group, a record would cost each end two messages and wake two further threads. Through a socket it
is one write and one read, which counts where a mini-batch takes milliseconds or stages share cores.
"""

from __future__ import annotations

import logging
import secrets
import socket
from collections.abc import Sequence
from itertools import pairwise
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener

from lightning_cpipe.errors import RankLostError
from lightning_cpipe.transport.control import Control
from lightning_cpipe.transport.machine import this_machine

log = logging.getLogger(__name__)

_HERE = "127.0.0.1"
_EVERYWHERE = ""


def connect_neighbours(
    control: Control, ranks: Sequence[int], place: int, lanes: Sequence[str]
) -> dict[tuple[int, str], Connection]:
    """One connection for each lane to each neighbour; all ranks must call it.

    Neighbours on one machine meet at its loopback address; otherwise the later one calls the earlier one by the name
    of its machine. Only who knows this run's key is let in.

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
    machines = control.compare(this_machine())
    mine = ranks[place]
    is_here = {rank: machines[rank] == machines[mine] for rank in ranks}
    calls, answers = _calls_and_answers(ranks, mine)
    key = control.share(secrets.token_bytes(32))
    found: dict[tuple[int, str], Connection] = {}
    address = _HERE if all(is_here.values()) else _EVERYWHERE
    backlog = max(1, len(answers)) * len(lanes)
    with Listener((address, 0), backlog=backlog, authkey=key) as listener:
        places = control.compare((socket.gethostname(), listener.address[1]))
        # The first rank calls nobody and answers at once; then the second is free to answer, and so on.
        for upper, peer in calls.items():
            host, port = places[peer]
            for lane in lanes:
                found[upper, lane] = _call(_HERE if is_here[peer] else host, port, key, peer)
                found[upper, lane].send((upper, lane))
        for _ in range(len(answers) * len(lanes)):
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


def _answer(listener: Listener) -> tuple[Connection, tuple[int, str]]:
    while True:
        try:
            connection = listener.accept()
            return connection, connection.recv()
        except (AuthenticationError, EOFError, ConnectionError):
            log.warning("somebody who does not belong to this run called at port %d", listener.address[1])


def _send_at_once(connection: Connection) -> None:
    """By default, a small message waits until the one before it has been acknowledged."""
    with socket.socket(fileno=connection.fileno()) as view:
        view.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        view.detach()
