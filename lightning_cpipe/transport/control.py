"""All ranks together, on the CPU: for what happens before and after streaming. In between, only flushes use it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from lightning_cpipe.errors import RankLostError

Content = TypeVar("Content")

NEVER = timedelta(days=365)
"""The timeout of every group. On gloo a wait that runs out breaks the connection for good; liveness is watched beside
the groups, not by them."""


class Control:
    """The gloo group of all ranks. With a single rank there is no group, and every call is about that one.

    Args:
        num_ranks: how many there are.
    """

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._group = dist.new_group(backend="gloo", timeout=NEVER) if num_ranks > 1 else None

    def close(self) -> None:
        """Let go of the group; of no use afterwards."""
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self._group is not None:
            _connected(lambda: dist.barrier(group=self._group))

    def share(self, content: Content) -> Content:
        """What rank 0 has, on every rank."""
        box = [content]
        if self._group is not None:
            _connected(lambda: dist.broadcast_object_list(box, 0, group=self._group))
        return box[0]

    def share_tensors(self, tensors: Iterable[Tensor], source: int = 0) -> None:
        """One rank's numbers, into every rank's tensors; they must be on the CPU."""
        if self._group is None:
            return
        for tensor in tensors:
            # A copy, where the tensor's memory has gaps.
            dense = tensor.contiguous()
            _connected(partial(dist.broadcast, dense, source, group=self._group))
            if dense is not tensor:
                tensor.copy_(dense)

    def collect(self, content: Content) -> list[Content]:
        """What all ranks have, in their order, on rank 0; an empty list elsewhere."""
        if self._group is None:
            return [content]
        boxes: list[Any] | None = [None] * self._num_ranks if dist.get_rank() == 0 else None
        _connected(lambda: dist.gather_object(content, boxes, 0, group=self._group))
        return boxes or []

    def compare(self, content: Content) -> list[Content]:
        """What all ranks have, in their order, on every rank."""
        if self._group is None:
            return [content]
        boxes: list[Any] = [None] * self._num_ranks
        _connected(lambda: dist.all_gather_object(boxes, content, group=self._group))
        return boxes


def _connected(operation: Callable[[], object]) -> None:
    try:
        operation()
    except RuntimeError as error:
        raise RankLostError("a rank is gone") from error
