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
from typing import Any

import torch
from torch import Tensor

from lightning_cpipe.engine.in_flight import InFlight
from lightning_cpipe.engine.mini_batch import MiniBatch, Source
from lightning_cpipe.engine.shapes import Shapes, gradient_specs_of, specs_of
from lightning_cpipe.engine.timeline import BACKWARD, FORWARD, UPDATE, WAIT_ACTIVATION, WAIT_GRADIENT, Timeline
from lightning_cpipe.errors import DataMismatchError
from lightning_cpipe.schedules.action import Kind, Row
from lightning_cpipe.schedules.schedule import Schedule
from lightning_cpipe.schedules.transfers import POSTED_AHEAD
from lightning_cpipe.stage.cut import Passage, StepCut, TemplateTable
from lightning_cpipe.stage.isolation import Isolation
from lightning_cpipe.stage.randomness import seeded
from lightning_cpipe.stage.replay import Replay
from lightning_cpipe.stage.versions import Versions
from lightning_cpipe.transport.edge import Edge
from lightning_cpipe.transport.records import Records
from lightning_cpipe.tree import TensorSpec

STEP = "training_step"


@dataclass
class Neighbours:
    """A stage's ends of training's lanes; None where there is no neighbour.

    Attributes:
        activations_in: from the stage before.
        activations_out: to the stage after.
        gradients_in: from the stage after.
        gradients_out: to the stage before.
        records_in: from the stage before.
        records_out: to the stage after.
    """

    activations_in: Edge | None = None
    activations_out: Edge | None = None
    gradients_in: Edge | None = None
    gradients_out: Edge | None = None
    records_in: Records | None = None
    records_out: Records | None = None


@dataclass
class _Record:
    """What goes beside an activation.

    Attributes:
        number: of the mini-batch.
        fingerprint: of the batch as the sender's loader gave it.
        table: the shapes, where they are new; None where they are known.
        figures: what the stages before tell of themselves.
    """

    number: int
    fingerprint: int
    table: TemplateTable | None
    figures: dict[int, Any]


class TrainingStream:
    """One stage of one training run.

    Args:
        stage: which.
        num_stages: p.
        schedule: whose rows are run.
        cut: how the step is cut.
        replay: the stage's stubs and hooks.
        isolation: the random numbers of its modules.
        versions: of its weights.
        neighbours: the lanes.
        timeline: where time is noted.
        source: where the mini-batches are.
        run_step: calls the user's step of the whole module on a mini-batch.
    """

    def __init__(
        self,
        stage: int,
        num_stages: int,
        schedule: Schedule,
        cut: StepCut,
        replay: Replay,
        isolation: Isolation,
        versions: Versions,
        neighbours: Neighbours,
        timeline: Timeline,
        source: Source,
        run_step: Callable[[MiniBatch], Any],
    ) -> None:
        self.stage = stage
        self.num_stages = num_stages
        self.timeline = timeline
        self.doing = "set-up"
        """The action at hand, for error messages."""
        self.batch = -1
        """The mini-batch at hand."""
        self.in_flight: dict[int, InFlight] = {}
        self.delays: dict[int, int] = {}
        """How often a backward had which delay, in updates."""
        self.figures: dict[int, Any] = {}
        """What the stages before told of themselves last, by stage."""
        self.own_figures: Callable[[], Any] = dict
        """What this stage tells of itself."""
        self._passage: Passage = cut.passages[stage]
        self._shapes = Shapes(cut)
        self._replay = replay
        self._isolation = isolation
        self._versions = versions
        self._to = neighbours
        self._source = source
        self._run_step = run_step
        self._schedule = schedule
        self._next_post = 0
        self._begin_at(0)

    @property
    def is_last(self) -> bool:
        """Whether this stage makes the loss."""
        return self.stage == self.num_stages - 1

    def forward_until(self, number: int) -> InFlight:
        """Run the rows up to the one that backwards mini-batch `number`, without that backward.

        Returns:
            The mini-batch, ready for its backward.
        """
        if self._ran_dry and not self.in_flight:
            self._begin_at(number)
        for row in self._rows:
            backward = None
            for action in row:
                if action.kind is Kind.FORWARD:
                    mini_batch = self._source.mini_batch(self._first + action.batch)
                    if mini_batch is None:
                        self._ran_dry = True
                    else:
                        self._forward(mini_batch)
                elif action.kind is Kind.BACKWARD:
                    backward = self._first + action.batch
            if backward is not None:
                break
        if backward != number or number not in self.in_flight:
            raise AssertionError(f"the plan backwards mini-batch {backward}, the loop asks for {number}")
        return self.in_flight[number]

    def backward(self, number: int, run: Callable[[], None] | None = None) -> None:
        """Run the backward of mini-batch `number`, and send the gradient on.

        Args:
            number: of the mini-batch.
            run: on the last stage, runs the backward of the loss.
        """
        work = self.in_flight[number]
        gradients: list[Tensor] = []
        self._at(Kind.BACKWARD, number)
        if self._to.gradients_in is not None and self._sends_gradient:
            with self.timeline.measure(WAIT_GRADIENT, number):
                gradients = self._to.gradients_in.receive()
        with self.timeline.measure(BACKWARD, number):
            with self._versions.of(number), self._isolation.of(work.mini_batch.seed):
                if run is not None:
                    run()
                else:
                    self._through(work.sent, gradients)
            if self._to.gradients_out is not None and self._receives_gradient:
                self._to.gradients_out.send([_gradient_of(leaf) for leaf in work.received if leaf.requires_grad])
        delay = self._versions.count - self._versions.number_of(number)
        self.delays[delay] = self.delays.get(delay, 0) + 1
        del self.in_flight[number]
        self._versions.release(number)

    def begin_update(self, number: int) -> None:
        """The optimizer is about to step, with the gradient of mini-batch `number`."""
        self._at(Kind.UPDATE, number)
        self.timeline.begin(UPDATE, number)
        self._versions.advance()

    def end_update(self) -> None:
        """The optimizer has stepped."""
        self.timeline.end()

    def _begin_at(self, number: int) -> None:
        """Start the plan with mini-batch `number` as its first: at the beginning, and after the data ran out."""
        # How many mini-batches there will be is not known to a stream; the source says where they end.
        self._rows: Iterator[Row] = self._schedule.rows(self.stage, self.num_stages, sys.maxsize // 2)
        self._first = number
        self._ran_dry = False

    def _forward(self, mini_batch: MiniBatch) -> None:
        number = mini_batch.number
        self._at(Kind.FORWARD, number)
        told, received = self._receive(mini_batch)
        table = self._shapes.of(mini_batch.signature)
        new = told or table is None
        if not new:
            self._send_record(mini_batch, None)
        for leaf, crossing in zip(received, self._passage.receives):
            leaf.requires_grad_(crossing.gradient)
        with (
            self.timeline.measure(FORWARD, number),
            seeded(mini_batch.seed),
            self._isolation.of(mini_batch.seed),
        ):
            self._versions.use(number)
            made = self._replay.run(STEP, lambda: self._run_step(mini_batch), received, table, describe=new)
        if new:
            table = {**(table or {}), **made.templates}
            self._shapes.learn(mini_batch.signature, table)
            self._send_record(mini_batch, table)
        self.in_flight[number] = InFlight(mini_batch, received, made.sent, made.returned)
        if self._to.activations_out is not None and table is not None:
            self._require_announced(made.sent, specs_of(self._passage.sends, table), number)
            if self._to.gradients_in is not None and self._sends_gradient:
                self._to.gradients_in.post(gradient_specs_of(self._passage.sends, table))
            self._to.activations_out.send(made.sent)

    def _receive(self, mini_batch: MiniBatch) -> tuple[bool, list[Tensor]]:
        """Whether the shapes were told just now, and what came from the stage before."""
        if self._to.activations_in is None or self._to.records_in is None:
            return False, []
        self._post_ahead(mini_batch.number)
        with self.timeline.measure(WAIT_ACTIVATION, mini_batch.number):
            record: _Record = self._to.records_in.receive()
            self._require_same_batch(record, mini_batch)
            self.figures.update(record.figures)
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
            figures = {**self.figures, self.stage: self.own_figures()}
            self._to.records_out.send(_Record(mini_batch.number, mini_batch.fingerprint, table, figures))

    def _through(self, sent: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        outputs = [out for out, crossing in zip(sent, self._passage.sends) if crossing.gradient]
        pairs = [(out, gradient) for out, gradient in zip(outputs, gradients) if out.requires_grad]
        if pairs:
            torch.autograd.backward([out for out, _ in pairs], [gradient for _, gradient in pairs])

    @property
    def _sends_gradient(self) -> bool:
        return any(crossing.gradient for crossing in self._passage.sends)

    @property
    def _receives_gradient(self) -> bool:
        return any(crossing.gradient for crossing in self._passage.receives)

    def _at(self, kind: Kind, number: int) -> None:
        self.doing = f"{self.stage}{kind}{number}"
        self.batch = number

    def _require_same_batch(self, record: _Record, mini_batch: MiniBatch) -> None:
        if (record.number, record.fingerprint) != (mini_batch.number, mini_batch.fingerprint):
            raise DataMismatchError(
                f"stage {self.stage} and stage {self.stage - 1} drew different mini-batches: number"
                f" {mini_batch.number} with fingerprint {mini_batch.fingerprint:08x} here, number {record.number} with"
                f" fingerprint {record.fingerprint:08x} there. All stages of a pipeline must draw the same data in the"
                " same order: seed what shuffles or augments (`seed_everything`), and do not let it depend on the"
                " rank."
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
