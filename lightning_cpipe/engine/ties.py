"""Keeps equal what several stages train: a *tied* parameter, such as an embedding that is the head's weight, too.

The last stage that gives it a gradient owns it, and its optimizer alone updates it. The others hold copies: each sends
the owner the gradient of every mini-batch, and takes over the owner's weights after every update. So a copy is always
one of the owner's versions, the one of the same number: where every stage has done i updates, all hold the same.

Both travel directly between the two stages, and nobody stalls. The owner adds a gradient some of its own local steps
later (`Schedule.rows_late`), when it has long arrived. The weights leave right after the owner's update, and the other
stage takes them after its own backward of the same mini-batch, which comes later.

Roughly, in local step i:

    a stage with a copy   backward i, send gradient i                              receive weights i + 1
    the owner             backward i, receive and add gradient i - late, update i, send weights i + 1
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_cpipe.schedules.schedule import Schedule
from lightning_cpipe.stage.cut import Tie
from lightning_cpipe.transport.wiring import Link, LinkEnds
from lightning_cpipe.transport.within import InnerEdge
from lightning_cpipe.tree import TensorSpec


def link_of(tie: Tie) -> Link:
    """The lanes of a tie."""
    return Link("tie", tie.user, tie.owner)


Pair = tuple[int, int]
"""The stages that a tie ties: the one that holds copies, and the owner."""


class Measure(Protocol):
    """Notes how long a stage waits inside."""

    def __call__(self) -> AbstractContextManager[None]: ...


class Tied(ABC):
    """One stage's side of a tie.

    Args:
        parameters: of the tie.
        ends: of its lanes.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], ends: LinkEnds) -> None:
        self.parameters = parameters
        self._incoming, self._outgoing = ends
        self._specs = [TensorSpec.of(parameter) for parameter in parameters]

    @abstractmethod
    def after_backward(self, waiting: Measure) -> None:
        """A local step's backward is done; the gradients are not clipped yet."""

    @abstractmethod
    def after_update(self, waiting: Measure) -> None:
        """A local step's update is done."""

    def discard(self) -> None:
        """Training is over, on all stages after the same local step: take what is under way."""
        while self._incoming.posted:
            self._incoming.receive()
        self._outgoing.flush()

    def _receive(self, waiting: Measure) -> Iterator[tuple[nn.Parameter, Tensor]]:
        with waiting():
            arrived = self._incoming.receive()
        return zip(self.parameters, arrived)


class Copies(Tied):
    """The side that holds copies. The receive of the next weights is always posted.

    Args:
        parameters: of the tie.
        ends: of its lanes.
        pair: the stages that it ties.
        kept: how many messages to the owner are kept, for a later run that goes on from here.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], ends: LinkEnds, pair: Pair, kept: int) -> None:
        super().__init__(parameters, ends)
        self.pair = pair
        self.kept: deque[list[Tensor]] = deque(maxlen=kept)
        """The last messages, which the owner has not added yet."""

    def begin(self) -> None:
        """Training begins."""
        self._incoming.post(self._specs)

    def discard(self) -> None:
        """See `Tied`."""
        super().discard()
        self.kept.clear()

    def send_again(self, messages: Sequence[Sequence[Tensor]]) -> None:
        """Before the first step, send what the owner had not added when another run was stopped."""
        for message in messages:
            self._send([tensor.to(each.device) for tensor, each in zip(message, self.parameters)])

    def _send(self, gradients: list[Tensor]) -> None:
        self._outgoing.send(gradients)
        self.kept.append(gradients)

    def after_backward(self, waiting: Measure) -> None:
        """Send the owner this mini-batch's gradients."""
        self._send([_gradient_of(parameter) for parameter in self.parameters])
        for parameter in self.parameters:
            parameter.grad = None

    def after_update(self, waiting: Measure) -> None:
        """Take over the owner's weights."""
        arrived = self._receive(waiting)
        self._incoming.post(self._specs)
        with torch.no_grad():
            for parameter, weights in arrived:
                parameter.copy_(weights)


class Owned(Tied):
    """The owner's side.

    Every gradient is posted for in the local step of its mini-batch, some steps before it is added: the other stage
    can send all that it has while the owner validates or saves.

    Args:
        parameters: of the tie.
        ends: of its lanes.
        pair: the stages that it ties.
        late: by how many local steps the other stage's gradients are added later.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], ends: LinkEnds, pair: Pair, late: int) -> None:
        super().__init__(parameters, ends)
        self.pair = pair
        self._late = late

    def await_again(self, messages: int) -> None:
        """Before the first step, expect as many gradients as the other stage sends again."""
        for _ in range(messages):
            self._incoming.post(self._specs)

    def after_backward(self, waiting: Measure) -> None:
        """Add the gradients that are due."""
        self._incoming.post(self._specs)
        if self._incoming.posted <= self._late:
            return
        for parameter, gradient in self._receive(waiting):
            if not parameter.requires_grad:
                # It is frozen for now; the optimizer would take zeros for a gradient.
                continue
            if parameter.grad is None:
                parameter.grad = gradient
            elif parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense() + gradient
            else:
                parameter.grad += gradient

    def after_update(self, waiting: Measure) -> None:
        """Send the other stage the new weights; copies, since the next update may write into the same memory."""
        self._outgoing.send([parameter.detach().clone() for parameter in self.parameters])

    def send_last(self) -> None:
        """Training is over: satisfy the receive of weights that will not come."""
        self._outgoing.send_filler(self._specs)


class Ties:
    """All ties of the stages of one rank.

    Args:
        copies: where it holds copies.
        owned: where it is the owner.
    """

    def __init__(self, copies: Sequence[Copies] = (), owned: Sequence[Owned] = ()) -> None:
        self._copies = copies
        self._owned = owned

    @classmethod
    def of(
        cls,
        ties: Sequence[Tie],
        schedule: Schedule,
        own: Mapping[int, Mapping[str, nn.Parameter]],
        ends: Mapping[Link, LinkEnds],
        *,
        keep: bool = False,
    ) -> Ties:
        """Those of the stages of one rank.

        Args:
            ties: of the whole module.
            schedule: tells when gradients are due.
            own: the trainable parameters of each of these stages, by name.
            ends: of each tie with another rank.
            keep: whether a later run may go on from any step of this one.
        """
        copies: list[Copies] = []
        owned: list[Owned] = []
        for tie in ties:
            pair = tie.user, tie.owner
            late = schedule.rows_late(*pair)
            of_user = of_owner = ends.get(link_of(tie))
            if tie.user in own and tie.owner in own:
                device = own[tie.owner][tie.names[0]].device
                gradients, weights = InnerEdge(device), InnerEdge(device)
                of_user, of_owner = LinkEnds(weights, gradients), LinkEnds(gradients, weights)
            if tie.user in own:
                assert of_user is not None
                kept = late if keep else 0
                copies.append(Copies([own[tie.user][name] for name in tie.names], of_user, pair, kept))
            if tie.owner in own:
                assert of_owner is not None
                owned.append(Owned([own[tie.owner][name] for name in tie.names], of_owner, pair, late))
        return cls(copies, owned)

    @property
    def copies(self) -> list[nn.Parameter]:
        """What others own; it keeps no gradient."""
        return [parameter for each in self._copies for parameter in each.parameters]

    @property
    def added_to(self) -> list[nn.Parameter]:
        """What others add gradients to, after a backward."""
        return [parameter for each in self._owned for parameter in each.parameters]

    def begin(self) -> None:
        """Training begins."""
        for each in self._copies:
            each.begin()

    def keep(self) -> dict[Pair, list[list[Tensor]]]:
        """The gradients on their way from this rank's stages, by the stages that are tied."""
        return {each.pair: list(each.kept) for each in self._copies}

    def put_back(self, on_their_way: Mapping[Pair, Sequence[Sequence[Tensor]]]) -> None:
        """Before the first step: let those be on their way that `keep` found, on all ranks, in another run."""
        for copies in self._copies:
            copies.send_again(on_their_way.get(copies.pair, ()))
        for owned in self._owned:
            owned.await_again(len(on_their_way.get(owned.pair, ())))

    def after_backward(self, waiting: Measure) -> None:
        """A local step's backward is done: what others wait for first."""
        for each in (*self._copies, *self._owned):
            each.after_backward(waiting)

    def after_update(self, waiting: Measure) -> None:
        """A local step's update is done: what others wait for first."""
        for each in (*self._owned, *self._copies):
            each.after_update(waiting)

    def settle(self) -> None:
        """Training is over, on all stages after the same local step."""
        # All send before any waits: three stages may be tied in a circle.
        for owned in self._owned:
            owned.send_last()
        for each in (*self._copies, *self._owned):
            each.discard()


def _gradient_of(parameter: nn.Parameter) -> Tensor:
    """Zeros if this mini-batch did not use it here."""
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    return parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
