"""Connects the ranks that hold the same stages of pipelines side by side: a rank and its *counterparts*.

They train the same weights on different data. Each line of counterparts has two process groups: one in which gradients
are summed, and one for whatever is averaged or gathered by name, such as metrics, which need not wait behind gradients.
Beside them two rows of sockets run from the first pipeline to the last one and back:

    words      replica k     -> replica k + 1   what rank 0 says, for all
    requests   replica k + 1 -> replica k       what signals ask for
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_cpipe.errors import RankLostError
from lightning_cpipe.transport.connections import connect_neighbours
from lightning_cpipe.transport.control import NEVER, Control
from lightning_cpipe.transport.records import Records

_LANES = ("words", "requests")

_OPERATIONS = {
    "mean": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.SUM,
    "sum": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}


class Counterparts:
    """A rank and its counterparts, seen from that rank; all ranks must make theirs together.

    Args:
        control: of all ranks.
        rank: this one.
        num_ranks: of one pipeline.
        num_replicas: pipelines side by side.
        device: where the rank computes.
        backend: of the process groups.
    """

    def __init__(
        self, control: Control, rank: int, num_ranks: int, num_replicas: int, device: torch.device, backend: str
    ) -> None:
        self.replica, line = divmod(rank, num_ranks)
        self.num_replicas = num_replicas
        lines = [[first + replica * num_ranks for replica in range(num_replicas)] for first in range(num_ranks)]
        # Every process takes part in making every group, in this order.
        groups = [[dist.new_group(ranks, timeout=NEVER, backend=backend) for _ in range(2)] for ranks in lines]
        self._groups: list[dist.ProcessGroup] = groups[line]
        self._connections = connect_neighbours(control, lines[line], self.replica, _LANES)
        self._ranks = lines[line]
        for group in groups[line]:
            # NCCL makes a communicator at its first operation; here the order is the same everywhere.
            dist.all_reduce(torch.zeros(1, device=device), group=group)

    @property
    def group(self) -> dist.ProcessGroup:
        """The one for whatever is averaged or gathered by name."""
        return self._groups[1]

    def start_sum(self, flat: Tensor) -> Callable[[], None]:
        """Begin to add up gradients in place; all counterparts must do so in the same order.

        Returns:
            What waits until it is done; on a GPU, lets the current stream wait.
        """
        work = _connected(lambda: dist.all_reduce(flat, group=self._groups[0], async_op=True))

        def wait() -> None:
            _connected(work.wait)

        return wait

    def reduce(self, tensor: Tensor, operation: str) -> Tensor:
        """One tensor out of those of all counterparts, who must all call it.

        Args:
            tensor: this rank's; it stays as it is.
            operation: ``mean`` (or ``avg``), ``sum``, ``max`` or ``min``.

        Raises:
            ValueError: if there is no such operation.
        """
        if operation not in _OPERATIONS:
            raise ValueError(f"reduce_op={operation!r}: there are {', '.join(map(repr, _OPERATIONS))}.")
        found = tensor.detach().clone(memory_format=torch.contiguous_format)
        _connected(lambda: dist.all_reduce(found, op=_OPERATIONS[operation], group=self.group))
        return found / self.num_replicas if operation in ("mean", "avg") else found

    def words(self) -> tuple[Records | None, Records | None]:
        """Fresh ends for one run: where words come from, and where they go to."""
        return self._from_previous("words"), self._from_next("words")

    def requests(self) -> tuple[Records | None, Records | None]:
        """Fresh ends for one run: where requests come from, and where they go to."""
        return self._from_next("requests"), self._from_previous("requests")

    def close(self) -> None:
        """Let go of all connections; nothing may be on its way."""
        if dist.is_initialized():
            for group in self._groups:
                dist.destroy_process_group(group)
        self.abandon()

    def abandon(self) -> None:
        """Let go of everything, whatever is on its way: ranks that wait for this one learn of it at once."""
        # A group's connections break when nobody holds it any more.
        self._groups.clear()
        self.disconnect()

    def disconnect(self) -> None:
        """Close the sockets."""
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()

    def _from_previous(self, lane: str) -> Records | None:
        upper = self.replica - 1
        return None if upper < 0 else Records(self._connections[upper, lane], self._ranks[upper])

    def _from_next(self, lane: str) -> Records | None:
        after = self.replica + 1
        return (
            None if after == self.num_replicas else Records(self._connections[self.replica, lane], self._ranks[after])
        )


def _connected(operation: Callable[[], object]) -> dist.Work:
    try:
        return operation()  # type: ignore[return-value]
    except RuntimeError as error:
        raise RankLostError("a rank that holds the same stages in another pipeline is gone") from error
