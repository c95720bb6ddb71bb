"""A lane for tensors between two neighbours: sent in order without waiting, received after being posted ahead.

Every lane has a process group of its own. On NCCL tags are ignored and one communicator takes its messages in order,
so a shared one would serialise both directions; and with two stages, the neighbour before is the neighbour after.
What counts on a lane is only that both ends take the messages in the same order, so messages carry no header.

A message may take as long as a validation, and torch's profiler must not see it begin (see `unprofiled`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_cpipe.errors import RankLostError
from lightning_cpipe.torch_private import unprofiled
from lightning_cpipe.tree import TensorSpec


class _Message(NamedTuple):
    tensors: list[Tensor]
    works: list[dist.Work]
    specs: Sequence[TensorSpec] = ()


class Edge:
    """One end of a lane; one rank only sends on it and the other only receives.

    Args:
        group: the lane's own process group, of two ranks; None where both ends are in one process (see `within`).
        peer: the other one's global rank.
        device: where received tensors are made.
        in_flight: how many messages may be on their way; the sender waits for the oldest beyond that.
    """

    def __init__(self, group: dist.ProcessGroup | None, peer: int, device: torch.device, in_flight: int = 8) -> None:
        self._group = group
        self._peer = peer
        self._device = device
        self._in_flight = in_flight
        self._sent: deque[_Message] = deque()
        self._posted: deque[_Message] = deque()
        self.messages = 0
        """Messages sent, or posted for, so far."""
        self.latest: deque[tuple[int, list[TensorSpec]]] = deque(maxlen=in_flight)
        """Number and specs of the latest ones."""

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Send a message. Returns at once; the tensors are kept until they have left."""
        kept = [tensor.detach().contiguous() for tensor in tensors]
        self._sent.append(_Message(kept, [self._isend(tensor) for tensor in kept]))
        self._count([TensorSpec.of(tensor) for tensor in kept])
        self._reap(self._in_flight)

    def post(self, specs: Sequence[TensorSpec]) -> None:
        """Make room for the next message. Returns at once."""
        buffers = [torch.empty(spec.shape, dtype=spec.dtype, device=self._device) for spec in specs]
        self._posted.append(_Message(buffers, [self._irecv(buffer) for buffer in buffers], specs))
        self._count(list(specs))

    def receive(self) -> list[Tensor]:
        """The oldest message that was posted; waits until it is there."""
        message = self._posted.popleft()
        for work in message.works:
            self._wait(work)
        return [spec.laid_out(tensor) for spec, tensor in zip(message.specs, message.tensors)]

    def send_filler(self, specs: Sequence[TensorSpec]) -> None:
        """Send a message of these specs that nobody will look at."""
        self.send([torch.zeros(spec.shape, dtype=spec.dtype, device=self._device) for spec in specs])

    @property
    def posted(self) -> int:
        """How many messages are posted and not yet received."""
        return len(self._posted)

    def flush(self) -> None:
        """Wait until everything sent has left."""
        self._reap(0)

    def abandon(self) -> None:
        """Let go of everything, whatever is on its way; the edge is of no use afterwards."""
        self._group = None
        self._sent.clear()
        self._posted.clear()

    def _count(self, specs: list[TensorSpec]) -> None:
        self.latest.append((self.messages, specs))
        self.messages += 1

    def _reap(self, limit: int) -> None:
        # On gloo a work never says that it is completed before it was waited for; the oldest is done by now.
        while len(self._sent) > limit:
            for work in self._sent.popleft().works:
                self._wait(work)

    def _isend(self, tensor: Tensor) -> dist.Work:
        return self._begun(partial(dist.isend, tensor, dst=self._peer, group=self._group))

    def _irecv(self, buffer: Tensor) -> dist.Work:
        return self._begun(partial(dist.irecv, buffer, src=self._peer, group=self._group))

    def _begun(self, begin: Callable[[], dist.Work | None]) -> dist.Work:
        try:
            work = unprofiled(begin)
        except RuntimeError as error:
            raise self._lost() from error
        assert work is not None
        return work

    def _wait(self, work: dist.Work) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise self._lost() from error

    def _lost(self) -> RankLostError:
        return RankLostError(f"the connection to rank {self._peer} broke", self._peer)


_LOOK_S = 1e-4


class NcclEdge(Edge):
    """The same on NCCL, where waiting means that the current stream waits, and the process does not.

    Not yet run on a GPU. The order in which it issues its operations is that of `Edge`, and is tested.
    """

    def _reap(self, limit: int) -> None:
        # Waiting for a send would make the stage's own stream wait. So a completed one is let go, and beyond the limit
        # the process waits until one is; only at the end the stream may wait, too.
        while self._sent and (len(self._sent) > limit > 0 or self._is_oldest_completed):
            if self._is_oldest_completed:
                self._sent.popleft()
            else:
                # NCCL has no wait that holds up the process and not the stream. Reached only beyond what the plan sends
                # ahead, where there is nothing to do but to wait.
                time.sleep(_LOOK_S)
        if limit == 0:
            super()._reap(0)

    @property
    def _is_oldest_completed(self) -> bool:
        return all(work.is_completed() for work in self._sent[0].works)
