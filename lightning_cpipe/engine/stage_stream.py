"""What one stage does for each action of the plan.

One local step of a stage in the middle, as `lightning_cpipe.schedules.transfers` writes it:

    POST_F5 RECV_F3   F3   POST_B3 SEND_F3   RECV_B0   B0   SEND_B0   U0

Every action has a method here, updates apart: when to update is not for a stage to say. The engine knows neither
Lightning nor where mini-batches come from: it is given the user's step as a function.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_cpipe.engine.choice import Choice, Memory
from lightning_cpipe.engine.mini_batch import MiniBatch, Source, agreed
from lightning_cpipe.engine.neighbours import Neighbours
from lightning_cpipe.engine.news import News, Record
from lightning_cpipe.engine.shapes import Known, Shapes
from lightning_cpipe.engine.timeline import BACKWARD, FORWARD, WAIT_ACTIVATION, WAIT_GRADIENT, Timeline
from lightning_cpipe.errors import CutError, DataMismatchError
from lightning_cpipe.schedules.action import Kind
from lightning_cpipe.schedules.schedule import Schedule
from lightning_cpipe.stage.halves import backward_in_halves
from lightning_cpipe.stage.snapshots import Snapshots
from lightning_cpipe.stage.stage_module import StageModule
from lightning_cpipe.stage.versions import Versions
from lightning_cpipe.tree import TemplateTable, TensorSpec

STEP = "training_step"

State = dict[str, Any]


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
        second_half: of its backward, after the first.
        ended_early: whether its step returned None before the cut, so that nothing of worth is sent.
        left_out: whether it has no loss, so that there is nothing to backward.
    """

    mini_batch: MiniBatch
    known: Known | None
    told: bool = False
    received: Sequence[Tensor] = ()
    sent: Sequence[Tensor] = ()
    returned: Any = None
    gradients: Sequence[Tensor] = ()
    second_half: Callable[[], None] | None = None
    ended_early: bool = False
    left_out: bool = False


OfLoss = tuple[Tensor, Callable[[Tensor], object]]
"""A loss, and what runs the backward of one."""


class StageStream:
    """One stage of one training run.

    Args:
        module: the stage.
        schedule: which chooses versions.
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
        self.ran_dry = False
        """Whether a mini-batch was asked for that is not there."""
        self.news = News(module.stage, timeline)
        """What this stage tells the next one beside its activations."""
        self.versions = versions
        """Of the stage's weights."""
        self.before_forward: Callable[[MiniBatch, Sequence[Tensor], TemplateTable], object] = lambda *_: None
        """Is told what a forward is about to run with: the mini-batch, what was received, and the stubs' outputs."""
        self.of_loss: Callable[[InFlight], OfLoss] | None = None
        """On the last stage, gives a mini-batch's loss, and what runs its backward."""
        self.snapshots: Snapshots | None = None
        """Of what steps change beside weights, where a later run shall forward once more what is in flight now."""
        self._module = module
        self._schedule = schedule
        self._to = to
        self._timeline = timeline
        self._source = source
        self._run_step = run_step
        cut = module.cut.steps[STEP]
        self._passage = cut.passages[module.stage]
        self._shapes = Shapes(cut, self._passage)
        self._gradient_comes = any(crossing.gradient for crossing in self._passage.sends)
        self._gradient_goes = any(crossing.gradient for crossing in self._passage.receives)
        # The plan has no transfers between stages of one rank, which hand over as they compute.
        takes = (self._post_activation, self._receive_activation) if to.previous_is_here else ()
        hands_on = (self._post_gradient, self._send_activation) if to.next_is_here else ()
        takes_back = (self._receive_gradient,) if to.next_is_here else ()
        hands_back = (self._send_gradient,) if to.previous_is_here else ()
        self._methods: dict[Kind, tuple[Callable[[int], None], ...]] = {
            Kind.POST_FORWARD: (self._post_activation,),
            Kind.RECV_FORWARD: (self._receive_activation,),
            Kind.FORWARD: (*takes, self._forward, *hands_on),
            Kind.POST_BACKWARD: (self._post_gradient,),
            Kind.SEND_FORWARD: (self._send_activation,),
            Kind.RECV_BACKWARD: (self._receive_gradient,),
            Kind.BACKWARD: (*takes_back, self._backward, *hands_back),
            Kind.INPUT_GRADIENT: (*takes_back, self._input_gradient, *hands_back),
            Kind.WEIGHT_GRADIENT: (self._weight_gradient,),
            Kind.SEND_BACKWARD: (self._send_gradient,),
        }
        self.begin_at(0)

    @property
    def stage(self) -> int:
        """Which."""
        return self._module.stage

    def begin_at(self, number: int) -> None:
        """The plan starts with mini-batch `number`: at the beginning, and after the data ran out."""
        self._choice = Choice(self._schedule, self._module.stage, self._module.num_stages, number)
        self._to_post: deque[int] = deque()
        self.ran_dry = False

    def do(self, kind: Kind, number: int) -> None:
        """Do what an action says for mini-batch `number`."""
        for method in self._methods[kind]:
            method(number)

    def forget(self, number: int) -> None:
        """Mini-batch `number` is done, or has no loss."""
        self.versions.release(number)
        if self.snapshots is not None:
            self.snapshots.forget(number)
        del self.in_flight[number]
        # The last stage forwards nothing in advance, so this is where it learns that the others have run dry.
        if not self.in_flight and self._module.num_stages > 1 and self._source.mini_batch(number + 1) is None:
            self.ran_dry = True

    def leave_out(self, number: int, left_out: bool) -> None:
        """The last stage has a loss for mini-batch `number`, or has none, so that nobody backwards it.

        Raises:
            CutError: if it has one, and this stage did not run its part.
        """
        work = self.in_flight[number]
        if work.ended_early and not left_out:
            raise CutError(
                f"`training_step` returned None for mini-batch {number} on stage {self.stage}, before its next stage"
                " begins, but the last stage made a loss. What a step decides before it has run the model must follow"
                " from the batch alone: there, other numbers of the model are not those of the whole one."
            )
        work.left_out = left_out

    def settle(self) -> None:
        """Training is over: forget what is in flight."""
        self.in_flight.clear()
        self.versions.release_all()
        self.ran_dry = True
        if self.snapshots is not None:
            self.snapshots.forget_all()

    def make_room_for_update(self) -> None:
        """The optimizer is about to step."""
        self.versions.advance(self._choice.oldest_to_come(self._source))

    def keep(self, at: int, in_window: int) -> State:
        """What another run needs to forward once more what is in flight, each mini-batch with what it had.

        Args:
            at: the mini-batch that is backwarded next.
            in_window: how many mini-batches of the next update were backwarded.

        Returns:
            Tensors and numbers; of tensors, those of this run.
        """
        # Where the data ran out, the pipeline is filled anew with the next mini-batch.
        anew = self.ran_dry and not self.in_flight
        memory = Memory(0, {}, 0) if anew else self._choice.memory(at, self.versions.count, in_window)
        grads = {name: each.grad for name, each in self.versions.named.items() if each.grad is not None}
        assert self.snapshots is not None
        with self._module.drawing(0):
            # Here everything hangs in the module that is this stage's own.
            moments = self.snapshots.in_flight()
        return {
            "choice": asdict(memory),
            "older": {} if anew else self.versions.older(),
            "gradients": grads if in_window else {},
            "moments": moments,
        }

    def put_back(self, kept: State) -> None:
        """The first mini-batches of this run were in flight in another one, where `keep` returned this."""
        self._choice.remember(Memory(**kept["choice"]))
        self.versions.put_back(kept["older"])
        for name, gradient in kept["gradients"].items():
            parameter = self.versions.named[name]
            parameter.grad = gradient.to(parameter.device, copy=True)
        assert self.snapshots is not None
        with self._module.drawing(0):
            self.snapshots.put_back(kept["moments"])

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
        with self._timeline.measure(WAIT_ACTIVATION, number):
            # Both ends know alike which shapes are new.
            has_record = mini_batch.has_record or self._shapes.of(mini_batch.signature) is None
            told = has_record and self._hear_of(mini_batch)
            received = self._to.activations_in.receive()
        self.in_flight[number] = InFlight(mini_batch, self._shapes.of(mini_batch.signature), told, received)

    def _hear_of(self, mini_batch: MiniBatch) -> bool:
        """Take a mini-batch's record; whether it tells new shapes."""
        assert self._to.records_in is not None
        record = Record(*self._to.records_in.receive())
        _, mini_batch.fingerprint = agreed(self._module.stage, mini_batch.mark, record.mark, STEP)
        self.news.hear(record)
        if record.table is not None:
            self._shapes.learn(mini_batch.signature, record.table)
            self._post_known()
        return record.table is not None

    def _forward(self, number: int) -> None:
        mini_batch = self._source.mini_batch(number)
        if mini_batch is None:
            self.ran_dry = True
            return
        work = self.in_flight.get(number) or InFlight(mini_batch, self._shapes.of(mini_batch.signature))
        self.in_flight[number] = work
        new = work.told or work.known is None
        if not new and mini_batch.has_record:
            self._send_record(mini_batch, None)
        table = None if work.known is None else work.known.table
        for leaf, crossing in zip(work.received, self._passage.receives):
            leaf.requires_grad_(crossing.gradient)
        self.versions.use(number, self._choice.forward(mini_batch, min(self.in_flight), self.versions.count))
        with self._timeline.measure(FORWARD, number), self.versions.of(number):
            self.before_forward(mini_batch, work.received, table or {})
            made = self._module.forward(
                STEP, lambda: self._step(mini_batch), mini_batch.seed, work.received, table, describe=new
            )
        if new:
            table = {**(table or {}), **made.templates}
            work.known = self._shapes.learn(mini_batch.signature, table)
            self._send_record(mini_batch, table)
        work.sent, work.returned, work.ended_early = made.sent, made.returned, made.ended_early
        if work.ended_early and work.known is not None:
            device = self._module.device
            work.sent = [torch.zeros(spec.shape, dtype=spec.dtype, device=device) for spec in work.known.sent]

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
        with self._begin_backward(work):
            if work.left_out:
                pass
            elif self.of_loss is not None:
                loss, run = self.of_loss(work)
                run(loss)
            elif outputs := self._outputs(work):
                torch.autograd.backward([out for out, _ in outputs], [gradient for _, gradient in outputs])
        if self._to.gradients_out is None:
            self.forget(number)

    def _input_gradient(self, number: int) -> None:
        work = self.in_flight[number]
        with self._begin_backward(work):
            outputs = [] if work.left_out else self._outputs(work)
            if self.of_loss is not None and not work.left_out:
                loss, run = self.of_loss(work)
                # Whatever runs the backward of a loss runs that of a stand-in, and tells the gradient of the loss.
                stand_in = loss.detach().requires_grad_()
                run(stand_in)
                outputs = [] if stand_in.grad is None else [(loss, stand_in.grad)]
            received = [leaf for leaf in work.received if leaf.requires_grad]
            work.second_half = backward_in_halves(outputs, received)
        # The second half holds what it needs of them.
        work.sent = work.gradients = ()

    def _weight_gradient(self, number: int) -> None:
        work = self.in_flight[number]
        assert work.second_half is not None
        with self._running_backward(work):
            work.second_half()
        self.forget(number)

    def _begin_backward(self, work: InFlight) -> AbstractContextManager[None]:
        """A backward, or its first half, runs inside."""
        self.news.books.backward_begins(self.versions.count - self.versions.number_of(work.mini_batch.number))
        return self._running_backward(work)

    @contextmanager
    def _running_backward(self, work: InFlight) -> Iterator[None]:
        number = work.mini_batch.number
        with (
            self._timeline.measure(BACKWARD, number),
            self.versions.of(number),
            self._module.drawing(work.mini_batch.seed),
        ):
            yield

    def _send_gradient(self, number: int) -> None:
        assert self._to.gradients_out is not None
        if self._gradient_goes:
            received = self.in_flight[number].received
            self._to.gradients_out.send([gradient_of(leaf) for leaf in received if leaf.requires_grad])
        if self.in_flight[number].second_half is None:
            self.forget(number)

    # ---- what they need ----

    def _step(self, mini_batch: MiniBatch) -> Any:
        if self.snapshots is not None:
            self.snapshots.before(mini_batch.number)
        return self._run_step(mini_batch)

    def _send_record(self, mini_batch: MiniBatch, table: TemplateTable | None) -> None:
        if self._to.records_out is not None:
            self._to.records_out.send(tuple(self.news.record(mini_batch, table)))

    def _outputs(self, work: InFlight) -> list[tuple[Tensor, Tensor]]:
        """What has a gradient of what was sent, each with it."""
        outputs = [out for out, crossing in zip(work.sent, self._passage.sends) if crossing.gradient]
        return [(out, gradient) for out, gradient in zip(outputs, work.gradients) if out.requires_grad]

    def _require_announced(self, sent: Sequence[Tensor], specs: Sequence[TensorSpec], number: int) -> None:
        for tensor, spec, crossing in zip(sent, specs, self._passage.sends):
            if not spec.fits(tensor):
                raise DataMismatchError(
                    f"{crossing.value} is {TensorSpec.of(tensor)} for mini-batch {number}; for earlier mini-batches of"
                    f" the same shapes it was {spec}, and the next stage counts on that. A shape that depends on the"
                    " numbers in a batch can't cross a cut: pad to a fixed size, or move the cut with `split_points`."
                )


def gradient_of(leaf: Tensor) -> Tensor:
    """What came back for a received tensor; zeros if the step did not use it this time."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
