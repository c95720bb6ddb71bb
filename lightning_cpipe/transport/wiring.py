"""Connects the stages of a pipeline, once per process, and hands out their ends.

Between each two neighbours there are six lanes. Three carry tensors, each through a process group of two ranks:

    activations       stage s     -> stage s + 1     training's forward
    gradients         stage s + 1 -> stage s         training's backward
    eval_activations  stage s     -> stage s + 1     evaluation's forward

and three carry records, each through a socket:

    records           stage s     -> stage s + 1     beside the activations
    decisions         stage s + 1 -> stage s         from the last stage to all others
    eval_records      stage s     -> stage s + 1     beside the evaluation's activations

Evaluation has lanes of its own because training's receives are posted already when a validation begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist

from lightning_cpipe.transport.connections import connect_neighbours
from lightning_cpipe.transport.control import NEVER, Control
from lightning_cpipe.transport.edge import Edge, NcclEdge
from lightning_cpipe.transport.records import Records
from lightning_cpipe.tree import TensorSpec

TensorLane = Literal["activations", "gradients", "eval_activations"]
RecordLane = Literal["records", "decisions", "eval_records"]

TENSOR_LANES: tuple[TensorLane, ...] = ("activations", "eval_activations", "gradients")
RECORD_LANES: tuple[RecordLane, ...] = ("records", "eval_records", "decisions")

UP = ("gradients", "decisions")
"""The lanes on which data flows from the last stage to the first; on all others it flows from the first to the last."""


@dataclass(frozen=True)
class Lanes:
    """One process's ends of all lanes of one run.

    Attributes:
        incoming: the lanes that this rank receives tensors on.
        outgoing: the lanes that this rank sends tensors on.
        records_in: the lanes that this rank receives records on.
        records_out: the lanes that this rank sends records on.
    """

    incoming: dict[TensorLane, Edge] = field(default_factory=dict)
    outgoing: dict[TensorLane, Edge] = field(default_factory=dict)
    records_in: dict[RecordLane, Records] = field(default_factory=dict)
    records_out: dict[RecordLane, Records] = field(default_factory=dict)


class Wiring:
    """The connections between this process's stage and its neighbours.

    Args:
        control: of all ranks.
        ranks: the global rank of each stage, in the order of the stages.
        stage: this process's.
        device: where the stage computes.
        backend: of the lanes that carry tensors, ``gloo`` or ``nccl``.
    """

    def __init__(self, control: Control, ranks: Sequence[int], stage: int, device: torch.device, backend: str) -> None:
        self._ranks = ranks
        self._stage = stage
        self._device = device
        self._edge_type = NcclEdge if backend == "nccl" else Edge
        self._connections = connect_neighbours(control, ranks, stage, RECORD_LANES)
        self._groups: dict[tuple[int, str], dist.ProcessGroup] = {}
        for upper in range(len(ranks) - 1):
            for lane in TENSOR_LANES:
                # Every process takes part in making every group, in this order.
                group = dist.new_group([ranks[upper], ranks[upper + 1]], timeout=NEVER, backend=backend)
                if stage in (upper, upper + 1):
                    self._groups[upper, lane] = group
        self._handed_out: list[Edge] = []
        self._warm_up()

    def abandon(self) -> None:
        """Break the connections, whatever is on its way: ranks that wait for this one learn of it at once."""
        for edge in self._handed_out:
            edge.abandon()
        self._groups.clear()
        self.disconnect()

    def close(self) -> None:
        """Let go of all connections; nothing may be on its way."""
        if dist.is_initialized():
            for group in self._groups.values():
                dist.destroy_process_group(group)
        self._groups.clear()
        self.disconnect()

    def disconnect(self) -> None:
        """Close the sockets; nothing may be on its way."""
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()

    def lanes(self, in_flight: int) -> Lanes:
        """Fresh ends for one run; nothing may be on its way on the old ones.

        Args:
            in_flight: how many messages may be on their way on each lane for tensors.
        """
        self._handed_out.clear()
        lanes = Lanes()
        for upper in (self._stage - 1, self._stage):
            if not 0 <= upper < len(self._ranks) - 1:
                continue
            peer = self._ranks[upper if upper < self._stage else upper + 1]
            for lane in TENSOR_LANES:
                edge = self._edge_type(self._groups[upper, lane], peer, self._device, in_flight)
                (lanes.incoming if self._receives(upper, lane) else lanes.outgoing)[lane] = edge
                self._handed_out.append(edge)
            for name in RECORD_LANES:
                records = Records(self._connections[upper, name], peer)
                (lanes.records_in if self._receives(upper, name) else lanes.records_out)[name] = records
        return lanes

    def _receives(self, upper: int, lane: str) -> bool:
        """Whether data flows to this stage on a lane between the stages `upper` and `upper` + 1."""
        return (lane in UP) == (upper == self._stage)

    def _warm_up(self) -> None:
        """One message on each lane for tensors, in an order that is the same everywhere.

        NCCL makes a communicator at its first message, and two ranks that make theirs in different orders hang.
        """
        lanes = self.lanes(in_flight=1)
        hello = TensorSpec((1,), torch.float32)
        for upper in range(len(self._ranks) - 1):
            for lane in TENSOR_LANES:
                if self._stage not in (upper, upper + 1):
                    continue
                if self._receives(upper, lane):
                    lanes.incoming[lane].post([hello])
                    lanes.incoming[lane].receive()
                else:
                    lanes.outgoing[lane].send_filler([hello])
                    lanes.outgoing[lane].flush()
