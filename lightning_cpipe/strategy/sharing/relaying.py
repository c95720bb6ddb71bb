"""The share of a last stage whose pipeline is not the first one: it has its own loss, and rank 0's word on the rest.

What callbacks see and decide by must be the same on all ranks, while each pipeline logs numbers of its own data, unless
they are synchronised. So this stage takes over rank 0's values and flags before its hooks run, and tells the stages
before. It waits for rank 0's word of each local step; both have just waited for each other's gradients.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import override

from lightning_cpipe.engine.decisions import Decisions
from lightning_cpipe.engine.pipelines import Pipelines
from lightning_cpipe.engine.timeline import Timeline
from lightning_cpipe.strategy.lightning_private import known_metrics, overrule_metrics
from lightning_cpipe.strategy.sharing.sharing import (
    STEP,
    Alone,
    Listener,
    Sharing,
    Speaker,
    Word,
    numbers_of,
    tensors_of,
)
from lightning_cpipe.strategy.sharing.signals import Signals


class Relay(Listener):
    """Hears rank 0, and tells the stages before.

    Args:
        trainer: see `Sharing`.
        own: the chain of its own pipeline, in which it leads.
        signals: see `Sharing`.
        pipelines: the row of those side by side.
        timeline: see `Listener`.
    """

    leads = True

    def __init__(
        self, trainer: pl.Trainer, own: Decisions, signals: Signals, pipelines: Pipelines, timeline: Timeline
    ) -> None:
        super().__init__(trainer, pipelines.words, signals, timeline)
        self._own = own
        self._loss: Tensor | None = None

    @override
    def after_step(self, output: dict[str, Any]) -> dict[str, Any]:
        # What is asked for here goes on to rank 0.
        self._signals.heard()
        self._loss = output.get("loss")
        self._word = self._listen(STEP)
        self._loss = None
        return output

    @override
    def before_collective(self) -> None:
        self.require_heard()

    @override
    def metrics(self, topic: str) -> None:
        # Reading them computes the values of the epoch; all pipelines take part in those that are synchronised.
        _ = self._trainer.callback_metrics, self._trainer.logged_metrics
        super().metrics(topic)

    @override
    def agree(self, topic: str, content: Any) -> Any:
        self.before_collective()
        heard = super().agree(topic, content)
        self._own.tell(topic, heard)
        return heard

    @override
    def returned(self, outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [tensors_of(each) for each in self.agree("returned", None)]

    @override
    def _listen(self, topic: str) -> Word:
        word = super()._listen(topic)
        loss = None if self._loss is None else numbers_of({"loss": self._loss})["loss"]
        self._own.tell(topic, tuple(word._replace(loss=loss)))
        callback, logged = known_metrics(self._trainer)
        overrule_metrics(self._trainer, {**logged, **callback})
        return word


def share(
    trainer: pl.Trainer, decisions: Decisions, signals: Signals, timeline: Timeline, pipelines: Pipelines | None
) -> Sharing:
    """This rank's share.

    Args:
        trainer: see `Sharing`.
        decisions: see `Sharing`.
        signals: see `Sharing`.
        timeline: where it is noted how long this rank waits for a word.
        pipelines: the row of those side by side, where there are several and this rank holds the last stage.
    """
    if pipelines is not None and not pipelines.leads:
        return Relay(trainer, decisions, signals, pipelines, timeline)
    if decisions.is_alone and pipelines is None:
        return Alone(trainer, decisions, signals)
    if decisions.leads:
        return Speaker(trainer, decisions, signals, pipelines)
    return Listener(trainer, decisions, signals, timeline)
