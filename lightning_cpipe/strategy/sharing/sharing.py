"""Lets every rank know what the last stage logged and decided.

Callbacks such as `ModelCheckpoint` and `EarlyStopping` run on every rank and must decide alike, but only the last
stage makes the loss and the metrics. It says once per local step what changed, and whether to stop; the others hear
it before their hooks of the same step run. If a hook on the last stage begins to agree on something, the word of the
step is said before that, so that no rank waits for a word that waits for it, and a second one follows at the end.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_cpipe.engine.decisions import Decisions
from lightning_cpipe.engine.pipelines import Pipelines
from lightning_cpipe.engine.timeline import WAIT_DECISION, WAIT_EVALUATION, Timeline
from lightning_cpipe.strategy.lightning_private import (
    follow_plan,
    known_metrics,
    learn_metrics,
    plan_timed_validation,
)
from lightning_cpipe.strategy.sharing.signals import Request, Signals
from lightning_cpipe.strategy.steps.not_finite import NotFinite

Numbers = dict[str, float]

STEP = "step"
REST_OF_STEP = "rest of the step"


class Word(NamedTuple):
    """What the last stage says at one moment.

    Attributes:
        loss: of the mini-batch; None if there is none to tell.
        callback: metrics for callbacks that changed.
        logged: metrics for loggers that changed.
        stop: whether to stop after this step.
        request: what all ranks do after this step, because a signal asked for it.
        validate: whether it is time for a validation, by the clock of rank 0; None where validations are not timed.
        more: whether the step's hooks are still running, so that another word follows.
    """

    loss: float | None
    callback: Numbers
    logged: Numbers
    stop: bool
    request: Request
    validate: bool | None
    more: bool


class LossAlone(dict[str, Any]):
    """A step's output as hooks see it on other stages than the last."""

    def __missing__(self, key: str) -> Any:
        raise KeyError(
            f"outputs[{key!r}] of `training_step` is on the last stage only, which is rank 0; the other stages know the"
            " loss. Look at it `if trainer.is_global_zero`."
        )


class Sharing(ABC):
    """One rank's share of the talk.

    Args:
        trainer: whose metrics and flags are told or set.
        decisions: the chain on which words travel.
        signals: what this process was asked for.
    """

    leads: bool
    """Whether this rank holds the last stage."""

    def __init__(self, trainer: pl.Trainer, decisions: Decisions, signals: Signals) -> None:
        self._trainer = trainer
        self._decisions = decisions
        self._signals = signals
        self._heard = True

    @contextmanager
    def unheard(self) -> Iterator[None]:
        """A hook runs inside that no other rank runs."""
        self._heard = False
        try:
            yield
        finally:
            self._heard = True

    def require_heard(self) -> None:
        """All ranks are about to agree on something.

        Raises:
            MisconfigurationException: in a hook that no other rank runs.
        """
        if not self._heard:
            raise MisconfigurationException(
                "A hook that uses the outputs of a step runs on rank 0 alone, which has them. It can't broadcast, wait"
                " for the other ranks or save a checkpoint, since they would not take part. Do that in another hook,"
                " such as `on_validation_end`."
            )

    @abstractmethod
    def after_step(self, output: dict[str, Any]) -> dict[str, Any]:
        """The optimization of a local step is done.

        Returns:
            What hooks get as the step's output; on other stages than the last, with the true loss.
        """

    @abstractmethod
    def after_step_hooks(self) -> None:
        """The hooks of a local step are done: every rank stops after the same one.

        Lightning comes by here without a step, too, when it resumes at the end of a validation.
        """

    @abstractmethod
    def before_collective(self) -> None:
        """A hook is about to wait for other ranks, which may be waiting for what this one has to say."""

    def before_exchange(self) -> None:
        """This stage is about to exchange values with the same stages of other pipelines, which may be waiting, too."""
        return

    @abstractmethod
    def metrics(self, topic: str) -> None:
        """Tell or learn what changed, at any other time."""

    @abstractmethod
    def evaluation_of_loader(self, outputs: list[dict[str, Any]]) -> None:
        """Tell or learn what was logged for the loader of an evaluation that was done last."""

    def returned(self, outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What an evaluation returns: hooks that the last stage alone runs may have logged at its end."""
        told = self.agree("returned", [numbers_of(each) for each in outputs] if self.leads else None)
        return outputs if self.leads else [tensors_of(each) for each in told]

    @abstractmethod
    def agree(self, topic: str, content: Any) -> Any:
        """What the last stage has to say on a topic, on every rank."""


class Speaker(Sharing):
    """The last stage's share; of pipelines side by side, the first one's. Nothing here waits.

    Args:
        trainer: see `Sharing`.
        decisions: see `Sharing`.
        signals: see `Sharing`.
        pipelines: the row of those side by side, if there are several.
    """

    leads = True

    def __init__(
        self, trainer: pl.Trainer, decisions: Decisions, signals: Signals, pipelines: Pipelines | None = None
    ) -> None:
        super().__init__(trainer, decisions, signals)
        self._pipelines = pipelines
        self._told: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self._loss: Tensor | None = None
        self._not_finite = NotFinite(trainer)
        self._next_word: str | None = None
        """Of the step at hand; None between steps."""

    @override
    def after_step(self, output: dict[str, Any]) -> dict[str, Any]:
        self._loss = output.get("loss")
        self._next_word = STEP
        return output

    @override
    def after_step_hooks(self) -> None:
        if self._next_word is not None:
            self._say(self._next_word)
            self._next_word = self._loss = None

    @override
    def before_collective(self) -> None:
        self.require_heard()
        self._say_step()

    @override
    def before_exchange(self) -> None:
        if self._pipelines is not None:
            self._say_step()

    def _say_step(self) -> None:
        if self._next_word == STEP:
            self._next_word = REST_OF_STEP
            self._say(STEP, more=True)

    @override
    def metrics(self, topic: str) -> None:
        # Reading them computes the values of the epoch.
        _ = self._trainer.callback_metrics, self._trainer.logged_metrics
        self._say(topic)

    @override
    def evaluation_of_loader(self, outputs: list[dict[str, Any]]) -> None:
        self.agree("loader", numbers_of(outputs[-1]))
        # The hooks at the end of the evaluation's epoch may read them, before they log any themselves.
        self.metrics("loader's metrics")

    @override
    def agree(self, topic: str, content: Any) -> Any:
        self.before_collective()
        self._tell(topic, content)
        return content

    def _tell(self, topic: str, content: Any) -> None:
        self._decisions.tell(topic, content)
        if self._pipelines is not None:
            self._pipelines.words.tell(topic, content)

    def _say(self, topic: str, *, more: bool = False) -> None:
        callback, logged = (
            {name: value for name, value in now.items() if told.get(name) is not value}
            for now, told in zip(known_metrics(self._trainer), self._told)
        )
        for told, changed in zip(self._told, (callback, logged)):
            told.update(changed)
        loss = {} if self._loss is None else {"loss": self._loss}
        of_loss, of_callback, of_logged = _in_numbers(loss, callback, logged)
        for number in of_loss.values():
            self._not_finite.see(number)
        word = Word(
            of_loss.get("loss"),
            of_callback,
            of_logged,
            self._trainer.should_stop,
            # What is said before the step's last word is not obeyed yet.
            Request.NOTHING if more else self._signals.decide(),
            plan_timed_validation(self._trainer),
            more,
        )
        self._tell(topic, tuple(word))


class Listener(Sharing):
    """Every other stage's share.

    Args:
        trainer: see `Sharing`.
        decisions: see `Sharing`.
        signals: see `Sharing`.
        timeline: where it is noted how long this rank waits for a word.
    """

    leads = False

    def __init__(self, trainer: pl.Trainer, decisions: Decisions, signals: Signals, timeline: Timeline) -> None:
        super().__init__(trainer, decisions, signals)
        self._timeline = timeline
        self._word: Word | None = None
        """Of the step at hand; None between steps."""

    @override
    def after_step(self, output: dict[str, Any]) -> dict[str, Any]:
        self._word = self._listen(STEP)
        if self._word.loss is not None:
            output["loss"] = _tensor(self._word.loss)
        return LossAlone(output)

    @override
    def after_step_hooks(self) -> None:
        if self._word is not None:
            self._obey(self._listen(REST_OF_STEP) if self._word.more else self._word)
            self._word = None

    @override
    def before_collective(self) -> None:
        pass

    @override
    def metrics(self, topic: str) -> None:
        self._obey(self._listen(topic))

    @override
    def evaluation_of_loader(self, outputs: list[dict[str, Any]]) -> None:
        outputs[-1] = tensors_of(self.agree("loader", None))
        self.metrics("loader's metrics")

    @override
    def agree(self, topic: str, content: Any) -> Any:
        return self._hear(topic)

    def _hear(self, topic: str) -> Any:
        # What an evaluation takes is shown apart.
        kind = WAIT_DECISION if self._trainer.training else WAIT_EVALUATION
        with self._timeline.measure(kind, self._timeline.batch):
            return self._decisions.hear(topic)

    def _listen(self, topic: str) -> Word:
        word = Word(*self._hear(topic))
        learn_metrics(self._trainer, tensors_of(word.callback), tensors_of(word.logged))
        return word

    def _obey(self, word: Word) -> None:
        self._trainer.should_stop = word.stop
        follow_plan(self._trainer, word.validate)
        self._signals.learn(Request(word.request))


class Alone(Sharing):
    """Where there is one stage, it has nobody to tell."""

    leads = True

    def __init__(self, trainer: pl.Trainer, decisions: Decisions, signals: Signals) -> None:
        super().__init__(trainer, decisions, signals)
        self._not_finite = NotFinite(trainer)

    @override
    def after_step(self, output: dict[str, Any]) -> dict[str, Any]:
        # It needs the loss for nothing else, and a device would have to be waited for.
        if "loss" in output and output["loss"].device.type == "cpu":
            self._not_finite.see(float(output["loss"]))
        return output

    @override
    def after_step_hooks(self) -> None:
        self._signals.decide()

    @override
    def before_collective(self) -> None:
        pass

    @override
    def metrics(self, topic: str) -> None:
        pass

    @override
    def evaluation_of_loader(self, outputs: list[dict[str, Any]]) -> None:
        pass

    @override
    def agree(self, topic: str, content: Any) -> Any:
        return content


def numbers_of(metrics: dict[str, Tensor]) -> Numbers:
    """Metrics as numbers."""
    (numbers,) = _in_numbers(metrics)
    return numbers


def _in_numbers(*groups: dict[str, Tensor]) -> list[Numbers]:
    """Groups of metrics as numbers. Together they are fetched from a device once, which waits for it."""
    values = iter(_fetched([value for group in groups for value in group.values()]))
    return [dict(zip(group, values)) for group in groups]


def _fetched(scalars: Sequence[Tensor | float]) -> list[float]:
    """What a callback gives to loggers may be plain numbers."""
    on_device = [each for each in scalars if isinstance(each, Tensor) and each.is_cuda]
    if not on_device:
        return [float(scalar) for scalar in scalars]
    fetched = iter(torch.stack([scalar.detach().reshape(()).double() for scalar in on_device]).tolist())
    return [next(fetched) if isinstance(each, Tensor) and each.is_cuda else float(each) for each in scalars]


def tensors_of(numbers: Numbers) -> dict[str, Tensor]:
    """Numbers as metrics, again."""
    return {name: _tensor(number) for name, number in numbers.items()}


def _tensor(number: float) -> Tensor:
    """Of double precision where single precision would not be what the last stage has."""
    single = torch.tensor(number, dtype=torch.float32)
    return single if float(single) == number or math.isnan(number) else torch.tensor(number, dtype=torch.float64)
