"""Small records beside the tensors, on the CPU: what a mini-batch was, what the last stage decided.

A record is any picklable object. It travels in a frame of fixed size, so that its receive can always be posted ahead
and it costs one message; a larger one (new shapes, told once) takes a second message of its own size.
"""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch import Tensor

from lightning_cpipe.transport.edge import Edge
from lightning_cpipe.tree import TensorSpec

FRAME = 2048
"""Bytes."""

_HEAD = 4


class Records:
    """One direction between two neighbours for records. One rank only sends, the other only receives."""

    def __init__(self, edge: Edge, *, receives: bool) -> None:
        self._edge = edge
        if receives:
            self._edge.post([_FRAME_SPEC])

    def send(self, record: Any) -> None:
        """Send a record. Returns at once."""
        payload = pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL)
        head = len(payload).to_bytes(_HEAD, "little")
        if len(payload) <= FRAME - _HEAD:
            self._edge.send([_tensor(head + payload, FRAME)])
        else:
            self._edge.send([_tensor(head, FRAME)])
            self._edge.send([_tensor(payload, len(payload))])

    def receive(self) -> Any:
        """The next record; waits until it is there."""
        record = self._receive()
        self._edge.post([_FRAME_SPEC])
        return record

    def send_last(self) -> None:
        """Say that nothing more will come. Returns at once: the other end has posted for it."""
        self.send(_NOTHING_MORE)

    def discard(self) -> int:
        """Receive and forget what comes until the other end has said that nothing more will.

        Returns:
            How many records were forgotten.
        """
        forgotten = 0
        while self._receive() != _NOTHING_MORE:
            self._edge.post([_FRAME_SPEC])
            forgotten += 1
        return forgotten

    def _receive(self) -> Any:
        frame = self._edge.receive()[0].numpy().tobytes()
        size = int.from_bytes(frame[:_HEAD], "little")
        if size <= FRAME - _HEAD:
            return pickle.loads(frame[_HEAD : _HEAD + size])
        self._edge.post([TensorSpec((size,), torch.uint8)])
        return pickle.loads(self._edge.receive()[0].numpy().tobytes())


_FRAME_SPEC = TensorSpec((FRAME,), torch.uint8)
_NOTHING_MORE = "nothing more"


def _tensor(payload: bytes, size: int) -> Tensor:
    return torch.frombuffer(bytearray(payload.ljust(size, b"\0")), dtype=torch.uint8)
