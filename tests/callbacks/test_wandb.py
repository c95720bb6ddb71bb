"""W&B, offline: what its `.wandb` file holds after a run, as W&B's own reader reads it back."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import matplotlib.image
import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch import Tensor

from lightning_cpipe import ContinuousPipeStrategy, IdleMonitor, ThroughputMonitor
from tests.helpers.fits import quiet_trainer
from tests.helpers.modules import Chain, noise_loader
from tests.helpers.ranks import run_ranks

P = 2
EVERY = 4
STEPS = 16
SPEAKS_AT = 2
NO_NETWORK = {
    "WANDB_MODE": "offline",
    # Nobody listens there: whoever tries finds out at once.
    "WANDB_BASE_URL": "http://127.0.0.1:9",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
}


class Speaking(Chain):
    """Has hyperparameters, and gives its logger more than numbers to log."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.global_step == SPEAKS_AT:
            self.logger.log_table("own/table", columns=["loss"], data=[[float(loss)]])
            self.logger.log_image("own/picture", [np.zeros((2, 3, 3), np.uint8)])
        return loss


def fit(_: int) -> dict[str, Any]:
    """Two epochs with all three loggers and both monitors."""
    import wandb

    os.environ.update(NO_NETWORK)
    # Sockets and what is to be uploaded lie there, not in the user's home.
    for kind in ("DATA", "CACHE", "CONFIG", "ARTIFACT"):
        os.environ[f"WANDB_{kind}_DIR"] = str(Path.cwd() / "of_wandb")
    pl.seed_everything(7, verbose=False)
    settings = wandb.Settings(console="off", disable_git=True, save_code=False, x_disable_stats=True)
    monitor = IdleMonitor(EVERY)
    trainer = quiet_trainer(
        strategy=ContinuousPipeStrategy(),
        devices=P,
        max_epochs=2,
        log_every_n_steps=1,
        logger=[
            # Offline by its environment variable: by this option, Lightning would not log models.
            WandbLogger(project="pipes", offline=False, log_model=True, settings=settings),
            CSVLogger("csv"),
            TensorBoardLogger("tb"),
        ],
        callbacks=[monitor, ThroughputMonitor(3, EVERY)],
        enable_checkpointing=True,
    )
    trainer.fit(Speaking(), noise_loader(), noise_loader())
    width = None
    if trainer.is_global_zero:
        width = trainer.logger.experiment.config["width"]
        trainer.logger.experiment.finish()
    return {"width": width, "path": monitor.path, "losses": float(trainer.callback_metrics["loss_epoch"])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run was; what rank 0 found is in `found.json`."""
    folder = tmp_path_factory.mktemp("wandb")
    before = Path.cwd()
    os.chdir(folder)
    try:
        found = run_ranks(fit, P)
    finally:
        os.chdir(before)
    (folder / "found.json").write_text(json.dumps(found))
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """W&B's folder of the run."""
    runs = list((folder / "wandb").glob("offline-run-*"))
    # Only rank 0 began one.
    assert len(runs) == 1
    return runs[0]


@pytest.fixture(scope="module")
def records(run: Path) -> list[dict[str, Any]]:
    """What stands in the `.wandb` file."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    environment = {**os.environ, **NO_NETWORK}
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout
    return [json.loads(line) for line in printed.splitlines()]


def of_type(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in records if record["type"] == kind]


@pytest.fixture(scope="module")
def history(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that were logged."""
    return [row["item"] for row in of_type(records, "history")]


def of_stages(*names: str) -> set[str]:
    return {f"stage{stage}/{name}" for stage in range(P) for name in names}


NUMBERS = of_stages(
    "forward_ms", "backward_ms", "update_ms", "wait_activation_ms", "wait_gradient_ms", "wait_decision_ms",
    "data_ms", "other_ms",
    "idle_ratio", "idle_ratio_steady", "idle_ratio_run", "delay_updates", "delay_promised_updates",
) | {
    "pipe/idle_ratio", "pipe/idle_ratio_steady", "pipe/idle_ratio_run", "pipe/idle_ratio_predicted",
    "pipe/evaluation_s", "pipe/evaluation_idle_slots", "pipe/evaluation_idle_slots_predicted",
}  # fmt: skip

RATES = {"throughput/batches_per_s", "throughput/samples_per_s", "throughput/flops_per_s"}


def test_every_number_is_in_the_history_at_its_steps(history: list[dict[str, Any]]) -> None:
    rows = [row for row in history if "pipe/idle_ratio" in row]
    assert [row["trainer/global_step"] for row in rows] == [*range(EVERY, STEPS + 1, EVERY), STEPS]
    assert all(row.keys() >= NUMBERS for row in rows)
    assert all(math.isfinite(row[name]) for row in rows for name in NUMBERS)
    rates = [row for row in history if RATES & row.keys()]
    assert [row["trainer/global_step"] for row in rates] == list(range(EVERY, STEPS + 1, EVERY))
    assert all(row.keys() >= RATES for row in rates)
    assert all(row[name] > 0 for row in rates for name in RATES)


def test_lightnings_own_metrics_are_there_too(history: list[dict[str, Any]], folder: Path) -> None:
    steps = [row["trainer/global_step"] for row in history if "loss_step" in row]
    assert steps == list(range(STEPS))
    of_epochs = [row["loss_epoch"] for row in history if "loss_epoch" in row]
    assert of_epochs[-1] == json.loads((folder / "found.json").read_text())[0]["losses"]


def test_hyperparameters_and_models_are_logged(records: list[dict[str, Any]], folder: Path) -> None:
    assert json.loads((folder / "found.json").read_text())[0]["width"] == 8
    (model,) = [each for each in of_type(records, "artifact") if each["type"] == "model"]
    assert model["metadata"]


def test_pictures_and_tables_of_a_step_are_logged_once(history: list[dict[str, Any]], run: Path, folder: Path) -> None:
    table = json.loads(file_of(history, run, "own/table", "path").read_text())
    losses = {row["trainer/global_step"]: row["loss_step"] for row in history if "loss_step" in row}
    assert table["data"] == [[pytest.approx(losses[SPEAKS_AT])]]
    assert file_of(history, run, "own/picture", "filenames").exists()


def test_no_row_is_empty(history: list[dict[str, Any]]) -> None:
    own = ("_", "trainer/global_step")
    assert all(any(not name.startswith(own) for name in row) for row in history)


def test_every_number_is_plotted_over_the_trainer_s_steps(records: list[dict[str, Any]]) -> None:
    declared = {metric["name"]: metric for metric in of_type(records, "metric") if "name" in metric}
    assert declared.keys() > NUMBERS | RATES
    for name in NUMBERS | RATES:
        assert declared[name]["step_metric"] == "trainer/global_step", name
        kind = "mean" if name in RATES else "last"
        assert declared[name]["summary"] == {kind: True}, name


def test_the_name_of_each_number_ends_with_its_unit() -> None:
    units = ("_ms", "_s", "_updates", "_slots", "_slots_predicted")
    units += ("_ratio", "_ratio_steady", "_ratio_run", "_ratio_predicted")
    assert all(name.endswith(units) for name in NUMBERS | RATES)


def file_of(history: list[dict[str, Any]], run: Path, name: str, field: str) -> Path:
    values = [row[f"{name}.{field}"] for row in history if f"{name}.{field}" in row]
    assert len(values) == 1
    value = values[0][0] if isinstance(values[0], list) else values[0]
    return run / "files" / value


def test_the_timeline_is_a_table(history: list[dict[str, Any]], run: Path) -> None:
    table = json.loads(file_of(history, run, "pipe/timeline", "path").read_text())
    assert table["columns"] == ["stage", "kind", "mini_batch", "start_ms", "end_ms"]
    rows = table["data"]
    for stage in range(P):
        for kind in ("forward", "backward", "update"):
            assert [row[2] for row in rows if row[:2] == [stage, kind]] == list(range(STEPS))
    assert {row[1] for row in rows} >= {"wait_activation", "wait_gradient", "data", "evaluation"}
    assert all(0 <= start <= end for *_, start, end in rows)
    assert [row[3] for row in rows] == sorted(row[3] for row in rows)


def test_the_gantt_chart_is_a_picture(history: list[dict[str, Any]], run: Path, folder: Path) -> None:
    picture = file_of(history, run, "pipe/gantt", "filenames")
    found = json.loads((folder / "found.json").read_text())[0]["path"]
    assert picture.read_bytes() == (folder / found).read_bytes()
    pixels = matplotlib.image.imread(picture)
    size = next(row for row in history if "pipe/gantt.width" in row)
    assert pixels.shape[:2] == (size["pipe/gantt.height"], size["pipe/gantt.width"])


def test_files_are_announced_for_a_later_upload(records: list[dict[str, Any]]) -> None:
    announced = [file["path"] for files in of_type(records, "files") for file in files["files"]]
    assert any(path.startswith("media/table/pipe/timeline") for path in announced)
    assert any(path.startswith("media/images/pipe/gantt") for path in announced)
    assert of_type(records, "exit")[0]["exit_code"] == 0


def test_the_other_loggers_have_the_same_numbers(history: list[dict[str, Any]], folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with (folder / "csv" / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        of_csv = [row for row in csv.DictReader(file) if row["pipe/idle_ratio"]]
    events = EventAccumulator(str(folder / "tb" / "lightning_logs" / "version_0"))
    events.Reload()
    for name in NUMBERS:
        values = [row[name] for row in history if name in row]
        assert [float(row[name]) for row in of_csv] == values
        assert [event.value for event in events.Scalars(name)] == pytest.approx(values)
    assert [image.step for image in events.Images("pipe/gantt")] == [STEPS]
