"""Every rank runs Lightning's hooks in Lightning's order, as often as Lightning does."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from tests.helpers.causes import cause
from tests.helpers.fits import alone, fit_alone, fit_in_pipeline, in_pipeline, quiet_trainer
from tests.helpers.modules import Chain, noise_loader

OF_CALLBACKS = [
    name
    for name in vars(pl.Callback)
    if name.startswith("on_") and "exception" not in name and "checkpoint" not in name
] + ["setup", "teardown"]

OF_MODULE = [
    name
    for name in dir(pl.LightningModule)
    if name.startswith("on_") and name != "on_gpu" and "checkpoint" not in name and "batch_transfer" not in name
] + [
    "setup", "teardown", "prepare_data", "configure_model", "configure_optimizers", "configure_callbacks",
    "configure_gradient_clipping", "optimizer_step", "optimizer_zero_grad", "lr_scheduler_step",
]  # fmt: skip

OF_RANK_0 = {
    "prepare_data",
    *(f"on_{of}_{end}" for of in ("validation", "test", "predict") for end in ("batch_end", "epoch_end")),
}
"""`prepare_data` runs once per machine; the others are given what a step returned, or may have collected it, and rank 0
holds the last stage."""


def noting(notes: list[str], owner: str, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        notes.append(f"{owner}.{name}")
        return method(self, *args, **kwargs)

    return noted


def scenario(**options: Any) -> tuple[list[str], list[str]]:
    """The hooks of a fit, and those of an evaluation of each kind after it."""
    notes: list[str] = []
    hooks = {name: noting(notes, "callback", name, getattr(pl.Callback, name)) for name in OF_CALLBACKS}
    callback = type("Noting", (pl.Callback,), hooks)()
    hooks = {name: noting(notes, "module", name, getattr(Chain, name)) for name in OF_MODULE}
    module = type("NotingChain", (Chain,), hooks)(schedule="step", optimizer="plain_sgd")
    trainer = quiet_trainer(
        callbacks=[callback], max_epochs=2, val_check_interval=3, accumulate_grad_batches=2, **options
    )
    trainer.fit(module, noise_loader(samples=16), noise_loader(samples=5))
    of_fit = notes.copy()
    trainer.validate(module, noise_loader(samples=5), verbose=False)
    trainer.test(module, noise_loader(samples=5), verbose=False)
    trainer.predict(module, noise_loader(samples=5))
    return of_fit, notes[len(of_fit) :]


def of_other_ranks(notes: list[str]) -> list[str]:
    return [note for note in notes if note.split(".")[1] not in OF_RANK_0]


@pytest.mark.parametrize("p", [1, pytest.param(2, marks=pytest.mark.full), 3])
def test_hooks_run_in_lightnings_order_on_every_rank(p: int) -> None:
    plain = alone(scenario)
    assert {"callback.on_before_optimizer_step", "module.on_validation_model_train"} <= set(plain[0])
    last, *others = in_pipeline(p, scenario)
    for ours, lightnings in zip(last, plain, strict=True):
        assert ours == lightnings
    for of_rank in others:
        for ours, lightnings in zip(of_rank, plain, strict=True):
            assert ours == of_other_ranks(lightnings)


def test_the_docs_say_what_each_hook_sees() -> None:
    text = (Path(__file__).parents[2] / "docs" / "lightning.md").read_text()
    section = text.partition("\n## Hooks\n")[2].partition("\n## ")[0]
    named = {name for line in section.splitlines() if line.startswith("|") for name in re.findall(r"`(\w+)`", line)}
    assert set(OF_CALLBACKS + OF_MODULE) - named == set()


class CollectsOutputs(Chain):
    """Its hooks, and those of a callback, put together what an evaluation's steps returned."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:  # type: ignore[override]
        return self.loss(batch)

    def on_validation_batch_end(self, outputs: Any, *_: Any) -> None:
        self.outputs.append(outputs)

    def on_validation_epoch_end(self) -> None:
        self.log("val_mean", torch.stack(self.outputs).mean())
        self.outputs.clear()


class Collects(pl.Callback):
    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.means: list[float] = []

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.outputs.append(outputs)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.means.append(float(torch.stack(self.outputs).mean()))
        self.outputs.clear()


def test_what_evaluations_return_is_put_together_where_it_is() -> None:
    """Other stages once failed there, with an empty list."""
    collected: list[Collects] = []

    def callbacks() -> list[pl.Callback]:
        collected.append(Collects())
        return [collected[-1]]

    options = {"max_epochs": 2, "callbacks": callbacks, "look": lambda *_: collected[-1].means}
    seen = fit_in_pipeline(3, CollectsOutputs, noise_loader, noise_loader, **options)
    assert [len(of_rank.found) for of_rank in seen] == [3, 0, 0]
    assert all(of_rank.metrics == seen[0].metrics for of_rank in seen)
    assert seen[0].metrics["val_mean"] == pytest.approx(seen[0].found[-1])


class CollectsItsLosses(Chain):
    """A list that every stage makes, and only the last one fills."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.outputs = getattr(self, "outputs", [])
        loss = super().training_step(batch, batch_idx)
        self.outputs.append(loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("mean_loss", torch.stack(self.outputs).mean())
        self.outputs.clear()


@pytest.mark.parametrize("p", [pytest.param(2, marks=pytest.mark.full), 3])
def test_what_a_step_collects_is_there_at_the_end_of_the_epoch(p: int) -> None:
    """Other stages once failed there, with an empty list."""
    seen = fit_in_pipeline(p, CollectsItsLosses, noise_loader, max_epochs=1)
    assert seen[0].metrics["mean_loss"] == seen[-1].metrics["mean_loss"]
    assert seen[0].metrics["mean_loss"] == pytest.approx(sum(seen[0].losses) / len(seen[0].losses), rel=1e-5)


class ReturnsMore(Chain):
    """Its hook uses more than the loss of what the step returned."""

    def __init__(self) -> None:
        super().__init__()
        self.means: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        prediction = self(batch[0])
        return {"loss": torch.nn.functional.mse_loss(prediction, batch[1]), "prediction": prediction.detach()}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.means.append(float(outputs["prediction"].mean()))


def test_a_hook_that_uses_all_that_a_step_returned_runs_where_that_is() -> None:
    """On the other stages there was a KeyError."""
    looks = {"look": lambda _, module: module.means, "max_epochs": 1, "accumulate_grad_batches": 100}
    plain = fit_alone(ReturnsMore, noise_loader, **looks)
    last, *others = fit_in_pipeline(3, ReturnsMore, noise_loader, **looks)
    assert last.found == plain.found
    assert len(last.found) == 8
    assert [each.found for each in others] == [[], []]
    assert [each.losses for each in others] == [last.losses] * 2


class UsesMore(pl.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        outputs["prediction"].mean()


def test_a_callback_is_told_where_the_rest_of_the_output_is() -> None:
    said = cause(2, ReturnsMore(), where="at mini-batch 0", callbacks=[UsesMore()])
    assert "outputs['prediction'] of `training_step` is on the last stage only" in said


class AgreesAlone(CollectsOutputs):
    """Asks all ranks, in a hook that runs on one."""

    def __init__(self, in_sanity_check: bool, ask: Callable[[pl.Trainer], Any]) -> None:
        super().__init__()
        self.in_sanity_check = in_sanity_check
        self.ask = ask

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking == self.in_sanity_check:
            self.ask(self.trainer)


@pytest.mark.parametrize("in_sanity_check", [pytest.param(True, marks=pytest.mark.full), False])
@pytest.mark.parametrize(
    "ask",
    [
        lambda trainer: trainer.strategy.broadcast(1),
        lambda trainer: trainer.strategy.barrier(),
        lambda trainer: trainer.save_checkpoint("never.ckpt"),
    ],
    ids=["broadcast", "barrier", "checkpoint"],
)
def test_what_one_rank_alone_asks_all_is_refused(ask: Any, in_sanity_check: bool) -> None:
    """The answer was taken for one to the next question, or all waited for ever."""
    module = AgreesAlone(in_sanity_check, ask)
    said = cause(2, module, val=noise_loader(), where="at mini-batch")
    assert "runs on rank 0 alone, which has them" in said


class Meter:
    """A plain object that adds up."""

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0

    def update(self, value: Tensor) -> None:
        self.sum += float(value)
        self.count += 1


class KeepsBooks(Chain):
    """Collects in a `defaultdict` and in a plain object."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: defaultdict[str, list[Tensor]] = defaultdict(list)
        self.meter = Meter()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.outputs["loss"].append(loss.detach())
        self.meter.update(loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("collected", torch.stack(self.outputs["loss"]).mean())
        self.log("metered", self.meter.sum / self.meter.count)
        self.log("steps", float(self.meter.count))


def test_what_a_step_collects_in_any_object_is_of_the_epoch_alone() -> None:
    """The probe's runs once counted on rank 0, and the hook failed on other stages, where nothing was collected."""
    seen = fit_in_pipeline(2, KeepsBooks, noise_loader, max_epochs=1)
    metrics = seen[0].metrics
    assert metrics["steps"] == len(seen[0].losses)
    assert metrics["collected"] == pytest.approx(sum(seen[0].losses) / len(seen[0].losses), rel=1e-5)
    assert metrics["metered"] == pytest.approx(metrics["collected"], rel=1e-5)
    assert seen[1].metrics == metrics
