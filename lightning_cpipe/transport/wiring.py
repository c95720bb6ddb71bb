"""Makes the process groups of a pipeline, once per process, and hands out their ends.

Between each two neighbours there are six lanes, each a group of two ranks:

    activations       stage s     -> stage s + 1     training's forward
    gradients         stage s + 1 -> stage s         training's backward
    records           stage s     -> stage s + 1     beside the activations, on the CPU
    decisions         stage s + 1 -> stage s         from the last stage to all others, on the CPU
    eval_activations  stage s     -> stage s + 1     evaluation's forward
    eval_records      stage s     -> stage s + 1     beside them

Evaluation has lanes of its own because training's receives are posted already when a validation begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from lightning_cpipe.transport.edge import Edge, NcclEdge
from lightning_cpipe.tree import TensorSpec

Lane = Literal["activations", "gradients", "records", "decisions", "eval_activations", "eval_records"]

DOWN: tuple[Lane, ...] = ("activations", "records", "eval_activations", "eval_records")
"""The lanes on which data flows from the first stage to the last."""

UP: tuple[Lane, ...] = ("gradients", "decisions")
"""The lanes on which data flows from the last stage to the first."""

ON_CPU: tuple[Lane, ...] = ("records", "decisions", "eval_records")
"""The lanes that stay on gloo, whatever the stages compute on."""

NEVER = timedelta(days=365)
"""The data groups' timeout. On gloo a wait that runs out breaks the connection for good; liveness is watched beside
the groups, not by them."""


@dataclass(frozen=True)
class Lanes:
    """One process's ends of all lanes of one run.

    Attributes:
        incoming: the lanes that this rank receives on.
        outgoing: the lanes that this rank sends on.
    """

    incoming: dict[Lane, Edge]
    outgoing: dict[Lane, Edge]


class Wiring:
    """The groups between this process's stage and its neighbours.

    Args:
        ranks: the global rank of each stage, in the order of the stages.
        stage: this process's.
        device: where the stage computes.
        backend: of the lanes that carry tensors, ``gloo`` or ``nccl``.
    """

    def __init__(self, ranks: Sequence[int], stage: int, device: torch.device, backend: str) -> None:
        self._ranks = ranks
        self._stage = stage
        self._device = device
        self._backend = backend
        self._groups: dict[tuple[int, Lane], dist.ProcessGroup] = {}
        for upper in range(len(ranks) - 1):
            for lane in (*DOWN, *UP):
                # Every process takes part in making every group, in this order.
                group = dist.new_group(
                    [ranks[upper], ranks[upper + 1]],
                    timeout=NEVER,
                    backend="gloo" if lane in ON_CPU else backend,
                )
                if stage in (upper, upper + 1):
                    self._groups[upper, lane] = group
        self._handed_out: list[Edge] = []
        self._warm_up()

    def abandon(self) -> None:
        """Break the connections, whatever is on its way: ranks that wait for this one learn of it at once."""
        for edge in self._handed_out:
            edge.abandon()
        self._groups.clear()

    def lanes(self, in_flight: int) -> Lanes:
        """Fresh ends for one run; nothing may be on its way on the old ones.

        Args:
            in_flight: how many messages may be on their way on each.
        """
        self._handed_out.clear()
        incoming: dict[Lane, Edge] = {}
        outgoing: dict[Lane, Edge] = {}
        for lane in (*DOWN, *UP):
            before, after = (incoming, outgoing) if lane in DOWN else (outgoing, incoming)
            if self._stage > 0:
                before[lane] = self._end(self._stage - 1, lane, self._ranks[self._stage - 1], in_flight)
            if self._stage < len(self._ranks) - 1:
                after[lane] = self._end(self._stage, lane, self._ranks[self._stage + 1], in_flight)
        return Lanes(incoming, outgoing)

    def _end(self, upper: int, lane: Lane, peer: int, in_flight: int) -> Edge:
        on_cpu = lane in ON_CPU
        cls = NcclEdge if self._backend == "nccl" and not on_cpu else Edge
        device = torch.device("cpu") if on_cpu else self._device
        edge = cls(self._groups[upper, lane], peer, device, in_flight)
        self._handed_out.append(edge)
        return edge

    def _warm_up(self) -> None:
        """One message on each lane, in an order that is the same everywhere.

        NCCL makes a communicator at its first message, and two ranks that make theirs in different orders hang.
        """
        lanes = self.lanes(in_flight=1)
        hello = TensorSpec((1,), torch.float32)
        for upper in range(len(self._ranks) - 1):
            for lane in (*DOWN, *UP):
                sender = upper if lane in DOWN else upper + 1
                receiver = upper + 1 if lane in DOWN else upper
                if self._stage == sender:
                    device = torch.device("cpu") if lane in ON_CPU else self._device
                    lanes.outgoing[lane].send([torch.zeros(hello.shape, dtype=hello.dtype, device=device)])
                    lanes.outgoing[lane].flush()
                elif self._stage == receiver:
                    lanes.incoming[lane].post([hello])
                    lanes.incoming[lane].receive()
