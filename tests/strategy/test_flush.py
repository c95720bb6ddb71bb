"""Flush schedules: the micro-batches of a mini-batch go through the stages, and the update is that of plain training."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanSquaredError

from tests.helpers.fits import Notes, Seen, fit_alone, fit_in_pipeline, require_same_bits
from tests.helpers.modules import Chain, make_optimizer, noise_loader
from tests.helpers.reference import train_in_slices

EPOCHS = 2


@pytest.mark.parametrize(("p", "schedule"), [(2, "gpipe"), (3, "1f1b")])
def test_one_micro_batch_has_the_bits_of_plain_lightning(p: int, schedule: str) -> None:
    """Clipping included: the norm is that of all stages."""
    options: dict[str, Any] = {"max_epochs": EPOCHS, "val": noise_loader, "gradient_clip_val": 0.01}
    module = partial(Chain, optimizer="adamw", schedule="step")
    seen = fit_in_pipeline(p, module, noise_loader, strategy={"schedule": schedule}, **options)
    plain = fit_alone(module, noise_loader, **options)
    assert seen[0].losses == plain.losses
    assert seen[0].metrics == seen[-1].metrics == plain.metrics
    require_same_bits(seen[0].weights, plain.weights)


@pytest.mark.parametrize(
    ("p", "schedule", "most", "accumulate"),
    [
        (2, "gpipe", 4, 1),
        (3, "1f1b", 2, 2),
        *(
            pytest.param(*each, marks=pytest.mark.full)
            for each in ((1, "1f1b", 4, 1), (3, "gpipe", 4, 2), (2, "1f1b", 4, 1), (4, "1f1b", 5, 1))
        ),
    ],
)
def test_micro_batches_have_the_bits_of_plain_accumulation(p: int, schedule: str, most: int, accumulate: int) -> None:
    """Slices of different sizes, and a last batch with fewer samples than slices; validated in between."""
    train = partial(noise_loader, 20, 6)
    module = partial(Chain, schedule="step")
    seen = fit_in_pipeline(
        p,
        module,
        train,
        noise_loader,
        strategy={"schedule": schedule, "num_microbatches": most},
        max_epochs=EPOCHS,
        accumulate_grad_batches=accumulate,
    )
    whole = module()
    batches = list(train()) * EPOCHS
    per_epoch = len(batches) // EPOCHS
    places = [i % per_epoch + 1 for i in range(len(batches))]
    updates = [place % accumulate == 0 or place == per_epoch for place in places]
    optimizer, scheduler = make_optimizer("sgd", "step")(list(whole.parameters()))
    losses = train_in_slices(
        whole,
        zip(batches, updates),
        lambda batch: nn.functional.mse_loss(whole(batch[0]), batch[1]),
        optimizer,
        scheduler,
        most,
        backwards=schedule == "gpipe",
        accumulate=accumulate,
    )
    for each in seen:
        assert each.losses == losses
    require_same_bits(seen[0].weights, dict(whole.named_parameters()))
    assert seen[0].metrics["val_loss"] == seen[-1].metrics["val_loss"]


def test_stages_run_the_actions_of_their_plan() -> None:
    """1F1B with four micro-batches; those of mini-batch j are numbered from 4 j on."""
    strategy = {"schedule": "1f1b", "num_microbatches": 4}
    last, first = fit_in_pipeline(2, Chain, partial(noise_loader, 8, 4), strategy=strategy, max_epochs=1)
    assert _actions(first) == "F0 F1 B0 F2 B1 F3 B2 B3 U0 F4 F5 B4 F6 B5 F7 B6 B7 U4"
    assert _actions(last) == "F0 B0 F1 B1 F2 B2 F3 B3 U0 F4 B4 F5 B5 F6 B6 F7 B7 U4"


def _actions(seen: Seen) -> str:
    letters = {"forward": "F", "backward": "B", "update": "U"}
    return " ".join(f"{letters[kind]}{number}" for kind, number in seen.spans if kind in letters)


class Logs(Chain):
    """Logs in every way, and returns more than its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.error = MeanSquaredError()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:  # type: ignore[override]
        x, y = batch
        out = self(x)
        loss = nn.functional.mse_loss(out, y)
        self.log("both", loss, on_step=True, on_epoch=True)
        self.log("epoch", loss, on_step=False, on_epoch=True)
        self.log("most", out.max(), reduce_fx="max", on_step=True, on_epoch=True)
        self.log("least", out.min(), reduce_fx="min", on_step=True, on_epoch=True)
        self.log("samples", float(len(x)), reduce_fx="sum", on_step=True, on_epoch=True)
        self.log("sized", loss, batch_size=len(x), on_step=False, on_epoch=True)
        self.error(out, y)
        self.log("error", self.error, on_step=True, on_epoch=True)
        return {"loss": loss, "out": out}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.log("from_hook", float(batch_idx))


class Outputs(pl.Callback):
    """Notes what hooks get."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, set[str]]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.seen.append((float(outputs["loss"]), set(outputs)))


def _look(trainer: pl.Trainer, *_: Any) -> Any:
    outputs = next(each.seen for each in trainer.callbacks if isinstance(each, Outputs))
    return outputs, trainer.logger.rows if isinstance(trainer.logger, Notes) else None


@pytest.mark.parametrize("p", [2, pytest.param(1, marks=pytest.mark.full)])
def test_logged_values_and_outputs_are_those_of_the_mini_batch(p: int) -> None:
    options: dict[str, Any] = {
        "max_epochs": EPOCHS,
        "log_every_n_steps": 1,
        "callbacks": lambda: [Outputs()],
        "look": _look,
    }
    train = partial(noise_loader, 20, 6)
    strategy = {"schedule": "1f1b", "num_microbatches": 4}
    ranks = fit_in_pipeline(p, Logs, train, strategy=strategy, logger=Notes(), **options)
    plain = fit_alone(Logs, train, logger=Notes(), **options)
    outputs, rows = ranks[0].found
    plain_outputs, plain_rows = plain.found
    assert len(rows) == len(plain_rows) == EPOCHS * (4 + 1)
    for (step, row), (plain_step, plain_row) in zip(rows, plain_rows):
        assert step == plain_step
        assert row == pytest.approx(plain_row, rel=1e-4)
    assert ranks[0].metrics == pytest.approx(plain.metrics, rel=1e-4)
    assert [loss for loss, _ in outputs] == pytest.approx([loss for loss, _ in plain_outputs], rel=1e-4)
    assert all(keys == {"loss", "out"} for _, keys in outputs)
    assert ranks[0].losses == ranks[-1].losses
