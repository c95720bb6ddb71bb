"""Connects the stages of a pipeline, once per process, and hands out their ends.

Between each two neighbours there are eight lanes. Three carry tensors, each through a process group of two ranks:

    activations       stage s     -> stage s + 1     training's forward
    gradients         stage s + 1 -> stage s         training's backward
    eval_activations  stage s     -> stage s + 1     evaluation's forward

and five carry records, each through a socket:

    records           stage s     -> stage s + 1     beside the activations
    decisions         stage s + 1 -> stage s         from the last stage to all others
    eval_records      stage s     -> stage s + 1     beside the evaluation's activations
    batches           stage s     -> stage s + 1     ahead of them, what a batch is like that is not loaded there
    eval_batches      stage s     -> stage s + 1     the same of the evaluation's

Evaluation has lanes of its own because training's receives are posted already when a validation begins.

Where a process holds several neighbouring stages, they count as one here: they have one *place* in the row. A process
whose stages are no neighbours has several places.

Two stages may have a *link* besides, made when a run first needs it: two more lanes for tensors, one each way. Stages
that train the same parameters have one, whether they are neighbours or not: gradients go to the later stage, which
owns these parameters, and its weights come back. So have neighbours that tell each other sums of their gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from lightning_cpipe.transport.connections import connect_neighbours
from lightning_cpipe.transport.control import NEVER, Control
from lightning_cpipe.transport.edge import Edge, NcclEdge
from lightning_cpipe.transport.records import Records
from lightning_cpipe.tree import TensorSpec

TensorLane = Literal["activations", "gradients", "eval_activations"]
RecordLane = Literal["records", "decisions", "eval_records"]
BatchLane = Literal["batches", "eval_batches"]

TENSOR_LANES: tuple[TensorLane, ...] = ("activations", "eval_activations", "gradients")
RECORD_LANES: tuple[RecordLane, ...] = ("records", "eval_records", "decisions")
BATCH_LANES: tuple[BatchLane, ...] = ("batches", "eval_batches")

UP = ("gradients", "decisions")
"""The lanes on which data flows from the last stage to the first; on all others it flows from the first to the last."""


class Link(NamedTuple):
    """Two stages that have two lanes of their own.

    Attributes:
        purpose: what the lanes are for; two stages may have several links.
        earlier: the stage that comes first; of a tie, the one that has copies.
        later: the other one; of a tie, the owner.
    """

    purpose: str
    earlier: int
    later: int


class LinkEnds(NamedTuple):
    """A stage's ends of a link.

    Attributes:
        incoming: what the other stage says; of a tie, gradients for the owner, and weights for the other one.
        outgoing: the other way round.
    """

    incoming: Edge
    outgoing: Edge


@dataclass(frozen=True)
class Lanes:
    """A process's ends of all lanes of one of its places, in one run.

    Attributes:
        incoming: the lanes that this rank receives tensors on.
        outgoing: the lanes that this rank sends tensors on.
        records_in: the lanes that this rank receives records on.
        records_out: the lanes that this rank sends records on.
        links: with stages of other processes; with its last place.
    """

    incoming: dict[TensorLane, Edge] = field(default_factory=dict)
    outgoing: dict[TensorLane, Edge] = field(default_factory=dict)
    records_in: dict[RecordLane, Records] = field(default_factory=dict)
    records_out: dict[RecordLane, Records] = field(default_factory=dict)
    links: dict[Link, LinkEnds] = field(default_factory=dict)


class Wiring:
    """The connections between this process's stages and their neighbours.

    Args:
        control: of all ranks.
        ranks: the global rank at each place, in the order of the stages. No two neighbours are the same.
        place: one of this process's.
        device: where the stage computes.
        backend: of the lanes that carry tensors, ``gloo`` or ``nccl``.
        held: where a place has several stages, which they are, for each of `ranks`; links name them.
        replicas: of each of the pipelines side by side, how much higher its ranks are than this one's.
    """

    def __init__(
        self,
        control: Control,
        ranks: Sequence[int],
        place: int,
        device: torch.device,
        backend: str,
        held: Sequence[Sequence[int]] | None = None,
        replicas: Sequence[int] = (0,),
    ) -> None:
        self._ranks = ranks
        self._replicas = replicas
        held = held or [(each,) for each in range(len(ranks))]
        self._rank_of = {stage: rank for rank, stages in zip(ranks, held) for stage in stages}
        self._rank = ranks[place]
        self._own = [own for own, rank in enumerate(ranks) if rank == self._rank]
        self._device = device
        self._edge_type = NcclEdge if backend == "nccl" else Edge
        self._connections = connect_neighbours(control, ranks, place, (*RECORD_LANES, *BATCH_LANES))
        self._backend = backend
        self._groups: dict[tuple[int, str], dist.ProcessGroup] = {}
        self._linked: dict[Link, tuple[dist.ProcessGroup, dist.ProcessGroup] | None] = {}
        for upper in range(len(ranks) - 1):
            for lane in TENSOR_LANES:
                # Every process takes part in making every group, in this order.
                group = self._new_group(ranks[upper], ranks[upper + 1])
                if self._rank in ranks[upper : upper + 2]:
                    self._groups[upper, lane] = group
        self._handed_out: list[Edge] = []
        self._warm_up()

    def abandon(self) -> None:
        """Break the connections, whatever is on its way: ranks that wait for this one learn of it at once."""
        for edge in self._handed_out:
            edge.abandon()
        self._groups.clear()
        self._linked.clear()
        self.disconnect()

    def close(self) -> None:
        """Let go of all connections; nothing may be on its way."""
        if dist.is_initialized():
            for group in (*self._groups.values(), *(each for ends in self._linked.values() for each in ends or ())):
                dist.destroy_process_group(group)
        self._groups.clear()
        self._linked.clear()
        self.disconnect()

    def disconnect(self) -> None:
        """Close the sockets; nothing may be on its way."""
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()

    def lanes(self, in_flight: int, links: Mapping[Link, int] | None = None) -> list[Lanes]:
        """Fresh ends for one run; nothing may be on its way on the old ones. All ranks must call it alike.

        Args:
            in_flight: how many messages may be on their way on each lane for tensors.
            links: all that the run needs, each with how many messages may be on their way.

        Returns:
            Those of each of this process's places, in order.
        """
        self._handed_out.clear()
        links = links or {}
        ends = {link: self._link_ends(link, links[link]) for link in self._connected(links)}
        return [self._lanes_of(place, in_flight, ends if place == self._own[-1] else {}) for place in self._own]

    def batch_lane(self, lane: BatchLane) -> tuple[Records | None, Records | None]:
        """The ends, in and out, of a lane that is there before the module is cut; of a process with one place."""
        (place,) = self._own
        before, after = (self._connections.get((upper, lane)) for upper in (place - 1, place))
        return (
            None if before is None else Records(before, self._ranks[place - 1]),
            None if after is None else Records(after, self._ranks[place + 1]),
        )

    def _lanes_of(self, place: int, in_flight: int, links: dict[Link, LinkEnds]) -> Lanes:
        lanes = Lanes(links=links)
        for upper in (place - 1, place):
            if not 0 <= upper < len(self._ranks) - 1:
                continue
            peer = self._ranks[upper if upper < place else upper + 1]
            for lane in TENSOR_LANES:
                edge = self._edge_type(self._groups[upper, lane], peer, self._device, in_flight)
                (lanes.incoming if self._receives(upper, lane) else lanes.outgoing)[lane] = edge
                self._handed_out.append(edge)
            for name in RECORD_LANES:
                records = Records(self._connections[upper, name], peer)
                (lanes.records_in if self._receives(upper, name) else lanes.records_out)[name] = records
        return lanes

    def _new_group(self, a: int, b: int) -> dist.ProcessGroup:
        """The group of two ranks; every process takes part in making that of every pipeline."""
        made: dict[int, dist.ProcessGroup] = {
            more: dist.new_group([a + more, b + more], timeout=NEVER, backend=self._backend) for more in self._replicas
        }
        return made[0]

    def _connected(self, links: Iterable[Link]) -> list[Link]:
        """Connect these, unless they are already; those that this process belongs to."""
        apart = {link: ranks for link in links if len(set(ranks := self._ranks_of(link))) == 2}
        for link, ranks in apart.items():
            if link in self._linked:
                continue
            down, up = self._new_group(*ranks), self._new_group(*ranks)
            self._linked[link] = (down, up) if self._rank in ranks else None
            if self._rank in ranks:
                ends = self._link_ends(link, in_flight=1)
                # Down first, on both sides; see `_warm_up`.
                if self._rank == ranks[1]:
                    _hear(ends.incoming)
                    _say(ends.outgoing)
                else:
                    _say(ends.outgoing)
                    _hear(ends.incoming)
        return [link for link, ranks in apart.items() if self._rank in ranks]

    def _ranks_of(self, link: Link) -> tuple[int, int]:
        """The ranks that hold the stages of a link."""
        return self._rank_of[link.earlier], self._rank_of[link.later]

    def _link_ends(self, link: Link, in_flight: int) -> LinkEnds:
        groups = self._linked[link]
        assert groups is not None
        of_earlier, of_later = self._ranks_of(link)
        is_later = self._rank == of_later
        peer = of_earlier if is_later else of_later
        down, up = (self._edge_type(group, peer, self._device, in_flight) for group in groups)
        self._handed_out += [down, up]
        return LinkEnds(down, up) if is_later else LinkEnds(up, down)

    def _receives(self, upper: int, lane: str) -> bool:
        """Whether data flows to this process on a lane of its own between the places `upper` and `upper` + 1."""
        return (lane in UP) == (upper in self._own)

    def _warm_up(self) -> None:
        """One message on each lane for tensors, in an order that is the same everywhere.

        NCCL makes a communicator at its first message, and two ranks that make theirs in different orders hang.
        """
        lanes = dict(zip(self._own, self.lanes(in_flight=1)))
        for upper in range(len(self._ranks) - 1):
            for lane in TENSOR_LANES:
                own = lanes.get(upper, lanes.get(upper + 1))
                if own is None:
                    continue
                if self._receives(upper, lane):
                    _hear(own.incoming[lane])
                else:
                    _say(own.outgoing[lane])


_HELLO = TensorSpec((1,), torch.float32)


def _say(edge: Edge) -> None:
    edge.send_filler([_HELLO])
    edge.flush()


def _hear(edge: Edge) -> None:
    edge.post([_HELLO])
    edge.receive()
