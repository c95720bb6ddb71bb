"""Brings large things from all ranks to rank 0 in the background: nobody waits while they are on their way.

Each process has one thread for it. It sends what was given, or on rank 0 receives what all others gave, in the order
of giving. A tensor goes as the bytes that it is in memory, and comes with its strides.
"""

from __future__ import annotations

import pickle
import socket
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_cpipe.errors import RankLostError, SaveError
from lightning_cpipe.transport.connections import connect_to_first, line_of
from lightning_cpipe.transport.control import Control
from lightning_cpipe.tree import flatten

Content = TypeVar("Content")


class Parcels:
    """One process's end. All ranks must give alike, in the same order.

    Args:
        control: of all ranks; all must make their ends at once.
        rank: this process's.
        num_givers: how many give, the first of the ranks; with one, nothing is on its way.
        num_all: how many give what is asked of all; as many if not told.

    Attributes:
        gathers: whether what is given comes to this process: to rank 0.
        patience: seconds after which rank 0 says what it waits for, and goes on waiting.
        most: how many may be on their way, or to be done afterwards; who gives one more waits for the oldest, lest they
            fill the memory.
    """

    def __init__(self, control: Control, rank: int, num_givers: int, num_all: int | None = None) -> None:
        self.patience = 60.0
        self.most = 6
        self.gathers = rank == 0
        self._rank = rank
        self._num_givers = num_givers
        self._num_all = num_givers if num_all is None else num_all
        self._connections = connect_to_first(control, rank, self._num_all) if self._num_all > 1 else {}
        self._under_way: deque[Future[Any]] = deque()
        self._thread: ThreadPoolExecutor | None = None

    @property
    def is_alone(self) -> bool:
        """Whether there is no other rank."""
        return not self._connections

    def give(self, topic: str, of_rank: Callable[[], Content], *, of_all: bool = False) -> Future[list[Content]]:
        """Let rank 0 have something.

        Args:
            topic: what it is; the same on all ranks.
            of_rank: makes it, at once: any nested structure, which must not change any more. Ranks that do not give are
                not asked.
            of_all: whether all ranks give it.

        Returns:
            On rank 0, what all of them gave, in their order, once it is there; elsewhere an empty list, once it is
            sent.
        """
        givers = self._num_all if of_all else self._num_givers
        if self._rank >= givers or givers == 1:
            alone: Future[list[Content]] = Future()
            alone.set_result([of_rank()] if self._rank < givers else [])
            return alone
        content = of_rank()
        return self.afterwards(
            lambda: self._receive(topic, content, givers) if self.gathers else self._send(topic, content)
        )

    def afterwards(self, action: Callable[[], Content]) -> Future[Content]:
        """Do something in the background, after all that was given before has come."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="lightning_cpipe-parcels")
        done = self._thread.submit(action)
        self._under_way.append(done)
        while len(self._under_way) > self.most or self._under_way[0].done():
            # What went wrong is told to who looks at the result.
            self._under_way.popleft().exception()
            if not self._under_way:
                break
        return done

    def settle(self) -> None:
        """Wait until nothing is on its way.

        Raises:
            RankLostError: if something did not come.
        """
        while self._under_way:
            self._under_way.popleft().result()

    def abandon(self) -> None:
        """Break the connections: only what has reached rank 0 by now comes."""
        for connection in self._connections.values():
            with suppress(OSError), line_of(connection) as line:
                line.shutdown(socket.SHUT_RDWR)
        self._under_way.clear()

    def rest(self, *, waits: bool = True) -> None:
        """Let go of the thread, once it has done what it was given; the next parcel gets another one."""
        if self._thread is not None:
            self._thread.shutdown(wait=waits, cancel_futures=not waits)
            self._thread = None

    def close(self) -> None:
        """Let go of thread and connections; nothing may be on its way."""
        self.rest()
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()

    def _send(self, topic: str, content: Any) -> list[Any]:
        (connection,) = self._connections.values()
        with _to(0):
            _send(connection, topic, content)
        return []

    def _receive(self, topic: str, own: Any, givers: int) -> list[Any]:
        everyones = [own]
        for rank, connection in sorted(self._connections.items())[: givers - 1]:
            with _to(rank):
                if not connection.poll(self.patience):
                    _warn_of_waiting(topic, rank, self.patience)
                theirs, content = _receive(connection)
            if theirs != topic:
                raise SaveError(
                    f"rank 0 saves {topic} and rank {rank} saves {theirs}: all ranks must save alike. Call"
                    " `trainer.save_checkpoint` on every rank, not only where `trainer.is_global_zero`."
                )
            everyones.append(content)
        return everyones


def _warn_of_waiting(topic: str, rank: int, seconds: float) -> None:
    warnings.warn(
        f"rank 0 has waited {seconds:g} seconds for what rank {rank} gives to a checkpoint ({topic}), and goes on"
        " waiting. If nothing moves, only some ranks save: call `trainer.save_checkpoint` on every rank, not only where"
        " `trainer.is_global_zero`.",
        stacklevel=2,
    )


class _Memory(NamedTuple):
    """A tensor that fills its memory, without its numbers."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def room(self) -> Tensor:
        """Memory for the numbers."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype)


def _send(connection: Connection, topic: str, content: Any) -> None:
    leaves, structure = flatten(content)
    tensors = [leaf for leaf in leaves if _fills_its_memory(leaf)]
    described = [
        _Memory(tuple(leaf.shape), leaf.stride(), leaf.dtype) if _fills_its_memory(leaf) else leaf for leaf in leaves
    ]
    connection.send_bytes(pickle.dumps((topic, structure, described), protocol=pickle.HIGHEST_PROTOCOL))
    with line_of(connection) as line:
        for tensor in tensors:
            line.sendall(_bytes_of(tensor))


def _receive(connection: Connection) -> tuple[str, Any]:
    topic, structure, described = pickle.loads(connection.recv_bytes())
    leaves = [each.room() if isinstance(each, _Memory) else each for each in described]
    with line_of(connection) as line:
        for tensor in (leaf for leaf, what in zip(leaves, described) if isinstance(what, _Memory)):
            room = _bytes_of(tensor)
            while room:
                if not (received := line.recv_into(room)):
                    raise EOFError
                room = room[received:]
    return topic, structure.build(leaves)


def _fills_its_memory(leaf: Any) -> bool:
    """Whether it is a plain tensor on the CPU, without gaps, and alone in its memory; others are pickled."""
    return (
        type(leaf) is Tensor
        and leaf.layout is torch.strided
        and leaf.device.type == "cpu"
        and not (leaf.requires_grad or leaf.is_quantized or leaf.is_conj() or leaf.is_neg())
        and leaf.untyped_storage().nbytes() == leaf.numel() * leaf.itemsize > 0
    )


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a tensor that fills it."""
    memory: memoryview = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data
    return memory


@contextmanager
def _to(rank: int) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError) as error:
        raise RankLostError(f"the connection to rank {rank} broke", rank) from error
