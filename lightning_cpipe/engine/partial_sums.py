"""What a stage learns of the others' gradients in time for its update: sums over stages, such as of squares.

Once per update each stage tells both its neighbours. To the stage before goes the sum over itself and those after it:
their numbers belong to the same update, since later stages make their gradients first. To the stage after goes the sum
over itself and those before it, which make theirs later. So it counts some updates later there, as many as the stage
before is ahead with its forwards, and no stage waits for another one. What a stage knows is the plan's, not the
clock's:

    of a later stage      the number of the same update
    of an earlier stage   the number of an update before, further back for each stage on the way; at first, nothing

They travel on a link of their own, after the gradient of the input has left, which nothing here holds up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_cpipe.engine.ties import Measure
from lightning_cpipe.schedules.schedule import Schedule
from lightning_cpipe.schedules.transfers import POSTED_AHEAD
from lightning_cpipe.transport.wiring import Link, LinkEnds
from lightning_cpipe.transport.within import InnerEdge
from lightning_cpipe.tree import TensorSpec


class Sums(NamedTuple):
    """What one stage knows when it updates.

    Attributes:
        onward: over this stage and those after it, of this update.
        before: over the stages before it, of earlier updates.
    """

    onward: Tensor
    before: Tensor


class OfStage:
    """One stage's part.

    Args:
        previous: the link with the stage before; None on the first.
        following: the link with the stage after; None on the last.
        late: how many updates later a number from before counts.
        ahead: how many sums from after are posted for ahead, on the stage before and on this one: as many as
            mini-batches are in flight there, so that the stage after can send them whatever this one waits for.
        spec: of what a stage tells.
        device: where it is.
        kept: how many numbers for the stage after are kept, for a later run that goes on from here.
    """

    def __init__(
        self,
        previous: LinkEnds | None,
        following: LinkEnds | None,
        late: int,
        ahead: tuple[int, int],
        spec: TensorSpec,
        device: torch.device,
        kept: int = 0,
    ) -> None:
        self._previous = previous
        self._following = following
        self._late = late
        self._ahead_of_previous, self._ahead = ahead
        self._specs = [spec]
        self._nothing = torch.zeros(spec.shape, dtype=spec.dtype, device=device)
        self.kept: deque[Tensor] = deque(maxlen=kept)
        """The last numbers for the stage after, which do not count there yet."""

    def begin(self) -> None:
        """Training begins."""
        if self._following is not None:
            for _ in range(self._ahead):
                self._following.incoming.post(self._specs)

    def onward(self, own: Tensor, waiting: Measure) -> Tensor:
        """Over this stage and those after it."""
        if self._following is not None:
            with waiting():
                (after,) = self._following.incoming.receive()
            self._following.incoming.post(self._specs)
            own = own + after
        if self._previous is not None:
            self._previous.outgoing.send([own])
        return own

    def before(self, own: Tensor, waiting: Measure) -> Tensor:
        """Over the stages before it; tells those after it `own`, too."""
        known = self._nothing
        if self._previous is not None:
            self._previous.incoming.post(self._specs)
            if self._previous.incoming.posted > self._late:
                with waiting():
                    (known,) = self._previous.incoming.receive()
        self._send(known + own)
        return known

    def put_back(self, own: Sequence[Tensor], from_before: int) -> None:
        """Before the first update: let be on their way what was, in another run.

        Args:
            own: what this stage had told the next one.
            from_before: how many numbers come from the stage before.
        """
        for number in own:
            self._send(number.to(self._nothing.device))
        for _ in range(from_before if self._previous is not None else 0):
            assert self._previous is not None
            self._previous.incoming.post(self._specs)

    def _send(self, number: Tensor) -> None:
        if self._following is not None:
            self._following.outgoing.send([number])
            self.kept.append(number)

    def send_last(self) -> None:
        """Training is over: satisfy the receives of sums that will not come."""
        if self._previous is not None:
            for _ in range(self._ahead_of_previous):
                self._previous.outgoing.send_filler(self._specs)

    def discard(self) -> None:
        """Training is over, on all stages after the same update: take what is under way."""
        self.kept.clear()
        for ends in (self._previous, self._following):
            if ends is not None:
                while ends.incoming.posted:
                    ends.incoming.receive()
                ends.outgoing.flush()


class PartialSums:
    """Those of the stages of one rank, which are neighbours.

    Args:
        purpose: names the links.
        stages: of the rank, in order.
        num_stages: p.
        schedule: tells how many mini-batches are in flight on each stage.
        ends: of the links with other ranks.
        spec: of what a stage tells.
        device: where it is.
        keep: whether a later run may go on from any update of this one.
    """

    def __init__(
        self,
        purpose: str,
        stages: Sequence[int],
        num_stages: int,
        schedule: Schedule,
        ends: Mapping[Link, LinkEnds],
        spec: TensorSpec,
        device: torch.device,
        *,
        keep: bool = False,
    ) -> None:
        self._numbers = stages
        self._stages: list[OfStage] = []
        previous = ends.get(Link(purpose, stages[0] - 1, stages[0]))
        for stage in stages:
            following, of_next = ends.get(Link(purpose, stage, stage + 1)), None
            if stage != stages[-1]:
                down, up = InnerEdge(device), InnerEdge(device)
                following, of_next = LinkEnds(up, down), LinkEnds(down, up)
            # By then the stage before has sent all that it sends before that update, even where shapes are new.
            of_previous, own, of_following = (schedule.lag(each, num_stages) for each in (stage - 1, stage, stage + 1))
            ahead, kept = (of_previous + 1, own + 1), own - of_following if keep else 0
            self._stages.append(OfStage(previous, following, of_previous - own, ahead, spec, device, kept))
            previous = of_next

    def begin(self) -> None:
        """Training begins."""
        for stage in self._stages:
            stage.begin()

    def keep(self) -> dict[int, list[Tensor]]:
        """What the rank's stages have told the next ones, which does not count yet; by stage."""
        return {number: list(stage.kept) for number, stage in zip(self._numbers, self._stages)}

    def put_back(self, on_their_way: Mapping[int, Sequence[Tensor]]) -> None:
        """Before the first update: let those be on their way that `keep` found, on all ranks, in another run."""
        for number, stage in zip(self._numbers, self._stages):
            stage.put_back(on_their_way.get(number, ()), len(on_their_way.get(number - 1, ())))

    def tell(self, own: Sequence[Tensor], waiting: Measure, down: Callable[[Tensor, Tensor], Tensor]) -> list[Sums]:
        """Tell the other stages, which must do so in the same updates, and learn what is known of them.

        Args:
            own: each stage's, in order.
            waiting: notes how long the rank waits inside.
            down: what a stage tells those after it, of its own number and the sum onward.

        Returns:
            What each stage knows, in order.
        """
        parts = list(zip(self._stages, own))
        # What other ranks wait for first.
        onward = [stage.onward(each, waiting) for stage, each in reversed(parts)][::-1]
        before = [stage.before(down(each, to_end), waiting) for (stage, each), to_end in zip(parts, onward)]
        return [Sums(*each) for each in zip(onward, before)]

    def settle(self) -> None:
        """Training is over, on all stages after the same update."""
        for stage in self._stages:
            stage.send_last()
        for stage in self._stages:
            stage.discard()


def if_finite(own: Tensor, onward: Tensor) -> Tensor:
    """A stage tells those after it its own number; 0 for one that is not finite, which would spoil later updates."""
    return torch.nan_to_num(own, nan=0.0, posinf=0.0, neginf=0.0)


def links_of(purpose: str, num_stages: int, schedule: Schedule) -> dict[Link, int]:
    """The links between neighbours, each with how many messages may be on their way."""
    return {
        Link(purpose, stage - 1, stage): schedule.lag(stage - 1, num_stages) + 1 + POSTED_AHEAD
        for stage in range(1, num_stages)
    }
