"""Runs one stage's actions of the plan.

The plan decided the order before the run, messages included; nothing here depends on what arrives when. One local
step of a stage in the middle, as `lightning_cpipe.schedules.transfers` writes it:

    POST_F5 RECV_F3   F3   POST_B3 SEND_F3   RECV_B0   B0   SEND_B0   U0

Every action has a method here. The loop above asks for the actions up to a backward, for that backward, and for an
update; when to update, and when a run ends, is not for the plan to say. The engine knows neither Lightning nor where
mini-batches come from: it is given the user's step as a function.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_cpipe.engine.choice import Choice
from lightning_cpipe.engine.figures import Bookkeeper, StageFigures
from lightning_cpipe.engine.mini_batch import MiniBatch, Source, require_same
from lightning_cpipe.engine.neighbours import Neighbours
from lightning_cpipe.engine.shapes import Known, Shapes
from lightning_cpipe.engine.ties import Ties
from lightning_cpipe.engine.timeline import BACKWARD, FORWARD, WAIT_ACTIVATION, WAIT_GRADIENT, Timeline
from lightning_cpipe.errors import DataMismatchError, PlanError
from lightning_cpipe.schedules.action import Action, Kind
from lightning_cpipe.schedules.schedule import Schedule
from lightning_cpipe.schedules.transfers import POSTED_AHEAD, rows_with_transfers
from lightning_cpipe.stage.stage_module import StageModule
from lightning_cpipe.stage.versions import Versions
from lightning_cpipe.tree import TemplateTable, TensorSpec

STEP = "training_step"

_OF_BACKWARD = (Kind.RECV_BACKWARD, Kind.BACKWARD, Kind.SEND_BACKWARD)
"""The actions that wait until the loop asks for a backward."""


def room_on_lanes(lag: int) -> int:
    """How many messages may be on their way on a lane before its sender waits: what the plan asks for, and some more.

    A stage sends for at most ``lag + 1`` mini-batches that the next one has not finished, and posts two ahead; the rest
    is for evaluations, whose first stage nothing else holds back.
    """
    return lag + 1 + POSTED_AHEAD + 3


@dataclass
class InFlight:
    """A mini-batch that this stage has begun with and not yet backwarded.

    Attributes:
        mini_batch: which.
        known: its shapes; None where they are new and this stage has not run.
        told: whether the stage before told new ones.
        received: what came from the stage before; leaves, those with a gradient collect it.
        sent: what goes to the stage after, attached to the graph.
        returned: what the step returned, on the last stage.
        gradients: what came back for `sent`.
    """

    mini_batch: MiniBatch
    known: Known | None
    told: bool = False
    received: Sequence[Tensor] = ()
    sent: Sequence[Tensor] = ()
    returned: Any = None
    gradients: Sequence[Tensor] = ()


class Record(NamedTuple):
    """What goes beside an activation.

    Attributes:
        mark: number and fingerprint of the mini-batch, as the sender's loader gave it.
        table: the shapes, where they are new; None where they are known.
        hand_raised: whether a stage before wants training to stop.
        figures: what the stages before tell of themselves, by stage; empty most of the time.
    """

    mark: tuple[int, int]
    table: TemplateTable | None
    hand_raised: bool
    figures: dict[int, tuple[Any, ...]]


class TrainingStream:
    """One stage of one training run.

    Args:
        module: the stage.
        schedule: whose rows are run.
        versions: of the stage's weights.
        to: the lanes.
        timeline: where time is noted.
        source: where the mini-batches are.
        run_step: calls the user's step of the whole module on a mini-batch.
        ties: of the stage with others; None where it has none.
    """

    def __init__(
        self,
        module: StageModule,
        schedule: Schedule,
        versions: Versions,
        to: Neighbours,
        timeline: Timeline,
        source: Source,
        run_step: Callable[[MiniBatch], Any],
        ties: Ties | None = None,
    ) -> None:
        self.in_flight: dict[int, InFlight] = {}
        self.figures: dict[int, StageFigures] = {}
        """What the stages before told of themselves last, by stage."""
        self.tells_figures: Callable[[int], bool] = lambda number: False
        """Whether the stages' figures are told with a mini-batch; all stages must tell them with the same ones."""
        self.books = Bookkeeper(timeline)
        self.before_forward: Callable[[MiniBatch, Sequence[Tensor], TemplateTable], object] = lambda *_: None
        """Is told what a forward is about to run with: the mini-batch, what was received, and the stubs' outputs."""
        self.hand_raised: Callable[[], bool] = lambda: False
        """Whether this stage wants training to stop."""
        self._hand_raised_before = False
        self._module = module
        self._schedule = schedule
        self.versions = versions
        """Of the stage's weights."""
        self._to = to
        self._ties = ties or Ties()
        self._timeline = timeline
        self._source = source
        self._run_step = run_step
        cut = module.cut.steps[STEP]
        self._passage = cut.passages[module.stage]
        self._shapes = Shapes(cut, self._passage)
        self._gradient_comes = any(crossing.gradient for crossing in self._passage.sends)
        self._gradient_goes = any(crossing.gradient for crossing in self._passage.receives)
        self._do: dict[Kind, Callable[[int], None]] = {
            Kind.POST_FORWARD: self._post_activation,
            Kind.RECV_FORWARD: self._receive_activation,
            Kind.FORWARD: self._forward,
            Kind.POST_BACKWARD: self._post_gradient,
            Kind.SEND_FORWARD: self._send_activation,
            Kind.RECV_BACKWARD: self._receive_gradient,
            Kind.BACKWARD: self._backward,
            Kind.SEND_BACKWARD: self._send_gradient,
        }
        self._of_loss: Callable[[], object] | None = None
        self._updated = 0
        self._next: Action
        self._begin_at(0)

    # ---- what the loop asks for ----

    def begin(self) -> None:
        """Training begins."""
        self.books.begin()
        self._ties.begin()

    def forward_until(self, number: int) -> InFlight:
        """Run the actions up to the backward of mini-batch `number`, without it.

        Returns:
            The mini-batch, ready for its backward.
        """
        if self._ran_dry and not self.in_flight:
            self._begin_at(number)
        while self._next.kind not in _OF_BACKWARD:
            self._run_next()
        if (planned := self._first + self._next.batch) != number:
            raise PlanError(
                f"the loop asks for mini-batch {number} where the plan has {planned}: every mini-batch must be"
                " trained once, in order. An `optimizer_step` that does not call its closure, or calls it twice, can't"
                " run in a pipeline."
            )
        return self.in_flight[number]

    def backward(self, number: int, of_loss: Callable[[], object] | None = None) -> None:
        """Run the backward of mini-batch `number`, and the messages around it.

        Args:
            number: of the mini-batch.
            of_loss: on the last stage, runs the backward of the loss.
        """
        self._of_loss = of_loss
        while self._next.kind in _OF_BACKWARD:
            self._run_next()
        self._forget(number)
        self._ties.after_backward(partial(self._timeline.measure, WAIT_GRADIENT, number))

    def skip_to(self, number: int) -> None:
        """The loop left out the mini-batches before `number`, which one stage alone has not forwarded yet."""
        while not self.in_flight and self._first + self._next.batch < number:
            self._next = next(self._actions)

    def skip(self, number: int) -> None:
        """Mini-batch `number` has no loss: forget it."""
        while self._next.kind in _OF_BACKWARD:
            self._next = next(self._actions)
        self._forget(number)

    def begin_update(self, number: int) -> None:
        """The optimizer is about to step, with the gradient of mini-batch `number`."""
        self._updated = number
        self._timeline.begin_update(number)
        self.versions.advance(self._choice.oldest_to_come(self._source))

    @contextmanager
    def updating(self) -> Iterator[None]:
        """The optimizer's step runs inside."""
        with self.versions.updating():
            yield
            self._timeline.end_update()
            self._ties.after_update(partial(self._timeline.measure, WAIT_GRADIENT, self._updated))

    def settle(self) -> None:
        """Training is over, on all stages after the same local step: forget what is in flight."""
        self.in_flight.clear()
        self._ties.settle()

    def is_hand_raised(self) -> bool:
        """Whether this stage, or one before it, wants training to stop."""
        return self._hand_raised_before or self.hand_raised()

    # ---- the plan ----

    def _begin_at(self, number: int) -> None:
        """Start the plan with mini-batch `number` as its first: at the beginning, and after the data ran out."""
        stage, num_stages = self._module.stage, self._module.num_stages
        # How many mini-batches there will be is not known to a stream; the source says where they end.
        rows = self._schedule.rows(stage, num_stages, sys.maxsize // 2)
        rows = rows_with_transfers(rows, first=stage == 0, last=stage == num_stages - 1)
        self._actions: Iterator[Action] = (action for row in rows for action in row)
        self._next = next(self._actions)
        self._first = number
        self._choice = Choice(self._schedule, stage, num_stages, number)
        self._to_post: deque[int] = deque()
        self._ran_dry = False

    def _run_next(self) -> None:
        # Only updates have no method.
        if (method := self._do.get(self._next.kind)) is not None:
            method(self._first + self._next.batch)
        self._next = next(self._actions)

    def _forget(self, number: int) -> None:
        self.versions.release(number)
        del self.in_flight[number]
        # The last stage forwards nothing in advance, so this is where it learns that the others have run dry.
        if not self.in_flight and self._module.num_stages > 1 and self._source.mini_batch(number + 1) is None:
            self._ran_dry = True

    # ---- one method for each action ----

    def _post_activation(self, number: int) -> None:
        self._to_post.append(number)
        self._post_known()

    def _post_known(self) -> None:
        """Post the receives that are due, as far as their shapes are known; new ones are told with their record."""
        assert self._to.activations_in is not None
        while self._to_post:
            mini_batch = self._source.mini_batch(self._to_post[0])
            known = None if mini_batch is None else self._shapes.of(mini_batch.signature)
            if known is None:
                return
            self._to.activations_in.post(known.received)
            self._to_post.popleft()

    def _receive_activation(self, number: int) -> None:
        mini_batch = self._source.mini_batch(number)
        if mini_batch is None:
            return
        assert self._to.activations_in is not None
        assert self._to.records_in is not None
        with self._timeline.measure(WAIT_ACTIVATION, number):
            record = Record(*self._to.records_in.receive())
            require_same(self._module.stage, mini_batch.mark, record.mark, STEP)
            self._hand_raised_before |= record.hand_raised
            self.figures.update({stage: StageFigures(*told) for stage, told in record.figures.items()})
            if record.table is not None:
                self._shapes.learn(mini_batch.signature, record.table)
                self._post_known()
            received = self._to.activations_in.receive()
        known = self._shapes.of(mini_batch.signature)
        self.in_flight[number] = InFlight(mini_batch, known, record.table is not None, received)

    def _forward(self, number: int) -> None:
        mini_batch = self._source.mini_batch(number)
        if mini_batch is None:
            self._ran_dry = True
            return
        work = self.in_flight.get(number) or InFlight(mini_batch, self._shapes.of(mini_batch.signature))
        self.in_flight[number] = work
        new = work.told or work.known is None
        if not new:
            self._send_record(mini_batch, None)
        table = None if work.known is None else work.known.table
        for leaf, crossing in zip(work.received, self._passage.receives):
            leaf.requires_grad_(crossing.gradient)
        self.versions.use(number, self._choice.forward(mini_batch, min(self.in_flight), self.versions.count))
        with self._timeline.measure(FORWARD, number), self.versions.of(number):
            self.before_forward(mini_batch, work.received, table or {})
            made = self._module.forward(
                STEP, lambda: self._run_step(mini_batch), mini_batch.seed, work.received, table, describe=new
            )
        if new:
            table = {**(table or {}), **made.templates}
            work.known = self._shapes.learn(mini_batch.signature, table)
            self._send_record(mini_batch, table)
        work.sent, work.returned = made.sent, made.returned

    def _post_gradient(self, number: int) -> None:
        work = self.in_flight.get(number)
        if work is not None and work.known is not None and self._gradient_comes:
            assert self._to.gradients_in is not None
            self._to.gradients_in.post(work.known.gradients)

    def _send_activation(self, number: int) -> None:
        work = self.in_flight.get(number)
        if work is not None and work.known is not None:
            assert self._to.activations_out is not None
            self._require_announced(work.sent, work.known.sent, number)
            self._to.activations_out.send(work.sent)

    def _receive_gradient(self, number: int) -> None:
        if self._gradient_comes:
            assert self._to.gradients_in is not None
            with self._timeline.measure(WAIT_GRADIENT, number):
                self.in_flight[number].gradients = self._to.gradients_in.receive()

    def _backward(self, number: int) -> None:
        work = self.in_flight[number]
        self.books.backward_begins(self.versions.count - self.versions.number_of(number))
        with (
            self._timeline.measure(BACKWARD, number),
            self.versions.of(number),
            self._module.drawing(work.mini_batch.seed),
        ):
            if self._of_loss is not None:
                self._of_loss()
            else:
                self._through(work.sent, work.gradients)

    def _send_gradient(self, number: int) -> None:
        if self._gradient_goes:
            assert self._to.gradients_out is not None
            received = self.in_flight[number].received
            self._to.gradients_out.send([gradient_of(leaf) for leaf in received if leaf.requires_grad])

    # ---- what they need ----

    def _send_record(self, mini_batch: MiniBatch, table: TemplateTable | None) -> None:
        if self._to.records_out is None:
            return
        figures: dict[int, tuple[Any, ...]] = {}
        if self.tells_figures(mini_batch.number):
            known = {**self.figures, self._module.stage: self.books.figures()}
            figures = {stage: tuple(each) for stage, each in known.items()}
        record = Record(mini_batch.mark, table, self.is_hand_raised(), figures)
        self._to.records_out.send(tuple(record))

    def _through(self, sent: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        outputs = [out for out, crossing in zip(sent, self._passage.sends) if crossing.gradient]
        pairs = [(out, gradient) for out, gradient in zip(outputs, gradients) if out.requires_grad]
        if pairs:
            torch.autograd.backward([out for out, _ in pairs], [gradient for _, gradient in pairs])

    def _require_announced(self, sent: Sequence[Tensor], specs: Sequence[TensorSpec], number: int) -> None:
        for tensor, spec, crossing in zip(sent, specs, self._passage.sends):
            if (found := TensorSpec.of(tensor)) != spec:
                raise DataMismatchError(
                    f"{crossing.value} is {found} for mini-batch {number}; for earlier mini-batches of the same shapes"
                    f" it was {spec}, and the next stage counts on that. A shape that depends on the numbers in a"
                    " batch can't cross a cut: pad to a fixed size, or move the cut with `split_points`."
                )


def gradient_of(leaf: Tensor) -> Tensor:
    """What came back for a received tensor; zeros if the step did not use it this time."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
