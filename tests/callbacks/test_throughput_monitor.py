"""`ThroughputMonitor` counts each sample of a pipeline once, and only the time of training."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_cpipe import ContinuousPipeStrategy, ThroughputMonitor
from lightning_cpipe.callbacks import throughput_monitor
from tests.helpers.fits import Notes, Seen, fit_alone, fit_in_pipeline
from tests.helpers.modules import WIDTH, Block, Chain, noise_loader

WINDOW = 4
BATCH = 3
FLOPS = 3 * (2 * BATCH * WIDTH * WIDTH * 4)
"""Of a mini-batch: four linear layers, whose backward costs twice their forward."""


class Clock(pl.Callback):
    """The monitor's time: a second per training batch, a hundred per validation batch."""

    def __init__(self) -> None:
        self.now = 0.0
        # This is a process of the test's own.
        throughput_monitor.time = SimpleNamespace(perf_counter=lambda: self.now)  # type: ignore[assignment]

    def on_train_batch_start(self, *_: Any) -> None:
        self.now += 1

    def on_validation_batch_start(self, *_: Any) -> None:
        self.now += 100


def rows(trainer: pl.Trainer, _: pl.LightningModule) -> list[tuple[int | None, dict[str, float]]]:
    return [row for each in trainer.loggers if isinstance(each, Notes) for row in each.of("throughput/")]


def fit(p: int, module: Any = Chain, **options: Any) -> list[Seen]:
    """Fit with a monitor; p = 0 is plain Lightning."""
    settings = {
        "module": module,
        "train": partial(noise_loader, samples=24),
        "max_epochs": 1,
        "callbacks": lambda: [Clock(), ThroughputMonitor(WINDOW, every_n_steps=1)],
        "logger": Notes(),
        "look": rows,
        **options,
    }
    return fit_in_pipeline(p, **settings) if p else [fit_alone(**settings)]


@pytest.mark.parametrize("p", [0, 1, pytest.param(2, marks=pytest.mark.full), 3])
def test_a_pipeline_counts_each_sample_once(p: int) -> None:
    first, *others = fit(p)
    rates = {"throughput/batches_per_s": 1.0, "throughput/samples_per_s": float(BATCH)}
    if p:
        rates["throughput/flops_per_s"] = float(FLOPS)
    # Nothing before the window is full, and the fill is not in it.
    assert [step for step, _ in first.found] == list(range(WINDOW, 8 + 1))
    assert all(row == rates for _, row in first.found)
    assert all(of_rank.found == [] for of_rank in others)


@pytest.mark.parametrize("p", [0, 2])
def test_evaluations_are_left_out(p: int) -> None:
    found = fit(p, val=noise_loader, val_check_interval=2)[0].found
    assert len(found) == 8 - WINDOW + 1
    assert {row["throughput/samples_per_s"] for _, row in found} == {float(BATCH)}


def test_the_last_batch_counts_for_what_it_holds() -> None:
    found = fit(2, train=partial(noise_loader, samples=22))[0].found
    assert [row["throughput/samples_per_s"] for _, row in found] == [*[3.0] * 4, (2 * 3 + 1) / 3]


@pytest.mark.parametrize(("every", "steps"), [(3, [6]), (None, [4, 6, 8])])
def test_it_logs_as_often_as_it_is_told_or_as_the_trainer_does(every: int | None, steps: list[int]) -> None:
    monitor = lambda: [Clock(), ThroughputMonitor(WINDOW, every_n_steps=every)]  # noqa: E731
    first = fit(2, callbacks=monitor, log_every_n_steps=2)[0]
    assert [step for step, _ in first.found] == steps


def every_row(trainer: pl.Trainer, _: pl.LightningModule) -> list[tuple[int | None, dict[str, float]]]:
    return [row for each in trainer.loggers if isinstance(each, Notes) for row in each.rows]


def test_a_window_that_is_not_full_leaves_no_empty_row() -> None:
    module = type("Silent", (Chain,), {"training_step": lambda self, batch, batch_idx: self.loss(batch)})
    assert fit(2, module, look=every_row, limit_train_batches=WINDOW - 1)[0].found == []


class Words(pl.LightningModule):
    """Takes (batch, length) of words and one label each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, WIDTH)
        self.net = nn.Sequential(*(Block() for _ in range(4)))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        out = self.net(self.embed(batch["words"])).mean(1)
        return nn.functional.cross_entropy(out, batch["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def words_loader(length: int = 5) -> Any:
    samples = [{"label": torch.tensor(i % WIDTH), "words": torch.arange(length) + i % 3} for i in range(16)]
    return DataLoader(samples, batch_size=2)


@pytest.mark.parametrize("p", [0, 2])
def test_tokens_are_counted_where_there_are_some(p: int) -> None:
    found = fit(p, Words, train=words_loader)[0].found
    assert {row["throughput/tokens_per_s"] for _, row in found} == {2 * 5.0}
    assert {row["throughput/samples_per_s"] for _, row in found} == {2.0}


def logged(*batches: Any) -> dict[str, float]:
    """The last numbers of a monitor that sees these batches, one per second."""
    clock = Mock(now=0.0)
    notes, monitor = Notes(), ThroughputMonitor(2, every_n_steps=1)
    trainer = Mock(loggers=[notes], is_global_zero=True, global_step=0)
    trainer.strategy.root_device = torch.device("cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput_monitor, "time", SimpleNamespace(perf_counter=lambda: clock.now))
        monitor.on_train_start(trainer, Chain())
        for i, batch in enumerate(batches):
            clock.now += 1
            monitor.on_train_batch_end(trainer, Chain(), {}, batch, i)
    return notes.rows[-1][1]


PICTURES, WORDS = torch.zeros(4, 3), torch.zeros(4, 5, dtype=torch.int64)


def test_the_first_batch_decides_whether_there_are_tokens() -> None:
    """A batch with tokens after one without once ended the training, and so did many without after one with."""
    assert logged(PICTURES, WORDS, WORDS) == {"throughput/batches_per_s": 1.0, "throughput/samples_per_s": 4.0}
    assert logged(WORDS, PICTURES, WORDS)["throughput/tokens_per_s"] == 4 * 5
    # A sample without any counts as one.
    assert logged(WORDS, *[PICTURES] * 9)["throughput/tokens_per_s"] == 4
    # A batch of words whose length is 0 has no fewer.
    assert logged(WORDS, *[WORDS[:, :0]] * 9)["throughput/tokens_per_s"] == 4


@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`")
@pytest.mark.parametrize(
    ("tensor", "tokens"),
    [
        (torch.zeros(4, 5, dtype=torch.int64), 20),
        (torch.zeros(4, 5, dtype=torch.int32), 20),
        (torch.zeros(4, dtype=torch.int64), None),
        (torch.zeros(2, 1, dtype=torch.int64), None),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), None),
        (torch.zeros(4, 8, 8, dtype=torch.int8), None),
        (torch.zeros(4, 8, dtype=torch.bool), None),
    ],
    ids=lambda value: f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else str(value),
)
def test_tokens_are_indices_with_a_row_for_each_sample(tensor: Tensor, tokens: int | None) -> None:
    """Images and masks once counted as tokens, and a pair of indices beside the samples ended the training."""
    assert logged(*[(PICTURES, tensor)] * 2).get("throughput/tokens_per_s") == tokens


def test_an_empty_batch_ends_no_training() -> None:
    """Lightning's own count refuses fewer samples than batches."""
    assert logged(*[PICTURES[:0]] * 2)["throughput/batches_per_s"] == 1


class Parcel:
    """A batch whose size nobody knows."""

    def __init__(self, pair: Any) -> None:
        self.pair = pair


class OfParcels(Chain):
    """Unpacks its batches itself."""

    def training_step(self, batch: Parcel, batch_idx: int) -> Tensor:
        return self.loss(batch.pair)


def parcels() -> Any:
    return DataLoader([Parcel(pair) for pair in noise_loader(samples=24)], batch_size=None)


@pytest.mark.parametrize("p", [0, 1])
def test_batches_of_unknown_size_are_counted_as_batches(p: int) -> None:
    found = fit(p, OfParcels, train=parcels)[0].found
    assert {row["throughput/batches_per_s"] for _, row in found} == {1.0}
    assert not any("throughput/samples_per_s" in row for _, row in found)


@pytest.mark.parametrize("options", [{"logger": False}, {"fast_dev_run": 2}, {"logger": [Notes(), Notes()]}])
@pytest.mark.parametrize("p", [0, 2])
def test_it_works_with_any_loggers_and_without(p: int, options: dict[str, Any]) -> None:
    first = fit(p, **options)[0]
    assert len(first.losses) == options.get("fast_dev_run", 8)
    assert len(first.found) == (2 * 5 if isinstance(options.get("logger"), list) else 0)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16), ("bf16-true", torch.bfloat16)],
)
def test_utilization_is_of_the_peak_of_all_stages_at_the_precision_that_is_computed_in(
    precision: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU that is not there."""
    peaks = {torch.float32: 100.0, torch.bfloat16: 400.0}
    monkeypatch.setattr(throughput_monitor, "get_available_flops", lambda device, dtype: peaks[dtype])
    clock = Clock.__new__(Clock)
    clock.now = 0.0
    monkeypatch.setattr(throughput_monitor, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    notes, monitor = Notes(), ThroughputMonitor(2, every_n_steps=1)
    strategy = Mock(
        spec=ContinuousPipeStrategy,
        root_device=torch.device("cuda", 0),
        num_ranks=2,
        num_replicas=1,
        forward_flops=10,
        precision=None,
    )
    trainer = Mock(strategy=strategy, loggers=[notes], precision=precision, is_global_zero=True, global_step=0)
    module = Chain().bfloat16() if precision == "bf16-true" else Chain()
    monitor.on_train_start(trainer, module)
    for i in range(2):
        clock.now += 1
        monitor.on_train_batch_end(trainer, module, {}, [torch.zeros(3, WIDTH)], i)
    assert notes.rows[-1][1]["throughput/mfu"] == 3 * 10 / (2 * peaks[dtype])
