"""Streams the mini-batches of an evaluation through one stage: forward only, on lanes of its own.

Training's work in flight stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_cpipe.engine.mini_batch import fingerprint
from lightning_cpipe.engine.shapes import Shapes, specs_of
from lightning_cpipe.engine.timeline import EVALUATION, Timeline
from lightning_cpipe.errors import DataMismatchError
from lightning_cpipe.stage.cut import StepCut
from lightning_cpipe.stage.isolation import Isolation
from lightning_cpipe.stage.randomness import seeded
from lightning_cpipe.stage.replay import Replay
from lightning_cpipe.transport.edge import Edge
from lightning_cpipe.transport.records import Records
from lightning_cpipe.tree import signature


class EvaluationStream:
    """One stage of one step that does not train: `validation_step`, `test_step` or `predict_step`.

    Args:
        name: the step's name.
        stage: which.
        cut: how the step is cut.
        replay: the stage's stubs and hooks.
        isolation: the random numbers of its modules.
        activations_in: from the stage before.
        activations_out: to the stage after.
        records_in: from the stage before.
        records_out: to the stage after.
        timeline: where time is noted.
    """

    def __init__(
        self,
        name: str,
        stage: int,
        cut: StepCut,
        replay: Replay,
        isolation: Isolation,
        activations_in: Edge | None,
        activations_out: Edge | None,
        records_in: Records | None,
        records_out: Records | None,
        timeline: Timeline,
    ) -> None:
        self._name = name
        self._stage = stage
        self._passage = cut.passages[stage]
        self._shapes = Shapes(cut)
        self._replay = replay
        self._isolation = isolation
        self._activations_in = activations_in
        self._activations_out = activations_out
        self._records_in = records_in
        self._records_out = records_out
        self._timeline = timeline

    def run(self, batch: Any, number: int, seed: int, step: Callable[[], Any]) -> Any:
        """Run this stage's part on one mini-batch.

        Args:
            batch: as the step gets it.
            number: of the mini-batch in this evaluation.
            seed: what its random numbers follow from.
            step: calls the user's step of the whole module.

        Returns:
            On the last stage, what the step returned; None on the others.
        """
        with self._timeline.measure(EVALUATION, number):
            return self._run(batch, number, seed, step)

    def _run(self, batch: Any, number: int, seed: int, step: Callable[[], Any]) -> Any:
        kind = signature(batch)
        mark = (number, fingerprint(batch))
        received = []
        told = False
        if self._records_in is not None and self._activations_in is not None:
            theirs, table = self._records_in.receive()
            if theirs != mark:
                raise DataMismatchError(
                    f"stage {self._stage} and stage {self._stage - 1} drew different mini-batches in {self._name}:"
                    f" (number, fingerprint) {mark} here, {theirs} there. All stages must draw the same data in the"
                    " same order: seed what shuffles or augments, and do not let it depend on the rank."
                )
            if told := table is not None:
                self._shapes.learn(kind, table)
            known = self._shapes.of(kind)
            assert known is not None
            self._activations_in.post(specs_of(self._passage.receives, known))
            received = self._activations_in.receive()
        table = self._shapes.of(kind)
        new = told or table is None
        with seeded(seed), self._isolation.of(seed):
            made = self._replay.run(self._name, step, received, table, describe=new)
        if new:
            table = {**(table or {}), **made.templates}
            self._shapes.learn(kind, table)
        if self._records_out is not None and self._activations_out is not None:
            self._records_out.send((mark, table if new else None))
            self._activations_out.send(made.sent)
        return made.returned
