"""Looks again while training runs whether what crosses the cuts is still all that counts.

The probe sees the first mini-batch. A step that begins later to use what was not sent would be computed with zeros. So
each stage, by itself and before it forwards mini-batches 0, 1, 2, 4, 8, 16, …, asks the probe's question once more (see
`lightning_cpipe.probe.look`). What that costs goes to nothing in a long run, and nothing stays unseen for ever. Where
mini-batches are sliced, the numbers are those of micro-batches.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_cpipe.engine.mini_batch import MiniBatch
from lightning_cpipe.engine.stage_stream import STEP
from lightning_cpipe.errors import CutError
from lightning_cpipe.probe.look import read_unloaded, used_unreceived
from lightning_cpipe.probe.probe import reads_batch
from lightning_cpipe.probe.step import Observed, Step, StepBatch
from lightning_cpipe.stage.stage_module import StageModule
from lightning_cpipe.strategy.ranks.ending import in_words
from lightning_cpipe.strategy.setup.probing import not_compiled, run_unheard
from lightning_cpipe.tree import TemplateTable


def is_due(number: int) -> bool:
    """Whether a stage looks before it forwards this mini-batch: 0, and powers of two."""
    return number & (number - 1) == 0


class _EndedEarlyError(Exception):
    """The step returned None on a stage that ends at a cut."""


class Looks:
    """One stage's looks at the steps of one run.

    Args:
        module: whose step it is.
        stage_module: the stage.
        device: where it computes.
        loads: whether batches have their numbers here.
    """

    def __init__(
        self, module: pl.LightningModule, stage_module: StageModule, device: torch.device, loads: bool = True
    ) -> None:
        self._module = module
        self._stage_module = stage_module
        self._device = device
        self._loads = loads
        self._last: int | None = None

    def look(
        self,
        mini_batch: MiniBatch,
        arguments: tuple[Any, ...],
        received: Sequence[Tensor],
        table: TemplateTable,
    ) -> None:
        """Look at the step of a mini-batch, or of a micro-batch, that is about to be forwarded.

        Args:
            mini_batch: which.
            arguments: of its step.
            received: what came from the stage before.
            table: the outputs of the stubs.

        Raises:
            CutError: if the step uses what this stage does not receive.
        """
        cut, stage = self._stage_module.cut, self._stage_module.stage

        def call(*arguments: Any) -> Observed:
            returned, logged = run_unheard(self._module, STEP, arguments)
            if returned is None and not self._stage_module.is_last:
                raise _EndedEarlyError
            return Observed(None, returned, logged)

        on_another = None if self._loads else StepBatch(arguments[0], lambda batch: call(batch, *arguments[1:]))
        step = Step(STEP, partial(call, *arguments), True, mini_batch.seed, mini_batch.signature, batch=on_another)
        passage = cut.steps[STEP].passages[stage]
        try:
            with not_compiled(), self._stage_module.drawing(mini_batch.seed):
                found = used_unreceived(self._module, step, passage, table, received, self._device)
                read = read_unloaded(self._module, step, passage, table, received, self._device)
        except _EndedEarlyError:
            # It leaves out its mini-batch before it comes to the cut, and uses nothing.
            return
        except CutError:
            raise
        except Exception as error:
            # A forward takes less than a look. If it fails, too, it says so itself.
            warnings.warn(
                f"stage {stage} could not look whether mini-batch {mini_batch.number} uses what it does not receive:"
                f" {in_words(error)}. It looks again later; until then such a use goes unseen.",
                stacklevel=2,
            )
            return
        if read is not None:
            raise reads_batch(stage, STEP, read, f" of mini-batch {mini_batch.number}")
        if found:
            before = "" if self._last is None else f" They did not for mini-batch {self._last}, when it looked last."
            raise CutError(
                f"stage {stage}, which begins at {cut.starts[stage - 1]!r}, does not receive"
                f" {' and '.join(map(str, found[:3]))}, on which nothing depended there in the first step, and computes"
                f" with zeros instead. For mini-batch {mini_batch.number} its results depend on it.{before} What it"
                " computed since may be wrong. Every step must use what crosses a cut as the first one did: let what"
                " comes later count from the beginning, or move the cut with `split_points` so that module and use lie"
                " on one stage."
            )
        self._last = mini_batch.number
