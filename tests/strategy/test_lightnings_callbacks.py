"""Lightning's own callbacks do in a pipeline what they do without one, or are refused by name.

Further ones have files of their own: averages, the learning-rate finder, summaries, the progress bar, checkpoints,
stopping, predictions (`test_evaluation`), and what is refused (`test_refusals`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    OnExceptionCheckpoint,
    RichProgressBar,
    SpikeDetection,
    ThroughputMonitor,
    Timer,
)
from torch import Tensor
from torch.nn.utils import prune

from lightning_cpipe import ContinuousPipeStrategy
from tests.helpers.causes import cause
from tests.helpers.fits import Notes, Numbers, Seen, fit_alone, fit_in_pipeline, quiet_trainer, require_same_bits
from tests.helpers.modules import Chain, noise_loader
from tests.helpers.ranks import run_ranks

DOCS = Path(__file__).parents[2] / "docs" / "lightning.md"


def test_the_docs_name_each() -> None:
    section = re.search(r"^## Callbacks\n(.*?)(?=^## |\Z)", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    assert section is not None
    firsts = [line.split("|")[1] for line in section[1].splitlines() if line.startswith("|")]
    named = {name for first in firsts for name in re.findall(r"`(\w+)", first)}
    assert set(pl.callbacks.__all__) - named == set()


def kept(trainer: pl.Trainer, _: pl.LightningModule) -> list[tuple[int | None, dict[str, float]]]:
    """What the logger was given, by name."""
    (logger,) = trainer.loggers
    assert isinstance(logger, Notes)
    return logger.rows


class Counts(Chain):
    """Knows its operations."""

    flops_per_batch = 1000


def test_those_that_log_log_what_they_would(tmp_path: Path) -> None:
    """All at once. Of rates and loads the names are compared, of all else the numbers."""

    def callbacks() -> list[pl.Callback]:
        return [
            DeviceStatsMonitor(),
            GradientAccumulationScheduler({0: 1000}),
            LearningRateMonitor(),
            RichProgressBar(),
            SpikeDetection(exclude_batches_path=tmp_path),
            ThroughputMonitor(len, window_size=2),
            Timer(timedelta(hours=1)),
        ]

    options: dict[str, Any] = {
        "module": Counts,
        "train": noise_loader,
        "max_epochs": 1,
        "callbacks": callbacks,
        "log_every_n_steps": 1,
        "enable_progress_bar": True,
        "enable_checkpointing": False,
        "look": kept,
    }
    plain = fit_alone(**options, logger=Notes())
    first, _ = fit_in_pipeline(2, **options, logger=Notes())
    assert [step for step, _ in first.found] == [step for step, _ in plain.found]
    for (_, ours), (_, lightnings) in zip(first.found, plain.found):
        assert ours.keys() == lightnings.keys()
        measured = {name for name in ours if "per_sec" in name or "Monitor" in name or name.endswith("time")}
        assert {n: ours[n] for n in ours.keys() - measured} == {n: lightnings[n] for n in ours.keys() - measured}
    assert any("train/device/samples_per_sec" in row for _, row in first.found)
    assert any("DeviceStatsMonitor.on_train_batch_end/cpu_percent" in row for _, row in first.found)


def rates(trainer: pl.Trainer, _: pl.LightningModule) -> list[tuple[int, Any]]:
    (monitor,) = [each for each in trainer.callbacks if isinstance(each, ThroughputMonitor)]  # type: ignore[attr-defined]
    return [(each.world_size, each.available_flops) for each in monitor._throughputs.values()]


def test_lightnings_throughput_monitor_counts_each_sample_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It multiplied by the number of ranks, and compared two devices' operations with what one can do."""
    monkeypatch.setattr(pl.callbacks.throughput_monitor, "get_available_flops", lambda *_: 500)
    options: dict[str, Any] = {"callbacks": lambda: [ThroughputMonitor(len, window_size=2)], "logger": Notes()}
    for of_rank in fit_in_pipeline(2, Counts, noise_loader, noise_loader, max_epochs=1, look=rates, **options):
        assert of_rank.found == 2 * [(1, 1000)]


class Spikes(Chain):
    """Of the sixth mini-batch the loss is a hundred times what it would be."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (100 if batch_idx == 5 else 1)


def test_a_spike_ends_the_run_on_all_ranks(tmp_path: Path) -> None:
    spikes = SpikeDetection(exclude_batches_path=tmp_path)
    assert "Training spike detected in batch 5" in cause(2, Spikes(), where="at mini-batch 5", callbacks=[spikes])
    assert "5" in (tmp_path / "skip_batches.json").read_text()


class Breaks(Chain):
    """Fails at the fourth mini-batch, on the last stage."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.trainer.global_step == 3:
            raise ValueError("the first cause")
        return loss


class OfProcess(OnExceptionCheckpoint):
    """A file for each process: the one that started the ranks saves, too, as in Lightning."""

    @property
    def ckpt_path(self) -> str:
        return f"{self.dirpath}/{os.getpid()}.ckpt"


def test_a_checkpoint_on_an_exception_does_not_hide_the_exception(tmp_path: Path) -> None:
    """The pipeline is broken, so that there is nothing to save; nobody waits for parts that will not come."""
    said = cause(2, Breaks(), where="at mini-batch 3", callbacks=[OfProcess(tmp_path)], checkpoints=True)
    assert "the first cause" in said
    assert {each.stem for each in tmp_path.iterdir()} <= {str(os.getpid())}


class Pruned(Chain):
    """Half of the weights of its linear layers are masked."""

    def __init__(self) -> None:
        super().__init__()
        self.prune()

    def prune(self) -> None:
        for block in self.net:
            prune.l1_unstructured(block.linear, "weight", 0.5)


@pytest.mark.full
@pytest.mark.parametrize("schedule", ["gpipe", "continuous"])
def test_pruned_between_fits_instead_of_by_a_callback(schedule: str) -> None:
    def rounds(options: Callable[[], dict[str, Any]]) -> Numbers:
        module = Pruned()
        for number in range(2):
            if number > 0:
                module.prune()
            quiet_trainer(max_epochs=1, accumulate_grad_batches=1000, **options()).fit(module, noise_loader())
        for block in module.net:
            prune.remove(block.linear, "weight")
        return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    def in_pipeline() -> dict[str, Any]:
        return {"strategy": ContinuousPipeStrategy(schedule=schedule), "devices": 2}

    (plain,) = run_ranks(lambda _: rounds(lambda: {"devices": 1}), 1)
    assert int((plain["net.0.linear.weight"] == 0).sum()) == plain["net.0.linear.weight"].numel() * 3 / 4
    for each in run_ranks(lambda _: rounds(in_pipeline), 2):
        require_same_bits(each, plain)


STOPS: dict[str, Callable[[], pl.Callback]] = {
    "Timer": lambda: Timer(timedelta(microseconds=1), interval="step"),
    "Timer, by epochs": lambda: Timer(timedelta(microseconds=1), interval="epoch"),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.full) for name in STOPS])
def test_a_timer_stops_all_ranks_after_the_same_step(name: str) -> None:
    options: dict[str, Any] = {"max_epochs": 3, "callbacks": lambda: [STOPS[name]()]}
    plain: Seen = fit_alone(Chain, noise_loader, **options)
    assert [len(each.losses) for each in fit_in_pipeline(2, Chain, noise_loader, **options)] == 2 * [len(plain.losses)]
