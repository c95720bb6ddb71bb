"""Connects each stage with its neighbours by sockets, for the small records that go beside the tensors.

Through a process group, a record would cost each end two messages and wake two further threads. Through a socket it
is one write and one read, which counts where a mini-batch takes milliseconds or stages share cores.
"""

from __future__ import annotations

import logging
import secrets
import socket
from collections.abc import Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener

from lightning_cpipe.errors import RankLostError
from lightning_cpipe.transport.control import Control
from lightning_cpipe.transport.machine import this_machine

log = logging.getLogger(__name__)

_HERE = "127.0.0.1"
_EVERYWHERE = ""


def connect_neighbours(
    control: Control, ranks: Sequence[int], stage: int, lanes: Sequence[str]
) -> dict[tuple[int, str], Connection]:
    """One connection for each lane to each neighbour; all ranks must call it.

    Neighbours on one machine meet at its loopback address; otherwise the later stage calls the earlier one by the name
    of its machine. Only who knows this run's key is let in.

    Args:
        control: of all ranks.
        ranks: the global rank of each stage, in the order of the stages.
        stage: this process's.
        lanes: their names.

    Returns:
        This process's ends, by the earlier stage of the two and the lane.

    Raises:
        RankLostError: if a neighbour can't be reached.
    """
    machines = control.compare(this_machine())
    is_here = [machines[rank] == machines[ranks[stage]] for rank in ranks]
    key = control.share(secrets.token_bytes(32))
    found: dict[tuple[int, str], Connection] = {}
    with Listener((_HERE if all(is_here) else _EVERYWHERE, 0), backlog=len(lanes), authkey=key) as listener:
        places = control.compare((socket.gethostname(), listener.address[1]))
        # The first stage calls nobody and answers at once; then the second is free to answer, and so on.
        if stage > 0:
            host, port = places[ranks[stage - 1]]
            for lane in lanes:
                found[stage - 1, lane] = _call(_HERE if is_here[stage - 1] else host, port, key, ranks[stage - 1])
        if stage < len(ranks) - 1:
            # One caller, who makes one call after the other.
            for lane in lanes:
                found[stage, lane] = _answer(listener)
    for connection in found.values():
        _send_at_once(connection)
    return found


def _call(host: str, port: int, key: bytes, peer: int) -> Connection:
    try:
        return Client((host, port), authkey=key)
    except (OSError, EOFError) as error:
        raise RankLostError(
            f"rank {peer} can't be reached at {host}, port {port} ({error}): the machines must find each other by"
            " their host names.",
            peer,
        ) from error


def _answer(listener: Listener) -> Connection:
    while True:
        try:
            return listener.accept()
        except (AuthenticationError, EOFError, ConnectionError):
            log.warning("somebody who does not belong to this run called at port %d", listener.address[1])


def _send_at_once(connection: Connection) -> None:
    """By default, a small message waits until the one before it has been acknowledged."""
    with socket.socket(fileno=connection.fileno()) as view:
        view.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        view.detach()
