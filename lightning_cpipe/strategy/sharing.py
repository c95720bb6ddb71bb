"""Lets every rank know what the last stage logged and decided.

Callbacks such as `ModelCheckpoint` and `EarlyStopping` run on every rank and must decide alike, but only the last
stage makes the loss and the metrics. It says once per local step what changed, and whether to stop; the others hear
it before their hooks of the same step run. A hook on the last stage that begins a collective says it first, so that
no rank waits for a word that waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_cpipe.engine.decisions import Decisions
from lightning_cpipe.engine.timeline import EVALUATION, WAIT_DECISION, Timeline
from lightning_cpipe.strategy.lightning_private import known_metrics, learn_metrics, set_received_sigterm

Numbers = dict[str, float]


class _Said(NamedTuple):
    """What the last stage says of a local step.

    Attributes:
        loss: of the mini-batch; None if there is none to tell.
        callback: metrics for callbacks that changed.
        logged: metrics for loggers that changed.
        stop: whether to stop after this step.
        sigterm: whether a SIGTERM was received.
        more: whether the step's hooks are still running, so that another word follows.
    """

    loss: float | None
    callback: Numbers
    logged: Numbers
    stop: bool
    sigterm: bool
    more: bool


class Sharing:
    """One rank's share of the talk.

    Args:
        trainer: whose metrics and flags are told or set.
        decisions: the chain.
        timeline: where it is noted how long this rank waits for them.
    """

    def __init__(self, trainer: pl.Trainer, decisions: Decisions, timeline: Timeline) -> None:
        self._trainer = trainer
        self._decisions = decisions
        self._timeline = timeline
        self._told: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self._loss: Tensor | None = None
        self._step_is_open = False
        self._said_early = False
        self._heard: _Said | None = None
        self.hand_raised: Callable[[], bool] = lambda: False
        """Whether this rank, or one before it, has received a SIGTERM."""

    @property
    def leads(self) -> bool:
        """Whether this rank holds the last stage."""
        return self._decisions.leads

    def after_step(self, output: dict[str, Any]) -> None:
        """The optimization of a local step is done; on other stages, `output` gets the true loss."""
        if self.leads:
            self._loss = output.get("loss")
            self._step_is_open = True
            self._said_early = False
            return
        self._heard = self._listen("step")
        if self._heard.loss is not None:
            output["loss"] = _tensor(self._heard.loss)

    def after_step_hooks(self) -> None:
        """The hooks of a local step are done: every rank stops after the same one."""
        if self.leads:
            self._tell("more of the step" if self._said_early else "step", more=False)
            self._step_is_open = False
            return
        if self._heard is not None and self._heard.more:
            self._heard = self._listen("more of the step")
        self._obey()

    def before_collective(self) -> None:
        """A hook is about to wait for other ranks, which may be waiting for what this one has to say."""
        if self.leads and self._step_is_open and not self._said_early:
            self._tell("step", more=True)
            self._said_early = True

    def metrics(self, topic: str) -> None:
        """Tell or learn what changed, at any other time."""
        if self.leads:
            # Reading them computes the values of the epoch.
            _ = self._trainer.callback_metrics, self._trainer.logged_metrics
            self._tell(topic, more=False)
        else:
            self._heard = self._listen(topic)
            self._obey()

    def evaluation_of_loader(self, outputs: list[dict[str, Any]]) -> None:
        """Tell or learn what was logged for the loader of an evaluation that was done last."""
        numbers = self.agree("loader", _numbers(outputs[-1]) if self.leads else None)
        if not self.leads:
            outputs[-1] = _tensors(numbers)
        # The hooks at the end of the evaluation's epoch may read them, before they log any themselves.
        self.metrics("loader's metrics")

    def agree(self, topic: str, content: Any) -> Any:
        """What the last stage has to say on a topic, on every rank."""
        self.before_collective()
        if self.leads:
            self._decisions.tell(topic, content)
            return content
        return self._hear(topic)

    def _tell(self, topic: str, *, more: bool) -> None:
        loss = None if self._loss is None else float(self._loss)
        callback, logged = (
            {name: value for name, value in now.items() if told.get(name) is not value}
            for now, told in zip(known_metrics(self._trainer), self._told)
        )
        for told, changed in zip(self._told, (callback, logged)):
            told.update(changed)
        said = _Said(
            loss,
            _numbers(callback),
            _numbers(logged),
            self._trainer.should_stop,
            self.hand_raised(),
            more,
        )
        set_received_sigterm(self._trainer, said.sigterm)
        self._decisions.tell(topic, tuple(said))

    def _listen(self, topic: str) -> _Said:
        said = _Said(*self._hear(topic))
        learn_metrics(self._trainer, _tensors(said.callback), _tensors(said.logged))
        return said

    def _hear(self, topic: str) -> Any:
        # What an evaluation takes is shown apart.
        kind = WAIT_DECISION if self._trainer.training else EVALUATION
        with self._timeline.measure(kind, self._timeline.batch):
            return self._decisions.hear(topic)

    def _obey(self) -> None:
        if self._heard is not None:
            self._trainer.should_stop = self._heard.stop
            set_received_sigterm(self._trainer, self._heard.sigterm)


def _numbers(metrics: dict[str, Tensor]) -> Numbers:
    return {name: float(value) for name, value in metrics.items()}


def _tensors(numbers: Numbers) -> dict[str, Tensor]:
    return {name: _tensor(number) for name, number in numbers.items()}


def _tensor(number: float) -> Tensor:
    """Of double precision where single precision would not be what the last stage has."""
    single = torch.tensor(number, dtype=torch.float32)
    return single if float(single) == number or math.isnan(number) else torch.tensor(number, dtype=torch.float64)
