"""One rank's share of one run: its stages, their lanes and their streams, put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from lightning_cpipe.engine.averaging import Averaging
from lightning_cpipe.engine.decisions import Decisions
from lightning_cpipe.engine.evaluation import EvaluationStream
from lightning_cpipe.engine.mini_batch import MiniBatch, Slices, Source
from lightning_cpipe.engine.neighbours import Neighbours
from lightning_cpipe.engine.partial_sums import PartialSums
from lightning_cpipe.engine.pipelines import Pipelines
from lightning_cpipe.engine.stage_stream import STEP, StageStream
from lightning_cpipe.engine.ties import Ties
from lightning_cpipe.engine.timeline import WAIT_GRADIENT, Timeline
from lightning_cpipe.engine.training import TrainingStream
from lightning_cpipe.schedules.placement import places_of
from lightning_cpipe.schedules.schedule import Schedule
from lightning_cpipe.stage.cut import Cut
from lightning_cpipe.stage.snapshots import Snapshots
from lightning_cpipe.stage.stage_module import StageModule
from lightning_cpipe.stage.versions import Versions
from lightning_cpipe.transport.counterparts import Counterparts
from lightning_cpipe.transport.wiring import Lanes
from lightning_cpipe.tree import TensorSpec

LEAVE_OUT = "leave out"


class StageRun:
    """What lives from the strategy's set-up to its teardown.

    Attributes:
        modules: the stages, in order.
        decisions: the rank's part in the chain of what the last stage decides, from rank to rank.
        pipelines: the last stage's part in what pipelines side by side tell each other; None elsewhere.
        evaluations: the streams of the steps that do not train, of each stage in order, by name.
    """

    def __init__(
        self,
        modules: Sequence[StageModule],
        lanes: Sequence[Lanes],
        timelines: Mapping[int, Timeline],
        device: torch.device,
        *,
        hands_on: bool,
        counterparts: Counterparts | None = None,
    ) -> None:
        self.modules = modules
        self._counterparts = counterparts
        self.pipelines = Pipelines(counterparts) if counterparts is not None and modules[-1].is_last else None
        self._decisions = [
            Decisions(each.records_in.get("decisions"), each.records_out.get("decisions"), hands_on=hands_on)
            for each in lanes
        ]
        self.decisions = self._decisions[-1]
        self._lanes = lanes
        self._timelines = timelines
        self._device = device
        self._training_lanes = [Neighbours.of_training(each) for each in lanes]
        self._evaluation_lanes = [Neighbours.of_evaluation(each) for each in lanes]
        to_each = self._to_each(self._evaluation_lanes)
        self.evaluations = {
            name: [EvaluationStream(name, module, to, timelines[module.stage]) for module, to in zip(modules, to_each)]
            for name in self.cut.steps
            if name != STEP
        }
        self._training: TrainingStream | None = None

    def _to_each(self, of_places: Sequence[Neighbours]) -> list[Neighbours]:
        """The lanes of each stage, from those of each place."""
        places = places_of(self.stages)
        return [to for own, stages in zip(of_places, places) for to in own.in_a_row(len(stages), self._device)]

    @property
    def cut(self) -> Cut:
        """How the module is cut."""
        return self.modules[0].cut

    @property
    def stages(self) -> list[int]:
        """Those of this rank."""
        return [module.stage for module in self.modules]

    @property
    def has_last(self) -> bool:
        """Whether one of them makes the loss."""
        return self.modules[-1].is_last

    @property
    def trains(self) -> bool:
        """Whether there is a stream of training."""
        return self._training is not None

    @property
    def training(self) -> TrainingStream:
        """The stream of training."""
        if self._training is None:
            raise RuntimeError("this run does not train: it was set up by `trainer.validate`, `test` or `predict`.")
        return self._training

    def train(
        self,
        schedule: Schedule,
        source: Source,
        run_step: Callable[[int, MiniBatch], object],
        slices: Slices | None = None,
        sums: Mapping[str, TensorSpec] | None = None,
        *,
        keep: bool = False,
    ) -> TrainingStream:
        """Begin to train.

        Args:
            schedule: whose rows are run.
            source: where the mini-batches are.
            run_step: calls the user's step of the whole module for a stage, on a mini-batch.
            slices: where the micro-batches of a flush schedule are.
            sums: what the stages tell each other of their gradients, by purpose.
            keep: whether a later run may go on from any step of this one.
        """
        to_each = self._to_each(self._training_lanes)
        versions = [Versions(module.parameters().items(), schedule.versions.keeps) for module in self.modules]
        streams = [
            StageStream(
                module,
                schedule,
                own,
                to,
                self._timelines[module.stage],
                slices or source,
                partial(run_step, module.stage),
            )
            for module, own, to in zip(self.modules, versions, to_each)
        ]
        last = self.modules[-1]
        own_by_stage = {module.stage: own.named for module, own in zip(self.modules, versions)}
        ties = Ties.of(self.cut.ties, schedule, own_by_stage, self._lanes[-1].links, keep=keep)
        told = {
            purpose: PartialSums(
                purpose, self.stages, last.num_stages, schedule, self._lanes[-1].links, spec, self._device, keep=keep
            )
            for purpose, spec in (sums or {}).items()
        }
        for stream in streams if keep else ():
            stream.snapshots = Snapshots(last.root, self.cut, stream.stage)
        timeline = self._timelines[last.stage]
        averaging = self._averaging(versions, ties)
        self._training = TrainingStream(streams, schedule, last.num_stages, timeline, ties, slices, told, averaging)
        return self._training

    def _averaging(self, versions: Sequence[Versions], ties: Ties) -> Averaging | None:
        """Over the counterparts of this rank, if there are any."""
        if self._counterparts is None:
            return None
        copies = set(map(id, ties.copies))
        # A backward begins with the last stage, and with what a stage ends with.
        backwards = [each for own in reversed(versions) for each in reversed(own.named.values())]
        averaged = [each for each in backwards if id(each) not in copies]
        return Averaging(averaged, ties.added_to, self._counterparts.start_sum, self._counterparts.num_replicas)

    def agree_to_leave_out(self, number: int, has_no_loss: bool) -> bool:
        """Whether mini-batch `number`, which is backwarded next, has no loss in this pipeline; the last stage knows."""
        training = self.training
        if self.decisions.leads:
            self.decisions.tell(LEAVE_OUT, has_no_loss)
        else:
            with self._timelines[training.last.stage].measure(WAIT_GRADIENT, number):
                has_no_loss = self.decisions.hear(LEAVE_OUT)
        training.leave_out(number, has_no_loss)
        return has_no_loss

    def follow(self) -> None:
        """The module's weights were changed from outside: let all that is kept of them be the same."""
        for module in self.modules:
            module.follow()

    def follow_freezing(self) -> None:
        """Weights may have been frozen or unfrozen: let their copies be the same."""
        for module in self.modules:
            module.follow_freezing()

    def settle(self) -> int:
        """Training is over: discard what is in flight.

        Returns:
            How many messages were discarded.
        """
        discarded = sum(to.settle(decisions) for to, decisions in zip(self._training_lanes, self._decisions))
        if self._training is not None:
            self._training.settle()
        return discarded

    def close(self) -> None:
        """Take all lanes to their end and leave the module as it was, weights excepted."""
        ends: list[Decisions | Neighbours | Pipelines] = [
            *self._decisions,
            *self._training_lanes,
            *self._evaluation_lanes,
            *([] if self.pipelines is None else [self.pipelines]),
        ]
        for each in ends:
            each.tell_last()
        for each in ends:
            each.discard()
        for lanes in self._lanes:
            for edge in lanes.outgoing.values():
                edge.flush()
        self.remove()

    def remove(self) -> None:
        """Leave the module as it was, weights excepted."""
        for module in reversed(self.modules):
            module.remove()
