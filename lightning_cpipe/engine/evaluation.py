"""Streams the mini-batches of an evaluation through one stage: forward only, on lanes of its own.

Training's work in flight stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_cpipe.engine.mini_batch import Mark, agreed
from lightning_cpipe.engine.neighbours import Neighbours
from lightning_cpipe.engine.shapes import Shapes
from lightning_cpipe.engine.timeline import EVALUATION, WAIT_EVALUATION, Timeline
from lightning_cpipe.stage.stage_module import StageModule
from lightning_cpipe.tree import Signature, signature


class EvaluationStream:
    """One stage of one step that does not train: `validation_step`, `test_step` or `predict_step`.

    Args:
        name: the step's name.
        module: the stage.
        to: the lanes.
        timeline: where time is noted.
    """

    def __init__(self, name: str, module: StageModule, to: Neighbours, timeline: Timeline) -> None:
        self._name = name
        self._module = module
        self._to = to
        self._timeline = timeline
        cut = module.cut.steps[name]
        self._shapes = Shapes(cut, cut.passages[module.stage])

    def run(self, batch: Any, mark: Mark, seed: int, step: Callable[[], Any]) -> Any:
        """Run this stage's part on one mini-batch.

        Args:
            batch: as the step gets it.
            mark: the mini-batch's number in this evaluation, and its fingerprint.
            seed: what its random numbers follow from.
            step: calls the user's step of the whole module.

        Returns:
            On the last stage, what the step returned; None on the others.
        """
        kind = signature(batch)
        told, received, mark = self._receive(kind, mark)
        with self._timeline.measure(EVALUATION, mark[0]):
            known = self._shapes.of(kind)
            new = told or known is None
            table = None if known is None else known.table
            made = self._module.forward(self._name, step, seed, received, table, describe=new)
            if new:
                table = {**(table or {}), **made.templates}
                self._shapes.learn(kind, table)
            if self._to.records_out is not None and self._to.activations_out is not None:
                self._to.records_out.send((mark, table if new else None))
                self._to.activations_out.send(made.sent)
            return made.returned

    def _receive(self, kind: Signature, mark: Mark) -> tuple[bool, list[Tensor], Mark]:
        """Whether the shapes were told just now, what came from the stage before, and the mark."""
        if self._to.records_in is None or self._to.activations_in is None:
            return False, [], mark
        with self._timeline.measure(WAIT_EVALUATION, mark[0]):
            theirs, table = self._to.records_in.receive()
            mark = agreed(self._module.stage, mark, theirs, self._name)
            known = self._shapes.of(kind) if table is None else self._shapes.learn(kind, table)
            assert known is not None, "the stage before says so when shapes are new"
            self._to.activations_in.post(known.received)
            return table is not None, self._to.activations_in.receive(), mark
