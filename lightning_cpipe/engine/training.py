"""Runs one stage's rows of the plan: forwards, backwards, and the messages around them.

The plan decided the order before the run; nothing here depends on what arrives when. One local step of a stage in
the middle, with the actions of `lightning_cpipe.schedules.transfers`:

    POST_F5 RECV_F3   F3   POST_B3 SEND_F3   RECV_B0   B0   SEND_B0   U0

The engine knows neither Lightning nor where mini-batches come from: it is given the user's step as a function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_cpipe.engine.figures import Bookkeeper, StageFigures
from lightning_cpipe.engine.mini_batch import MiniBatch, Source
from lightning_cpipe.engine.neighbours import Neighbours
from lightning_cpipe.engine.shapes import Shapes, gradient_specs_of, specs_of
from lightning_cpipe.engine.timeline import BACKWARD, FORWARD, WAIT_ACTIVATION, WAIT_GRADIENT, Timeline
from lightning_cpipe.errors import DataMismatchError, PlanError
from lightning_cpipe.schedules.action import Kind, Row
from lightning_cpipe.schedules.schedule import Schedule
from lightning_cpipe.schedules.transfers import POSTED_AHEAD
from lightning_cpipe.stage.stage_module import StageModule
from lightning_cpipe.stage.versions import Versions
from lightning_cpipe.tree import TemplateTable, TensorSpec

STEP = "training_step"


@dataclass
class InFlight:
    """A mini-batch that was forwarded and not yet backwarded.

    Attributes:
        mini_batch: which.
        received: what came from the stage before; leaves, those with a gradient collect it.
        sent: what went to the stage after, attached to the graph.
        returned: what the step returned, on the last stage.
    """

    mini_batch: MiniBatch
    received: list[Tensor]
    sent: list[Tensor]
    returned: Any


class Record(NamedTuple):
    """What goes beside an activation.

    Attributes:
        number: of the mini-batch.
        fingerprint: of the batch as the sender's loader gave it.
        table: the shapes, where they are new; None where they are known.
        hand_raised: whether a stage before wants training to stop.
        figures: what the stages before tell of themselves, by stage.
    """

    number: int
    fingerprint: int
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
    ) -> None:
        self.in_flight: dict[int, InFlight] = {}
        self.figures: dict[int, StageFigures] = {}
        """What the stages before told of themselves last, by stage."""
        self.books = Bookkeeper(timeline)
        self.hand_raised: Callable[[], bool] = lambda: False
        """Whether this stage wants training to stop."""
        self._hand_raised_before = False
        self._module = module
        self._schedule = schedule
        self.versions = versions
        """Of the stage's weights."""
        self._to = to
        self._timeline = timeline
        self._source = source
        self._run_step = run_step
        cut = module.cut.steps[STEP]
        self._passage = cut.passages[module.stage]
        self._shapes = Shapes(cut)
        self._gradient_comes = any(crossing.gradient for crossing in self._passage.sends)
        self._gradient_goes = any(crossing.gradient for crossing in self._passage.receives)
        self._next_post = 0
        self._rows: Iterator[Row] = iter(())
        self._first = 0
        self._ran_dry = False
        self._begin_at(0)

    def forward_until(self, number: int) -> InFlight:
        """Run the rows up to the one that backwards mini-batch `number`, without that backward.

        Returns:
            The mini-batch, ready for its backward.
        """
        if self._ran_dry and not self.in_flight:
            self._begin_at(number)
        backward = None
        while backward is None:
            for action in next(self._rows):
                if action.kind is Kind.FORWARD:
                    mini_batch = self._source.mini_batch(self._first + action.batch)
                    if mini_batch is None:
                        self._ran_dry = True
                    else:
                        self._forward(mini_batch)
                elif action.kind is Kind.BACKWARD:
                    backward = self._first + action.batch
        if backward != number:
            raise PlanError(
                f"the loop asks for mini-batch {number} where the plan has {backward}: every mini-batch must be"
                " trained once, in order. An `optimizer_step` that does not call its closure, or calls it twice, can't"
                " run in a pipeline."
            )
        return self.in_flight[number]

    def skip(self, number: int) -> None:
        """Mini-batch `number` has no loss: forget it."""
        self.versions.release(number)
        del self.in_flight[number]

    def backward(self, number: int, run: Callable[[], object] | None = None) -> None:
        """Run the backward of mini-batch `number`, and send the gradient on.

        Args:
            number: of the mini-batch.
            run: on the last stage, runs the backward of the loss.
        """
        work = self.in_flight[number]
        gradients: list[Tensor] = []
        if self._to.gradients_in is not None and self._gradient_comes:
            with self._timeline.measure(WAIT_GRADIENT, number):
                gradients = self._to.gradients_in.receive()
        with self._timeline.measure(BACKWARD, number):
            with self.versions.of(number), self._module.backward(work.mini_batch.seed):
                if run is not None:
                    run()
                else:
                    self._through(work.sent, gradients)
            if self._to.gradients_out is not None and self._gradient_goes:
                self._to.gradients_out.send([_gradient_of(leaf) for leaf in work.received if leaf.requires_grad])
        self.books.backwarded(self.versions.count - self.versions.number_of(number))
        self.versions.release(number)
        del self.in_flight[number]

    def begin_update(self, number: int) -> None:
        """The optimizer is about to step, with the gradient of mini-batch `number`."""
        self._timeline.begin_update(number)
        self.versions.advance()

    def end_update(self) -> None:
        """The optimizer has stepped."""
        self._timeline.end_update()

    def is_hand_raised(self) -> bool:
        """Whether this stage, or one before it, wants training to stop."""
        return self._hand_raised_before or self.hand_raised()

    def _begin_at(self, number: int) -> None:
        """Start the plan with mini-batch `number` as its first: at the beginning, and after the data ran out."""
        # How many mini-batches there will be is not known to a stream; the source says where they end.
        self._rows = self._schedule.rows(self._module.stage, self._module.num_stages, sys.maxsize // 2)
        self._first = number
        self._ran_dry = False

    def _forward(self, mini_batch: MiniBatch) -> None:
        number = mini_batch.number
        told, received = self._receive(mini_batch)
        table = self._shapes.of(mini_batch.signature)
        new = told or table is None
        if not new:
            self._send_record(mini_batch, None)
        for leaf, crossing in zip(received, self._passage.receives):
            leaf.requires_grad_(crossing.gradient)
        with self._timeline.measure(FORWARD, number):
            self.versions.use(number)
            made = self._module.forward(
                STEP, lambda: self._run_step(mini_batch), mini_batch.seed, received, table, describe=new
            )
        if new:
            table = {**(table or {}), **made.templates}
            self._shapes.learn(mini_batch.signature, table)
            self._send_record(mini_batch, table)
        self.in_flight[number] = InFlight(mini_batch, received, made.sent, made.returned)
        if self._to.activations_out is not None and table is not None:
            self._require_announced(made.sent, specs_of(self._passage.sends, table), number)
            if self._to.gradients_in is not None and self._gradient_comes:
                self._to.gradients_in.post(gradient_specs_of(self._passage.sends, table))
            self._to.activations_out.send(made.sent)

    def _receive(self, mini_batch: MiniBatch) -> tuple[bool, list[Tensor]]:
        """Whether the shapes were told just now, and what came from the stage before."""
        if self._to.activations_in is None or self._to.records_in is None:
            return False, []
        self._post_ahead(mini_batch.number)
        with self._timeline.measure(WAIT_ACTIVATION, mini_batch.number):
            record = Record(*self._to.records_in.receive())
            self._require_same_batch(record, mini_batch)
            self._hand_raised_before |= record.hand_raised
            self.figures.update({stage: StageFigures(*told) for stage, told in record.figures.items()})
            if record.table is not None:
                self._shapes.learn(mini_batch.signature, record.table)
                self._post_ahead(mini_batch.number)
            return record.table is not None, self._to.activations_in.receive()

    def _post_ahead(self, number: int) -> None:
        """Post the receives up to two mini-batches ahead, as far as their shapes are known."""
        assert self._to.activations_in is not None
        while self._next_post <= number + POSTED_AHEAD:
            mini_batch = self._source.mini_batch(self._next_post)
            table = None if mini_batch is None else self._shapes.of(mini_batch.signature)
            if table is None:
                return
            self._to.activations_in.post(specs_of(self._passage.receives, table))
            self._next_post += 1

    def _send_record(self, mini_batch: MiniBatch, table: TemplateTable | None) -> None:
        if self._to.records_out is not None:
            known = {**self.figures, self._module.stage: self.books.figures()}
            figures = {stage: tuple(each) for stage, each in known.items()}
            record = Record(mini_batch.number, mini_batch.fingerprint, table, self.is_hand_raised(), figures)
            self._to.records_out.send(tuple(record))

    def _through(self, sent: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        outputs = [out for out, crossing in zip(sent, self._passage.sends) if crossing.gradient]
        pairs = [(out, gradient) for out, gradient in zip(outputs, gradients) if out.requires_grad]
        if pairs:
            torch.autograd.backward([out for out, _ in pairs], [gradient for _, gradient in pairs])

    def _require_same_batch(self, record: Record, mini_batch: MiniBatch) -> None:
        if (record.number, record.fingerprint) != (mini_batch.number, mini_batch.fingerprint):
            stage = self._module.stage
            raise DataMismatchError(
                f"stage {stage} and stage {stage - 1} drew different mini-batches: number {mini_batch.number} with"
                f" fingerprint {mini_batch.fingerprint:08x} here, number {record.number} with fingerprint"
                f" {record.fingerprint:08x} there. All stages of a pipeline must draw the same data in the same order:"
                " seed what shuffles or augments (`seed_everything`), and do not let it depend on the rank."
            )

    def _require_announced(self, sent: Sequence[Tensor], specs: Sequence[TensorSpec], number: int) -> None:
        for tensor, spec, crossing in zip(sent, specs, self._passage.sends):
            if (found := TensorSpec.of(tensor)) != spec:
                raise DataMismatchError(
                    f"{crossing.value} is {found} for mini-batch {number}; for earlier mini-batches of the same shapes"
                    f" it was {spec}, and the next stage counts on that. A shape that depends on the numbers in a"
                    " batch can't cross a cut: pad to a fixed size, or move the cut with `split_points`."
                )


def _gradient_of(leaf: Tensor) -> Tensor:
    """What came back for a received tensor; zeros if the step did not use it this time."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
