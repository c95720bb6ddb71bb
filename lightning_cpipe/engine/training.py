"""Runs one rank's actions of the plan.

The plan decided the order before the run, messages included; nothing here depends on what arrives when. The loop above
asks for the actions up to a backward, for that backward, and for an update; when to update, and when a run ends, is
not for the plan to say.

The plan of a flush schedule is about the micro-batches of one mini-batch. It begins anew with each: the loop asks for
the actions up to the first backward, and for all the others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

from torch import Tensor

from lightning_cpipe.engine.averaging import Averaging
from lightning_cpipe.engine.mini_batch import Slices
from lightning_cpipe.engine.partial_sums import PartialSums, Sums, if_finite
from lightning_cpipe.engine.stage_stream import StageStream, State
from lightning_cpipe.engine.ties import Pair, Ties
from lightning_cpipe.engine.timeline import WAIT_GRADIENT, WAIT_REPLICAS, Timeline
from lightning_cpipe.errors import PlanError
from lightning_cpipe.schedules.action import Action, Kind
from lightning_cpipe.schedules.schedule import Schedule
from lightning_cpipe.schedules.transfers import POSTED_AHEAD, with_transfers_of_rank

_OF_BACKWARD = (
    Kind.RECV_BACKWARD,
    Kind.BACKWARD,
    Kind.INPUT_GRADIENT,
    Kind.SEND_BACKWARD,
    Kind.WEIGHT_GRADIENT,
)
"""The actions that wait until the loop asks for a backward."""

_OVER = Action(Kind.UPDATE, -1)
"""Stands where the next action of a plan would, after its last one."""


def room_on_lanes(lag: int) -> int:
    """How many messages may be on their way on a lane before its sender waits: what the plan asks for, and some more.

    A stage that streams sends for at most ``lag + 1`` mini-batches that the next one has not finished, and
    posts two ahead; the rest is for evaluations, whose first stage nothing else holds back.
    """
    return lag + 1 + POSTED_AHEAD + 3


class Kept(NamedTuple):
    """What is in flight between two local steps.

    Attributes:
        stages: of each stage, see `StageStream.keep`.
        ties: gradients of tied parameters on their way, by the stages that are tied.
        sums: what stages have told the next ones, which does not count yet; by purpose and stage.
    """

    stages: dict[int, State]
    ties: dict[Pair, list[list[Tensor]]]
    sums: dict[tuple[str, int], list[Tensor]]


class TrainingStream:
    """One rank's part of one training run.

    Args:
        stages: that it holds.
        schedule: whose rows are run.
        num_stages: p.
        timeline: where time is noted.
        ties: of the rank with others; None where it has none.
        slices: where the micro-batches are; None where the schedule streams whole mini-batches.
        sums: what the stages tell each other of their gradients, by purpose.
        averaging: over pipelines side by side; None where there is one.
    """

    def __init__(
        self,
        stages: Sequence[StageStream],
        schedule: Schedule,
        num_stages: int,
        timeline: Timeline,
        ties: Ties | None = None,
        slices: Slices | None = None,
        sums: Mapping[str, PartialSums] | None = None,
        averaging: Averaging | None = None,
    ) -> None:
        self.stages = {stage.stage: stage for stage in stages}
        self.last = self.stages[max(self.stages)]
        """The last one of the rank's stages."""
        self._schedule = schedule
        self._num_stages = num_stages
        self._timeline = timeline
        self._ties = ties or Ties()
        self._slices = slices
        self._sums = sums or {}
        self._averaging = averaging
        self._backwards = 1
        self.updates = 0
        """Updates that have begun, over all runs of the stream."""
        self.updated = -1
        """The mini-batch, or the first micro-batch, of the update that began last."""
        self.backwarded = 0
        """The mini-batch that is backwarded next."""
        self._begun = -1
        self._plans: dict[int, list[Action]] = {}
        """What a flush schedule does with so many micro-batches: the same for every mini-batch."""
        self._actions: Iterator[Action] = iter(())
        self._next = _OVER
        if slices is None:
            self._begin_at(0)

    # ---- what the loop asks for ----

    def begin(self) -> None:
        """Training begins."""
        for stage in self.stages.values():
            stage.news.books.begin()
        self._ties.begin()
        for sums in self._sums.values():
            sums.begin()
        if self._averaging is not None:
            self._averaging.attach()

    def forward_until(self, number: int) -> None:
        """Run the actions up to the first backward of mini-batch `number`, without it."""
        if self._next is _OVER:
            _require_planned(max(number, self._begun + 1), number)
            self._begin_at(number)
        elif all(stage.ran_dry and not stage.in_flight for stage in self.stages.values()):
            self._begin_at(number)
        while self._next.kind not in _OF_BACKWARD:
            self._run_next()
        _require_planned(self._begun if self._slices else self._first + self._next.batch, number)

    def backward(self, number: int, *, before_update: bool = False) -> None:
        """Run the actions up to the updates that follow the backwards of mini-batch `number`.

        Args:
            number: of the mini-batch.
            before_update: whether the optimizer steps next, so that pipelines side by side average their gradients.
        """
        averaging = self._averaging if before_update else None
        if averaging is not None:
            averaging.begin(self._backwards)
        to_update = set(self.stages)
        while to_update:
            if self._next.kind is Kind.UPDATE:
                to_update.discard(self._next_stage.stage)
            self._run_next()
        self._ties.after_backward(partial(self._timeline.measure, WAIT_GRADIENT, number))
        if averaging is not None:
            with self._timeline.measure(WAIT_REPLICAS, number):
                averaging.finish()
        self.backwarded = number + 1

    def skip_to(self, number: int) -> None:
        """The loop left out the mini-batches before `number`, which one stage alone has not forwarded yet."""
        while self._next is not _OVER and not self.last.in_flight and self._first + self._next.batch < number:
            self._next = next(self._actions)

    def skip(self, number: int) -> None:
        """Mini-batch `number` has no loss: forget it."""
        self.last.forget(self._first if self._slices else number)
        self.backwarded = number + 1
        while self._next.kind in _OF_BACKWARD:
            self._next = next(self._actions)
        if self._slices:
            # Its update is all that is left.
            self._next = _OVER

    def leave_out(self, number: int, left_out: bool) -> None:
        """All stages know whether mini-batch `number` has no loss; if so, its backward is nothing on any of them."""
        for stage in self.stages.values():
            stage.leave_out(self._first if self._slices else number, left_out)

    def begin_update(self, number: int) -> None:
        """The optimizer is about to step, with the gradient of mini-batch `number`."""
        self.updated = self._first if self._slices else number
        self.updates += 1
        self._timeline.begin_update(self.updated)
        for stage in self.stages.values():
            stage.make_room_for_update()

    @contextmanager
    def updating(self) -> Iterator[None]:
        """The optimizer's step runs inside."""
        with ExitStack() as stack:
            for stage in self.stages.values():
                stack.enter_context(stage.versions.updating())
            yield
            self._timeline.end_update()
            self._ties.after_update(partial(self._timeline.measure, WAIT_GRADIENT, self.updated))

    def tell(
        self, purpose: str, own: Sequence[Tensor], down: Callable[[Tensor, Tensor], Tensor] = if_finite
    ) -> list[Sums]:
        """Tell the other stages of an update that has begun, and learn what is known of them; see `PartialSums`."""
        return self._sums[purpose].tell(own, partial(self._timeline.measure, WAIT_GRADIENT, self.updated), down)

    def keep(self, in_window: int) -> Kept:
        """What another run needs to go on from here, between two local steps, as if this one had gone on.

        Args:
            in_window: how many mini-batches of the next update were backwarded.
        """
        stages = {number: stage.keep(self.backwarded, in_window) for number, stage in self.stages.items()}
        sums = {(purpose, stage): told for purpose, each in self._sums.items() for stage, told in each.keep().items()}
        return Kept(stages, self._ties.keep(), sums)

    def put_back(self, kept: Kept) -> None:
        """Go on from there, before the first step; it may be that of all ranks."""
        for number, stage in self.stages.items():
            stage.put_back(kept.stages[number])
        self._ties.put_back(kept.ties)
        for purpose, each in self._sums.items():
            each.put_back({stage: told for (of, stage), told in kept.sums.items() if of == purpose})

    def settle(self) -> None:
        """Training is over, on all stages after the same local step: forget what is in flight.

        It may begin again, with any mini-batch.
        """
        for stage in self.stages.values():
            stage.settle()
        self._ties.settle()
        for sums in self._sums.values():
            sums.settle()
        if self._averaging is not None:
            self._averaging.detach()
        self._next, self._begun = _OVER, -1

    # ---- the plan ----

    def _begin_at(self, number: int) -> None:
        """Start the plan with mini-batch `number`: at the beginning, after the data ran out, and after each flush."""
        # How many mini-batches there will be is not known to a stream; the source says where they end.
        numbers = self._slices.begin(number) if self._slices else range(number, sys.maxsize // 2)
        self._actions = self._planned(len(numbers))
        self._next = next(self._actions)
        self._begun, self._first = number, numbers.start
        self._backwards = len(numbers) if self._slices else 1
        for stage in self.stages.values():
            stage.begin_at(numbers.start)

    def _planned(self, count: int) -> Iterator[Action]:
        if count in self._plans:
            return iter(self._plans[count])
        rows = self._schedule.rank_rows(sorted(self.stages), self._num_stages, count)
        rows = with_transfers_of_rank(rows, sorted(self.stages), self._num_stages)
        actions = (action for row in rows for action in row)
        if self._slices is None:
            return actions
        self._plans[count] = list(actions)
        return iter(self._plans[count])

    @property
    def _next_stage(self) -> StageStream:
        """The stage of the action that comes next; one alone is not named."""
        return self.last if self._next.stage is None else self.stages[self._next.stage]

    def _run_next(self) -> None:
        # When to update is for the loop to say.
        if self._next.kind is not Kind.UPDATE:
            self._next_stage.do(self._next.kind, self._first + self._next.batch)
        self._next = next(self._actions, _OVER)


def _require_planned(planned: int, asked: int) -> None:
    if planned != asked:
        raise PlanError(
            f"the loop asks for mini-batch {asked} where the plan has {planned}: every mini-batch must be"
            " trained once, in order. An `optimizer_step` that does not call its closure, or calls it twice, can't"
            " run in a pipeline."
        )
