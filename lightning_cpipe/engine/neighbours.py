"""A stage's ends of the lanes to the stages beside it, on other ranks or on its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lightning_cpipe.engine.decisions import Decisions
from lightning_cpipe.transport.edge import Edge
from lightning_cpipe.transport.records import Records
from lightning_cpipe.transport.settling import (
    Account,
    account_of,
    send_what_was_posted_for,
    take_what_was_sent,
)
from lightning_cpipe.transport.wiring import Lanes
from lightning_cpipe.transport.within import InnerEdge, InnerRecords


@dataclass(frozen=True)
class Neighbours:
    """The lanes of one traffic class, training's or evaluation's. None where there is no neighbour.

    Attributes:
        activations_in: from the stage before.
        activations_out: to the stage after.
        records_in: from the stage before.
        records_out: to the stage after.
        gradients_in: from the stage after; training only.
        gradients_out: to the stage before; training only.
    """

    activations_in: Edge | None = None
    activations_out: Edge | None = None
    records_in: Records | None = None
    records_out: Records | None = None
    gradients_in: Edge | None = None
    gradients_out: Edge | None = None

    @classmethod
    def of_training(cls, lanes: Lanes) -> Neighbours:
        """Training's lanes."""
        return cls(
            lanes.incoming.get("activations"),
            lanes.outgoing.get("activations"),
            lanes.records_in.get("records"),
            lanes.records_out.get("records"),
            lanes.incoming.get("gradients"),
            lanes.outgoing.get("gradients"),
        )

    @classmethod
    def of_evaluation(cls, lanes: Lanes) -> Neighbours:
        """Evaluation's lanes."""
        return cls(
            lanes.incoming.get("eval_activations"),
            lanes.outgoing.get("eval_activations"),
            lanes.records_in.get("eval_records"),
            lanes.records_out.get("eval_records"),
        )

    def in_a_row(self, count: int, device: torch.device) -> list[Neighbours]:
        """The lanes of `count` stages of one rank: the rank's own at both ends, and lanes within between each two."""
        row = [self]
        for _ in range(count - 1):
            activations, records, gradients = InnerEdge(device), InnerRecords(), InnerEdge(device)
            before = row.pop()
            row += [
                replace(before, activations_out=activations, records_out=records, gradients_in=gradients),
                replace(before, activations_in=activations, records_in=records, gradients_out=gradients),
            ]
        return row

    @property
    def previous_is_here(self) -> bool:
        """Whether this rank holds the stage before, too."""
        return isinstance(self.activations_in, InnerEdge)

    @property
    def next_is_here(self) -> bool:
        """Whether this rank holds the stage after, too."""
        return isinstance(self.activations_out, InnerEdge)

    def settle(self, decisions: Decisions) -> int:
        """Bring training's lanes to rest; see `lightning_cpipe.transport.settling`.

        Returns:
            How many messages were discarded.
        """
        if self.records_out is not None:
            self.records_out.send(Accounts(account_of(self.activations_out), account_of(self.gradients_in)))
        decisions.tell_previous(Accounts(account_of(self.activations_in), account_of(self.gradients_out)))
        of_next: Accounts = decisions.hear_next(otherwise=Accounts())
        of_previous = self._accounts_of_previous()
        send_what_was_posted_for(self.activations_out, of_next.activations)
        send_what_was_posted_for(self.gradients_out, of_previous.gradients)
        discarded = take_what_was_sent(self.activations_in, of_previous.activations)
        discarded += take_what_was_sent(self.gradients_in, of_next.gradients)
        for edge in (self.activations_out, self.gradients_out):
            if edge is not None:
                edge.flush()
        return discarded

    def tell_last(self) -> None:
        """Send no more records."""
        if self.records_out is not None:
            self.records_out.send_last()

    def discard(self) -> None:
        """Take the records to their end."""
        if self.records_in is not None:
            self.records_in.discard()

    def _accounts_of_previous(self) -> Accounts:
        if self.records_in is None:
            return Accounts()
        while not isinstance(found := self.records_in.receive(), Accounts):
            # A record of a mini-batch that this stage will not forward any more.
            pass
        return found


@dataclass(frozen=True)
class Accounts:
    """How far a neighbour got on the two lanes between it and this stage."""

    activations: Account | None = None
    gradients: Account | None = None
