"""Flush schedules: micro-batches of a mini-batch go through the stages, and the update is that of plain training."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from torch.distributed.pipelining.schedules import PipelineScheduleMulti
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError

from lightning_cpipe.callbacks import IdleMonitor, ThroughputMonitor
from lightning_cpipe.strategy.setup import whole_loss
from tests.helpers.causes import cause
from tests.helpers.fits import Notes, Seen, fit_alone, fit_in_pipeline, require_same_bits
from tests.helpers.modules import WIDTH, Chain, Tied, TiedThrice, make_optimizer, noise_loader
from tests.helpers.ranks import run_ranks
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
        (3, "zb", 4, 1),
        *(
            pytest.param(*each, marks=pytest.mark.full)
            for each in (
                (1, "1f1b", 4, 1),
                (3, "gpipe", 4, 2),
                (2, "1f1b", 4, 1),
                (4, "1f1b", 5, 1),
                (2, "zb", 1, 2),
                (1, "zb", 3, 1),
            )
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
        return {"loss": loss, "rows": y[:, 0]}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.log("from_hook", float(batch_idx))


class Outputs(pl.Callback):
    """Notes what hooks get."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, Any]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        if trainer.is_global_zero:
            self.seen.append((float(outputs["loss"]), outputs["rows"]))


def _look(trainer: pl.Trainer, *_: Any) -> Any:
    outputs = next(each.seen for each in trainer.callbacks if isinstance(each, Outputs))
    return outputs, trainer.logger.rows if isinstance(trainer.logger, Notes) else None


@pytest.mark.parametrize(
    ("p", "schedule"),
    [(2, "1f1b"), *(pytest.param(*each, marks=pytest.mark.full) for each in ((1, "zb"), (2, "gpipe")))],
)
def test_logged_values_and_outputs_are_those_of_the_mini_batch(p: int, schedule: str) -> None:
    options: dict[str, Any] = {
        "max_epochs": EPOCHS,
        "log_every_n_steps": 1,
        "callbacks": lambda: [Outputs()],
        "look": _look,
    }
    train = partial(noise_loader, 20, 6)
    strategy = {"schedule": schedule, "num_microbatches": 4}
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
    for (_, last), (_, rows_of_all) in zip(outputs, plain_outputs):
        assert torch.equal(last, rows_of_all[len(rows_of_all) - len(last) :]), (
            "what else is returned is the last slice's"
        )
    assert ranks[0].losses == ranks[-1].losses


def test_tied_weights_are_updated_with_the_gradients_of_the_same_mini_batch() -> None:
    options: dict[str, Any] = {"max_epochs": EPOCHS, "val": noise_loader}
    module = partial(Tied, "adamw")
    strategy = {"schedule": "1f1b", "split_points": ["net.1", "net.2"]}
    seen = fit_in_pipeline(3, module, noise_loader, strategy=strategy, **options)
    plain = fit_alone(module, noise_loader, **options)
    assert seen[0].losses == plain.losses
    require_same_bits(seen[0].weights, plain.weights)


@pytest.mark.full
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_stages_that_are_tied_in_a_circle_do_not_wait_for_each_other(schedule: str) -> None:
    strategy = {"schedule": schedule, "num_microbatches": 2, "split_points": ["net.1", "net.2"]}
    seen = fit_in_pipeline(3, TiedThrice, noise_loader, strategy=strategy, max_epochs=EPOCHS)
    plain = fit_alone(TiedThrice, noise_loader, max_epochs=EPOCHS)
    assert seen[0].losses == pytest.approx(plain.losses, rel=1e-5)


class InDicts(Chain):
    """Takes batches of its own kind, which it slices itself; draws, and accumulates in slices where it clips."""

    def __init__(self) -> None:
        super().__init__(optimizer="plain_sgd")

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {"x": batch[0], "y": batch[1], "mask": torch.ones(WIDTH)}

    def split_batch(self, batch: dict[str, Tensor], num_microbatches: int) -> list[dict[str, Tensor]]:
        pairs = zip(batch["x"].split(2), batch["y"].split(2))
        return [{"x": x, "y": y, "mask": batch["mask"]} for x, y in pairs]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:  # type: ignore[override]
        return nn.functional.mse_loss(self(batch["x"] * batch["mask"]), batch["y"])


def test_a_module_slices_its_own_batches() -> None:
    """Clipped by the norm of the whole gradient, which is that of the mini-batch."""
    options: dict[str, Any] = {"max_epochs": 1, "gradient_clip_val": 0.01}
    train = partial(noise_loader, 12, 6)
    strategy = {"schedule": "1f1b", "num_microbatches": 3}
    seen = fit_in_pipeline(2, InDicts, train, strategy=strategy, **options)
    plain = fit_alone(InDicts, train, **options)
    assert seen[0].losses == pytest.approx(plain.losses, rel=1e-6)
    for name, weight in plain.weights.items():
        torch.testing.assert_close(seen[0].weights[name], weight, rtol=1e-5, atol=1e-7)


IGNORED = -100


class BySamples(Chain):
    """Its loss is a mean over the rows that are not ignored, or a sum; its slices count by their samples."""

    reduction = "mean"

    def __init__(self) -> None:
        super().__init__(optimizer="adamw")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:  # type: ignore[override]
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y, ignore_index=IGNORED, reduction=self.reduction)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss


class OverTokens(BySamples):
    def loss_weights(self, micro_batches: list[tuple[Tensor, Tensor]]) -> list[float]:
        counts = [int((y != IGNORED).sum()) for _, y in micro_batches]
        return [count / max(1, sum(counts)) for count in counts]


class Summed(BySamples):
    reduction = "sum"

    def loss_weights(self, micro_batches: list[Any]) -> list[float]:
        return [1.0] * len(micro_batches)


def padded_loader() -> DataLoader[tuple[Tensor, ...]]:
    """Two batches of six; in the first one the middle third is all ignored, in the second one the first third."""
    x = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(3))
    y = torch.tensor([1, 2, IGNORED, IGNORED, 3, IGNORED, IGNORED, IGNORED, 0, 1, 2, IGNORED])
    return DataLoader(TensorDataset(x, y), 6)


@pytest.mark.parametrize(
    ("module", "schedule"),
    [(OverTokens, "gpipe"), (OverTokens, "zb"), (Summed, "1f1b")],
)
def test_losses_count_for_what_the_module_says(module: type[BySamples], schedule: str) -> None:
    """A slice of ignored rows, whose mean is no number, adds nothing."""
    strategy = {"schedule": schedule, "num_microbatches": 3}
    seen = fit_in_pipeline(2, module, padded_loader, strategy=strategy, max_epochs=EPOCHS)
    plain = fit_alone(module, padded_loader, max_epochs=EPOCHS)
    for each in seen:
        assert each.losses == pytest.approx(plain.losses, rel=1e-6)
    torch.testing.assert_close(seen[0].weights, plain.weights, rtol=0, atol=1e-6)
    if module is OverTokens:
        assert seen[0].metrics == pytest.approx(plain.metrics, rel=1e-6)


@pytest.mark.parametrize("module", [BySamples, OverTokens])
def test_losses_that_do_not_make_up_that_of_the_mini_batch_are_told_of(
    module: type[BySamples], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    # Each rank is a copy of this process.
    monkeypatch.setattr(whole_loss, "rank_zero_warn", said.append)
    strategy = {"schedule": "gpipe", "num_microbatches": 3}
    (seen,) = fit_in_pipeline(1, module, padded_loader, strategy=strategy, max_epochs=1, look=lambda *_: said)
    told = [
        "`training_step` gives a loss of 2.40255 for the first mini-batch, and its 3 micro-batches give nan together"
    ]
    assert [text.partition(",")[0] + "," + text.split(",")[1] for text in seen.found] == told * (module is BySamples)


class Returns(Chain):
    """Returns no loss for a short slice."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:  # type: ignore[override]
        loss = self.loss(batch)
        return None if len(batch[0]) == 1 else loss


def test_a_micro_batch_without_a_loss_is_refused() -> None:
    said = cause(2, Returns(), where="at micro-batch 1", schedule="gpipe", num_microbatches=2)
    assert "`training_step` returned NoneType for a micro-batch of batch_idx 0 of epoch 0" in said
    assert "zero times something of the model" in said


SAME_AS = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zb": ScheduleInterleavedZeroBubble,
}
"""torch's schedules, the last two with two stages per rank."""


@pytest.mark.parametrize(
    "schedule", ["1f1b", *(pytest.param(each, marks=pytest.mark.full) for each in SAME_AS if each != "1f1b")]
)
def test_one_update_is_that_of_torch(schedule: str) -> None:
    several = issubclass(SAME_AS[schedule], PipelineScheduleMulti)
    cuts = ["net.1", "net.2", "net.3"] if several else ["net.2"]
    train = partial(noise_loader, 8, 8)
    ours = fit_in_pipeline(
        len(cuts) + 1,
        partial(Chain, optimizer="plain_sgd"),
        train,
        devices=2,
        strategy={"schedule": schedule, "num_microbatches": 4, "split_points": cuts},
        max_steps=1,
    )[0]

    def in_torch(rank: int) -> tuple[dict[str, Tensor], float]:
        dist.init_process_group("gloo")
        try:
            net = Chain().net
            parts = (
                {each: net[each : each + 1] for each in (rank, rank + 2)} if several else {rank: net[2 * rank :][:2]}
            )
            stages = [PipelineStage(part, each, len(cuts) + 1, torch.device("cpu")) for each, part in parts.items()]
            made = SAME_AS[schedule](stages if several else stages[0], 4, nn.functional.mse_loss)
            ((x, y),) = train()
            losses: list[Tensor] = []
            made.step(x) if rank == 0 else made.step(target=y, losses=losses)
            named = {name: p - 0.05 * p.grad for name, p in net.named_parameters() if p.grad is not None}
            return {f"net.{name}": weight.detach() for name, weight in named.items()}, float(sum(losses)) / 4
        finally:
            dist.destroy_process_group()

    (first, _), (second, loss) = run_ranks(in_torch, 2)
    torch.testing.assert_close({**first, **second}, ours.weights, rtol=1e-6, atol=1e-8)
    assert ours.losses == pytest.approx([loss], rel=1e-6)


class Watches(IdleMonitor):
    """Keeps its last numbers."""

    numbers: dict[str, float] = {}  # noqa: RUF012

    def _numbers(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.numbers = super()._numbers(*args, **kwargs)
        return self.numbers


@pytest.mark.full
def test_what_goes_with_the_continuous_schedule_goes_with_flushes(tmp_path: Path) -> None:
    """Monitors, a limit of memory, and a checkpoint in the middle of an epoch."""
    strategy = {"schedule": "1f1b", "num_microbatches": 4, "memory_limit": "1GB"}
    train = partial(noise_loader, 24, 4)
    straight = fit_in_pipeline(2, partial(Chain, dropout=0.5), train, strategy=strategy, max_steps=10, max_epochs=-1)[0]

    def callbacks() -> list[pl.Callback]:
        saves = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=6)
        return [Watches(picture=False), ThroughputMonitor(window_size=2), saves]

    def monitored(trainer: pl.Trainer, *_: Any) -> Any:
        return next(each.numbers for each in trainer.callbacks if isinstance(each, Watches)), trainer.logger.rows

    options: dict[str, Any] = {"max_epochs": -1, "log_every_n_steps": 2, "enable_checkpointing": True}
    first = fit_in_pipeline(
        2,
        partial(Chain, dropout=0.5),
        train,
        strategy=strategy,
        max_steps=6,
        callbacks=callbacks,
        look=monitored,
        logger=Notes(),
        **options,
    )[0]
    numbers, rows = first.found
    assert numbers["pipe/idle_ratio_predicted"] == pytest.approx(1 / 5)
    assert numbers["stage0/delay_updates"] == numbers["stage0/delay_promised_updates"] == 0
    assert [step for step, row in rows if "stage0/delay_updates" in row] == [2, 4, 6, 6]
    rest = fit_in_pipeline(
        2,
        partial(Chain, dropout=0.5),
        train,
        strategy=strategy,
        max_steps=10,
        max_epochs=-1,
        ckpt_path=tmp_path / "last.ckpt",
    )[0]
    assert first.losses + rest.losses == straight.losses
    require_same_bits(rest.weights, straight.weights)


class Normed(Chain):
    """Draws random numbers, and keeps running means."""

    def __init__(self) -> None:
        super().__init__(dropout=0.3, noise=True)
        self.net[1].norm = nn.BatchNorm1d(WIDTH)


def buffers(_: pl.Trainer, module: pl.LightningModule) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


@pytest.mark.full
@pytest.mark.parametrize("schedule", ["1f1b", "zb"])
def test_the_number_of_stages_changes_no_bit(schedule: str) -> None:
    def fit(p: int) -> Seen:
        strategy = {"schedule": schedule, "num_microbatches": 3}
        train = partial(noise_loader, 24, 6)
        return fit_in_pipeline(p, Normed, train, strategy=strategy, max_epochs=EPOCHS, look=buffers)[0]

    two, three = fit(2), fit(3)
    assert two.losses == three.losses
    require_same_bits(two.weights, three.weights)
    require_same_bits(two.found, three.found)
    assert two.found["net.1.norm.num_batches_tracked"] == 3 * EPOCHS * 4


class Skips(Chain):
    """Has no loss for every third mini-batch."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:  # type: ignore[override]
        return None if batch_idx % 3 == 2 else super().training_step(batch, batch_idx)


@pytest.mark.full
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb"])
def test_one_stage_may_skip_mini_batches(schedule: str) -> None:
    seen = fit_in_pipeline(1, Skips, noise_loader, strategy={"schedule": schedule}, max_epochs=EPOCHS)[0]
    plain = fit_alone(Skips, noise_loader, max_epochs=EPOCHS)
    assert seen.losses == plain.losses
    require_same_bits(seen.weights, plain.weights)
