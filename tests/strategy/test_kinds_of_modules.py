"""Modules of many kinds train in a pipeline as they do in plain Lightning, to the bit, loops and all."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from tests.helpers.fits import Notes, Seen, fit_alone, fit_in_pipeline, require_plain_results, require_same_bits
from tests.helpers.modules import WIDTH, Block, Chain, Codebook, Scale, noise_loader

EVEN = partial(noise_loader, samples=21)


def state_of(trainer: Any, module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()} if trainer.is_global_zero else {}


class Statistics(Chain):
    """Buffers that are written in a forward: of norms with and without weights, and of a codebook."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH, affine=i < 2)) for i in range(4)]
        self.net = nn.Sequential(*layers[:2], Codebook(), *layers[2:])


def test_statistics_are_those_of_plain_lightning_in_training_and_in_evaluation() -> None:
    seen = require_plain_results(3, Statistics, EVEN, val=EVEN, look=state_of)
    plain = fit_alone(Statistics, EVEN, EVEN, max_epochs=1, accumulate_grad_batches=1000, look=state_of)
    require_same_bits(seen.found, plain.found)
    assert int(seen.found["net.4.1.num_batches_tracked"]) == 7


@pytest.mark.full
def test_an_evaluation_in_mid_stream_leaves_the_statistics_alone() -> None:
    fit = partial(fit_in_pipeline, 3, Statistics, EVEN, max_epochs=1, look=state_of)
    without, validated = fit()[0], fit(EVEN, val_check_interval=2)[0]
    require_same_bits(without.found, validated.found)
    assert "val_loss" in validated.metrics


class LogsEarly(Chain):
    """Logs what its first block makes, and tells it to the logger by hand."""

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        early = self.net[0](x)
        self.log("early", early.mean(), on_epoch=True)
        self.log_dict({"most": early.abs().max(), "first": float(early[0, 0])}, on_epoch=True)
        self.logger.log_metrics({"by_hand": float(early.std())}, step=0)
        return F.mse_loss(self.net[1:](early), y)


def test_what_is_logged_of_an_early_stage_is_right() -> None:
    def told(trainer: Any, module: Any) -> Any:
        return trainer.logger.of("by_hand") if trainer.is_global_zero else None

    options = {"max_epochs": 1, "accumulate_grad_batches": 1000, "logger": Notes(), "look": told}
    seen, plain = fit_in_pipeline(3, LogsEarly, EVEN, EVEN, **options)[0], fit_alone(LogsEarly, EVEN, EVEN, **options)
    assert seen.metrics == plain.metrics
    assert seen.found == plain.found
    assert len({row["by_hand"] for _, row in seen.found}) > 7


class CheckpointedBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class Denoises(Chain):
    """Noise and times are drawn in the step, dropout in blocks that are run again in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(CheckpointedBlock(0.3) for _ in range(4)))
        self.time = nn.Embedding(10, WIDTH)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, _ = batch
        times, noise = torch.randint(0, 10, (len(x),)), torch.randn_like(x)
        strength = times[:, None] / 10
        return F.mse_loss(self.net((1 - strength) * x + strength * noise + self.time(times)), noise)


def test_noise_and_repeated_dropout_do_not_depend_on_the_stages() -> None:
    def fit(p: int) -> Seen:
        return fit_in_pipeline(p, Denoises, EVEN, max_epochs=1, accumulate_grad_batches=1000)[0]

    one, three = fit(1), fit(3)
    assert one.losses == three.losses
    require_same_bits(one.weights, three.weights)


class Compiled(Chain):
    """Blocks that are compiled in `configure_model`, in place and wrapped, by backends that need no compiler."""

    def configure_model(self) -> None:
        if isinstance(self.net[1], Block):
            self.net[0].compile(backend="eager")
            self.net[1] = torch.compile(self.net[1], backend="eager")
            self.net[2].compile(backend="aot_eager")
            self.net[3] = torch.compile(self.net[3], backend="aot_eager")


@pytest.mark.full
def test_compiled_blocks_train_as_they_do_in_plain_lightning() -> None:
    # Whole batches: a graph for each shape takes its time.
    require_plain_results(2, Compiled, partial(noise_loader, samples=6), val=partial(noise_loader, samples=3))


class Loads(Chain):
    """Weights come from a file, those of the first blocks in `__init__`; the last are made and loaded in `setup`."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        self.net = self.net[:2]
        self.net.load_state_dict(torch.load(file)["first"])

    def setup(self, stage: str) -> None:
        if len(self.net) == 2:
            last = nn.Sequential(Block(), Block())
            last.load_state_dict(torch.load(self.file)["last"])
            self.net.extend(last)


def test_weights_that_are_loaded_while_the_module_is_made_are_trained(tmp_path: Path) -> None:
    torch.manual_seed(3)
    parts = {name: nn.Sequential(Block(), Block()).state_dict() for name in ("first", "last")}
    torch.save(parts, tmp_path / "weights.pt")
    require_plain_results(3, partial(Loads, tmp_path / "weights.pt"), EVEN)


class LittleToTrain(Chain):
    """A frozen stage, a stage with a buffer alone, one that is left out of the gradient, and one that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(1, Scale())
        self.net[0].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.net[1](self.net[0](x))
        with torch.no_grad():
            x = self.net[2](x)
        return self.net[3:](x)


@pytest.mark.parametrize("points", [["net.1", "net.2", "net.3"], ["net.3"]], ids=["four stages", "two stages"])
def test_stages_without_anything_to_train(points: list[str]) -> None:
    options: dict[str, Any] = {"max_epochs": 1, "accumulate_grad_batches": 1000}
    plain = fit_alone(LittleToTrain, EVEN, EVEN, **options)
    split = {"split_points": points}
    seen = fit_in_pipeline(len(points) + 1, LittleToTrain, EVEN, EVEN, strategy=split, **options)[0]
    assert seen.losses == plain.losses
    assert seen.metrics == plain.metrics
    require_same_bits(seen.weights, plain.weights)
