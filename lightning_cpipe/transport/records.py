"""Small records beside the tensors, on the CPU: what a mini-batch was, what the last stage decided."""

from __future__ import annotations

import pickle
from multiprocessing.connection import Connection
from typing import Any

from lightning_cpipe.errors import RankLostError


class Records:
    """One end of a lane for records; one rank only sends on it and the other only receives.

    A record is any picklable object. It may be of any size, but a sender waits when more than the socket holds (some
    100 KB) is on its way.

    Args:
        connection: this end.
        peer: the other one's global rank.
    """

    def __init__(self, connection: Connection, peer: int) -> None:
        self._connection = connection
        self._peer = peer

    def send(self, record: Any) -> None:
        """Send a record. Returns at once."""
        try:
            self._connection.send_bytes(pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL))
        except OSError as error:
            raise self._lost() from error

    def receive(self) -> Any:
        """The next record; waits until it is there."""
        try:
            return pickle.loads(self._connection.recv_bytes())
        except (OSError, EOFError) as error:
            raise self._lost() from error

    def is_there(self) -> bool:
        """Whether a record is there; does not wait."""
        try:
            return self._connection.poll()
        except (OSError, EOFError) as error:
            raise self._lost() from error

    def send_last(self) -> None:
        """Say that nothing more will come. Returns at once."""
        self.send(_NOTHING_MORE)

    def discard(self) -> int:
        """Receive and forget what comes until the other end has said that nothing more will.

        Returns:
            How many records were forgotten.
        """
        forgotten = 0
        while self.receive() != _NOTHING_MORE:
            forgotten += 1
        return forgotten

    def _lost(self) -> RankLostError:
        return RankLostError(f"the connection to rank {self._peer} broke", self._peer)


_NOTHING_MORE = "nothing more"
