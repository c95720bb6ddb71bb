"""Edges of several stages in one process: what was sent is there at once, and waiting for anything else is an error."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_cpipe.transport import edge
from lightning_cpipe.transport.edge import Edge
from lightning_cpipe.transport.records import Records

CPU = torch.device("cpu")


class Wire:
    """Stands for `torch.distributed` where edges send and receive.

    Attributes:
        works: of everything that was sent or posted, in order.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(edge, "dist", self)
        self.works: list[Work] = []
        self._on_its_way: defaultdict[Any, deque[Any]] = defaultdict(deque)

    def isend(self, tensor: Tensor, dst: int, group: Any) -> Work:
        assert tensor.is_contiguous()
        self._on_its_way[group].append(tensor)
        return self._made(Work())

    def irecv(self, tensor: Tensor, src: int, group: Any) -> Work:
        return self._made(Work(lambda: self._arrive(tensor, group)))

    def ends(self, group: Any, in_flight: int = 8, kind: type[Edge] = Edge) -> tuple[Edge, Edge]:
        """The sending and the receiving end of an edge."""
        return kind(group, 1, CPU, in_flight), kind(group, 0, CPU, in_flight)

    def records(self, group: Any) -> tuple[Records, Records]:
        """The sending and the receiving end for records."""
        line = Line(self._on_its_way[group])
        return Records(line, 1), Records(line, 0)

    def is_empty(self) -> bool:
        """Whether everything that was sent has been received."""
        return not any(self._on_its_way.values())

    def forget(self) -> None:
        """Lose what is on its way."""
        for each in self._on_its_way.values():
            each.clear()

    def _made(self, work: Work) -> Work:
        self.works.append(work)
        return work

    def _arrive(self, buffer: Tensor, group: Any) -> None:
        assert self._on_its_way[group], "nothing was sent: this would wait for ever"
        tensor = self._on_its_way[group].popleft()
        assert (tensor.shape, tensor.dtype) == (buffer.shape, buffer.dtype)
        buffer.copy_(tensor)


class Line:
    """Stands for both ends of a `multiprocessing.connection.Connection`."""

    def __init__(self, on_its_way: deque[bytes]) -> None:
        self._on_its_way = on_its_way

    def send_bytes(self, payload: bytes) -> None:
        self._on_its_way.append(payload)

    def recv_bytes(self) -> bytes:
        assert self._on_its_way, "nothing was sent: this would wait for ever"
        return self._on_its_way.popleft()


class Work:
    """Stands for `torch.distributed.Work`.

    Attributes:
        waits: how often it was waited for.
        completed: what it says of itself.
        fails: whether waiting for it does.
    """

    def __init__(self, then: Any = lambda: None) -> None:
        self.waits = 0
        self.completed = False
        self.fails = False
        self._then = then

    def wait(self) -> None:
        if self.fails:
            raise RuntimeError("Connection closed by peer")
        if not self.waits:
            self._then()
        self.waits += 1

    def is_completed(self) -> bool:
        return self.completed
