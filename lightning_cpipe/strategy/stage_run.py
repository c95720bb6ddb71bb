"""One rank's share of one run: the stage's module, its lanes and its streams, put together."""

from __future__ import annotations

from collections.abc import Callable

from lightning_cpipe.engine.decisions import Decisions
from lightning_cpipe.engine.evaluation import EvaluationStream
from lightning_cpipe.engine.mini_batch import MiniBatch, Slices, Source
from lightning_cpipe.engine.neighbours import Neighbours
from lightning_cpipe.engine.stage_stream import STEP, StageStream
from lightning_cpipe.engine.ties import Ties
from lightning_cpipe.engine.timeline import Timeline
from lightning_cpipe.engine.training import TrainingStream
from lightning_cpipe.schedules.schedule import Schedule
from lightning_cpipe.stage.stage_module import StageModule
from lightning_cpipe.stage.versions import Versions
from lightning_cpipe.transport.wiring import Lanes


class StageRun:
    """What lives from the strategy's set-up to its teardown.

    Attributes:
        module: the stage.
        decisions: its place in the chain of what the last stage decides.
        evaluations: the streams of the steps that do not train, by name.
    """

    def __init__(self, module: StageModule, lanes: Lanes, timeline: Timeline) -> None:
        self.module = module
        self.decisions = Decisions(lanes.records_in.get("decisions"), lanes.records_out.get("decisions"))
        self._lanes = lanes
        self._timeline = timeline
        self._training_lanes = Neighbours.of_training(lanes)
        self._evaluation_lanes = Neighbours.of_evaluation(lanes)
        self.evaluations = {
            name: EvaluationStream(name, module, self._evaluation_lanes, timeline)
            for name in module.cut.steps
            if name != STEP
        }
        self._training: TrainingStream | None = None

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
        versions: Versions,
        source: Source,
        run_step: Callable[[MiniBatch], object],
        slices: Slices | None = None,
    ) -> TrainingStream:
        """Begin to train; see `TrainingStream`."""
        ties = Ties.of(self.module.cut.ties, self.module.stage, schedule, versions.named, self._lanes.ties)
        source = slices or source
        stage = StageStream(self.module, schedule, versions, self._training_lanes, self._timeline, source, run_step)
        self._training = TrainingStream([stage], schedule, self.module.num_stages, self._timeline, ties, slices)
        return self._training

    def settle(self) -> int:
        """Training is over: discard what is in flight.

        Returns:
            How many messages were discarded.
        """
        discarded = self._training_lanes.settle(self.decisions)
        if self._training is not None:
            self._training.settle()
        return discarded

    def close(self) -> None:
        """Take all lanes to their end and leave the module as it was, weights excepted."""
        self.decisions.tell_last()
        self._training_lanes.tell_last()
        self._evaluation_lanes.tell_last()
        self.decisions.discard()
        self._training_lanes.discard()
        self._evaluation_lanes.discard()
        for edge in self._lanes.outgoing.values():
            edge.flush()
        self.module.remove()
