"""Lanes between two stages of one process: what one stage hands over, the other takes as it would come by message.

Both ends are one object. Tensors are copied all the same: what a stage sends may be a view of its weights or of its
batch, which change, and a copy has the layout in memory that a message has, by which some operations round.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_cpipe.transport.edge import Edge
from lightning_cpipe.transport.records import Records
from lightning_cpipe.tree import TensorSpec


class InnerEdge(Edge):
    """Both ends of a lane for tensors."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(None, -1, device)
        self._handed: deque[list[Tensor]] = deque()
        self._asked: deque[Sequence[TensorSpec]] = deque()

    @override
    def send(self, tensors: Sequence[Tensor]) -> None:
        self._handed.append([each.detach().clone(memory_format=torch.contiguous_format) for each in tensors])

    @override
    def post(self, specs: Sequence[TensorSpec]) -> None:
        self._asked.append(specs)

    @override
    def receive(self) -> list[Tensor]:
        return [spec.laid_out(tensor) for spec, tensor in zip(self._asked.popleft(), self._handed.popleft())]

    @property
    @override
    def posted(self) -> int:
        return len(self._asked)


class InnerRecords(Records):
    """Both ends of a lane for records."""

    def __init__(self) -> None:
        self._handed: deque[Any] = deque()

    @override
    def send(self, record: Any) -> None:
        self._handed.append(record)

    @override
    def receive(self) -> Any:
        return self._handed.popleft()
