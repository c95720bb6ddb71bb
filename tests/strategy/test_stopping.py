"""Whoever stops training early stops it after the same step on every rank; what is in flight is discarded."""

from __future__ import annotations

import os
import signal
from collections import Counter
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback
from torch import Tensor

from lightning_cpipe.engine.timeline import BACKWARD, FORWARD
from tests.helpers.causes import cause
from tests.helpers.fits import alone, fit_alone, fit_in_pipeline, in_pipeline, quiet_trainer
from tests.helpers.modules import Chain, noise_loader

PER_EPOCH = 8


class StopsInStep(Chain):
    """`training_step` itself asks for the end, at a certain mini-batch."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        # Only the last stage comes to this line, and it never runs ahead.
        self.trainer.should_stop |= self.global_step == self.at
        return loss


def stop_in(hook: str, at: int) -> pl.Callback:
    """A callback that asks for the end in a hook of its choice, once `global_step` is there."""

    def stop(trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop |= not trainer.sanity_checking and trainer.global_step >= at

    return LambdaCallback(**{hook: stop})


def stop_on_rank_0(trainer: pl.Trainer, *_: Any) -> None:
    trainer.should_stop |= trainer.is_global_zero and trainer.global_step == 5


EARLY = partial(EarlyStopping, patience=0, mode="max")
STOPS: dict[str, dict[str, Any]] = {
    "in the step": {"module": partial(StopsInStep, 5)},
    "at the end of a batch": {"callbacks": lambda: [stop_in("on_train_batch_end", 5)]},
    "at the end of a batch, rank 0 alone": {
        "callbacks": lambda: [LambdaCallback(on_train_batch_end=stop_on_rank_0)],
    },
    "at the end of an epoch": {"callbacks": lambda: [stop_in("on_train_epoch_end", 10)]},
    "at the end of a validation": {"callbacks": lambda: [stop_in("on_validation_end", 10)], "val_check_interval": 3},
    "early, by validations": {"callbacks": lambda: [EARLY("val_loss")], "val_check_interval": 3},
    "early, by epochs": {"callbacks": lambda: [EARLY("loss_epoch", check_on_train_epoch_end=True)]},
    "early, but not too early": {"callbacks": lambda: [EARLY("val_loss")], "val_check_interval": 3, "min_steps": 12},
    "at a threshold": {"callbacks": lambda: [EarlyStopping("val_loss", divergence_threshold=0.0)]},
}


def options_of(name: str) -> dict[str, Any]:
    return {"module": Chain, "train": noise_loader, "val": noise_loader, "max_epochs": 5, "look": ends, **STOPS[name]}


def ends(trainer: pl.Trainer, _: pl.LightningModule) -> tuple[int, int, bool, str]:
    return trainer.global_step, trainer.current_epoch, trainer.should_stop, str(trainer.state.status)


REPEATS = {"at the end of a batch", "early, by epochs", "at a threshold"}
"""Who asks, asks in a hook in which another one asks, too."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if name in REPEATS else ()) for name in STOPS]
)
def test_every_rank_stops_where_plain_lightning_would(name: str) -> None:
    plain = fit_alone(**options_of(name))
    assert 0 < len(plain.losses) < 5 * PER_EPOCH
    p = 2
    for stage, of_rank in enumerate(reversed(fit_in_pipeline(p, **options_of(name)))):
        # The losses fall from the first mini-batch on, with delay or without, so that all stop at the same time.
        assert of_rank.found == plain.found
        assert len(of_rank.losses) == len(plain.losses)
        kinds = Counter(kind for kind, _ in of_rank.spans)
        assert kinds[FORWARD] - kinds[BACKWARD] == p - 1 - stage


def fit_twice(stops: bool, **options: Any) -> list[Any]:
    """Two fits of the same module with the same trainer: the first one stops in its first epoch, or is its end."""
    losses: list[float] = []
    note = LambdaCallback(on_train_batch_end=lambda t, m, outputs, *_: losses.append(float(outputs["loss"])))
    stop = [LambdaCallback(on_train_batch_end=stop_on_rank_0)] if stops else []
    trainer = quiet_trainer(callbacks=[note, *stop], max_epochs=2 if stops else 1, **options)
    module = Chain(optimizer="plain_sgd")
    trainer.fit(module, noise_loader(), noise_loader())
    first, end = losses.copy(), ends(trainer, module)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, noise_loader(), noise_loader())
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return [first, losses[len(first) :], end, ends(trainer, module), metrics]


@pytest.mark.parametrize("stops", [True, False], ids=["stopped early", "came to its end"])
def test_the_same_trainer_fits_again_after_a_fit_that(stops: bool) -> None:
    scenario = partial(fit_twice, stops)
    plain = alone(scenario)
    assert list(map(len, plain[:2])) == [5 if stops else PER_EPOCH, PER_EPOCH]
    assert in_pipeline(1, scenario) == [plain]
    ours, *others = in_pipeline(3, scenario)
    uninterrupted = fit_in_pipeline(3, partial(Chain, optimizer="plain_sgd"), noise_loader, max_epochs=2)[0].losses
    assert ours[0] == uninterrupted[: len(ours[0])]
    assert len(ours[1]) == PER_EPOCH
    assert ours[2:4] == plain[2:4]
    for of_rank in others:
        assert of_rank == ours


class Asks(pl.Callback):
    """Lets the ranks agree, each with an opinion of its own, as Lightning's callbacks do."""

    def __init__(self) -> None:
        self.answers: list[Any] = []

    def ask(self, trainer: pl.Trainer, *_: Any) -> None:
        strategy, rank = trainer.strategy, trainer.global_rank
        self.answers += [strategy.reduce_boolean_decision(yes) for yes in (rank == 0, rank != 0)]
        self.answers.append(strategy.broadcast(("rank", rank)))

    on_train_batch_end = on_validation_end = on_train_epoch_end = on_train_end = ask


def answers(trainer: pl.Trainer, _: pl.LightningModule) -> list[Any]:
    return next(each.answers for each in trainer.callbacks if isinstance(each, Asks))


def test_rank_0_decides_for_all() -> None:
    options = {"callbacks": lambda: [Asks()], "look": answers, "max_epochs": 2, "val_check_interval": 4}
    for of_rank in fit_in_pipeline(3, Chain, noise_loader, noise_loader, **options):
        assert len(of_rank.found) == 3 * (16 + 5 + 2 + 1)
        assert of_rank.found == [True, False, ("rank", 0)] * (len(of_rank.found) // 3)


def terminating(entry: str) -> pl.Callback:
    """Sends rank 0 a SIGTERM, early on."""

    def terminate(trainer: pl.Trainer, _: Any, __: Any, batch_idx: int, *___: Any) -> None:
        if batch_idx == 2 and trainer.is_global_zero:
            os.kill(os.getpid(), signal.SIGTERM)

    hooks = {"fit": "on_train_batch_start", "validate": "on_validation_batch_start"}
    return LambdaCallback(**{hooks[entry]: terminate})


def terminated(entry: str, **options: Any) -> str:
    """How a run ends in which rank 0 is told to terminate."""
    trainer = quiet_trainer(callbacks=[terminating(entry)], max_epochs=50, **options)
    try:
        getattr(trainer, entry)(Chain(), noise_loader(samples=90))
    except SystemExit as error:
        return type(error).__name__
    return f"went on to step {trainer.global_step}"


@pytest.mark.parametrize("entry", ["fit", "validate"])
def test_one_stage_ends_at_a_sigterm(entry: str) -> None:
    """The signal was noted, and nobody looked."""
    assert in_pipeline(1, partial(terminated, entry)) == ["SIGTERMException"]


def test_an_evaluation_ends_at_a_sigterm() -> None:
    assert "SIGTERMException" in cause(2, Chain(), entry="validate", where="", callbacks=[terminating("validate")])
