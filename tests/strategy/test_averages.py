"""Lightning's averages of weights: each stage averages its own, and what is saved is the whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

from lightning_cpipe import ContinuousPipeStrategy
from lightning_cpipe.equality import same_bits
from lightning_cpipe.stage.absent import AbsentParameter
from lightning_cpipe.tree import flatten
from tests.helpers.causes import cause
from tests.helpers.fits import (
    Seen,
    alone,
    fit_alone,
    fit_in_pipeline,
    fit_on_rank,
    quiet_trainer,
    require_same_bits,
)
from tests.helpers.modules import WIDTH, Block, Chain, Codebook, Tied, noise_loader
from tests.helpers.ranks import run_ranks

loader = partial(noise_loader, samples=24)

FLUSHED = {"schedule": "gpipe"}
"""Trains as plain Lightning does, to the bit."""


class Buffered(Chain):
    """Has buffers that the step writes, on two stages."""

    def __init__(self) -> None:
        super().__init__()
        blocks = list(self.net)
        self.net = nn.Sequential(blocks[0], nn.BatchNorm1d(WIDTH), *blocks[1:], Codebook())


Scheduled = partial(Chain, schedule="epoch")
"""SWA puts a scheduler of its own in the place of this one."""


class Watching(EMAWeightAveraging):
    """Has a hook with outputs, which are on one rank; its others must run on all."""

    def on_validation_batch_end(self, *_: Any) -> None:
        pass


AVERAGING: dict[str, Callable[[], pl.Callback]] = {
    "EMA": partial(Watching, decay=0.8, update_every_n_steps=2),
    "mean": partial(WeightAveraging, use_buffers=False),
    "SWA": partial(StochasticWeightAveraging, 0.02, swa_epoch_start=1, annealing_epochs=2),
}


class Saves(pl.Callback):
    """Saves a checkpoint after the tenth step, in the middle of the second epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 10:
            trainer.save_checkpoint(self.path)


def options(averaging: str, path: Path, **more: Any) -> dict[str, Any]:
    callbacks = lambda: [AVERAGING[averaging](), Saves(path)]  # noqa: E731
    return {"callbacks": callbacks, "max_epochs": 3, "val_check_interval": 4, **more}


def saves_after_fit(path: Path, trainer: pl.Trainer, _: pl.LightningModule) -> None:
    trainer.save_checkpoint(path)


@pytest.mark.parametrize(
    ("averaging", "module", "p", "devices"),
    [
        ("EMA", Buffered, 3, 3),
        ("SWA", Chain, 2, 2),
        *(
            pytest.param(averaging, module, p, devices, marks=pytest.mark.full)
            for averaging, module, p, devices in [
                ("mean", Buffered, 3, 3),
                ("mean", Tied, 2, 1),
                ("EMA", Tied, 3, 3),
                ("EMA", Buffered, 4, 2),
                ("SWA", Tied, 3, 1),
                ("SWA", Tied, 4, 2),
            ]
        ),
    ],
)
def test_it_averages_as_plain_lightning_does(
    averaging: str, module: Callable[[], pl.LightningModule], p: int, devices: int, tmp_path: Path
) -> None:
    """Weights, metrics of validations with averaged weights, and checkpoints, during the fit and after it."""
    plain_path, path, plain_after, after = (tmp_path / name for name in ("plain", "piped", "plain_after", "after"))
    plain = fit_alone(
        module, loader, loader, **options(averaging, plain_path, look=partial(saves_after_fit, plain_after))
    )
    seen = fit_in_pipeline(
        p,
        module,
        loader,
        loader,
        devices=devices,
        strategy=FLUSHED,
        **options(averaging, path, look=partial(saves_after_fit, after)),
    )
    assert seen[0].losses == plain.losses
    assert seen[0].metrics == plain.metrics
    require_same_bits(seen[0].weights, plain.weights)
    require_same_content(path, plain_path)
    require_same_content(after, plain_after)


def require_same_content(path: Path, plain_path: Path) -> None:
    """All that plain Lightning would have written, too; what its loops count aside."""
    ours, lightnings = (torch.load(each, weights_only=True) for each in (path, plain_path))
    assert list(ours) == list(lightnings)
    for key in ours.keys() - {"loops"}:
        (leaves, _), (lightnings_leaves, _) = flatten(ours[key]), flatten(lightnings[key])
        assert same_bits(leaves, lightnings_leaves), key


@pytest.mark.parametrize("averaging", ["EMA", pytest.param("SWA", marks=pytest.mark.full)])
def test_a_run_is_resumed_with_its_average_on_either_side(averaging: str, tmp_path: Path) -> None:
    """A checkpoint of plain Lightning in a pipeline, and the other way round."""
    plain, piped = tmp_path / "plain", tmp_path / "piped"
    fit_alone(Scheduled, loader, loader, **options(averaging, plain))
    fit_in_pipeline(2, Scheduled, loader, loader, strategy=FLUSHED, **options(averaging, piped))
    again = options(averaging, tmp_path / "again")
    expected = fit_alone(Scheduled, loader, loader, **again, ckpt_path=plain)
    assert len(expected.losses) == 14
    for seen in (
        fit_in_pipeline(2, Scheduled, loader, loader, strategy=FLUSHED, **again, ckpt_path=plain)[0],
        fit_alone(Scheduled, loader, loader, **again, ckpt_path=piped),
    ):
        assert seen.losses == expected.losses
        assert seen.metrics == expected.metrics
        require_same_bits(seen.weights, expected.weights)


class Notes(pl.Callback):
    """The weights of this rank's stages after each update."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.weights.append({name: each.detach().clone() for name, each in pl_module.named_parameters()})


def test_each_stage_averages_its_own_weights_at_its_own_step() -> None:
    """With delay: the average is of the versions that each stage had, one after each of its updates."""
    notes: list[Notes] = []

    def callbacks() -> list[pl.Callback]:
        notes.append(Notes())
        return [EMAWeightAveraging(decay=0.8), notes[-1]]

    seen = fit_in_pipeline(
        3, Chain, loader, loader, max_epochs=2, callbacks=callbacks, look=lambda *_: notes[-1].weights
    )
    expected: dict[str, Tensor] = {}
    for rank in seen:
        assert len(rank.found) == len(rank.losses) == 16
        average = rank.found[0]
        for weights in rank.found[1:]:
            average = {name: torch.lerp(each, weights[name], 1 - 0.8) for name, each in average.items()}
        assert average.keys().isdisjoint(expected)
        expected |= average
    assert set(expected) == set(seen[0].weights)
    for name, each in expected.items():
        torch.testing.assert_close(seen[0].weights[name], each, rtol=1e-6, atol=1e-7)


@pytest.mark.full
@pytest.mark.parametrize("averaging", ["EMA", "mean", "SWA"])
def test_pipelines_side_by_side_average_as_ddp_does(averaging: str, tmp_path: Path) -> None:
    """Also from a file of DDP."""
    plain_path, path = tmp_path / "plain", tmp_path / "piped"

    def in_ddp(path: Path, **more: Any) -> Seen:
        return run_ranks(
            lambda _: fit_on_rank(
                Scheduled, larger, larger, strategy="ddp", devices=2, **options(averaging, path, **more)
            ),
            2,
        )[0]

    def in_pipelines(path: Path, **more: Any) -> Seen:
        beside = {**FLUSHED, "data_parallel_size": 2}
        return fit_in_pipeline(
            2, Scheduled, larger, larger, devices=4, strategy=beside, **options(averaging, path, **more)
        )[0]

    larger = partial(noise_loader, samples=48)
    again = tmp_path / "again"
    for plain, seen in (
        (in_ddp(plain_path), in_pipelines(path)),
        (in_ddp(again, ckpt_path=plain_path), in_pipelines(again, ckpt_path=plain_path)),
    ):
        assert seen.losses == plain.losses
        assert seen.metrics == plain.metrics
        require_same_bits(seen.weights, plain.weights)


def test_other_stages_weights_take_no_memory_in_the_average() -> None:
    ema = [EMAWeightAveraging()]

    def absent(trainer: pl.Trainer, _: pl.LightningModule) -> list[str]:
        model = ema[0]._average_model
        assert model is not None
        return [name for name, each in model.module.named_parameters() if isinstance(each, AbsentParameter)]

    first, second = fit_in_pipeline(2, Chain, loader, max_epochs=1, callbacks=lambda: list(ema), look=absent)
    # After the fit it is whole on rank 0.
    assert first.found == []
    assert len(second.found) == len(first.weights) // 2


class Late(Chain):
    """Makes its layers in `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        del self.net

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = nn.Sequential(*(Block() for _ in range(4)))


@pytest.mark.full
def test_layers_that_are_made_later_are_averaged_or_refused() -> None:
    options: dict[str, Any] = {"max_epochs": 2, "callbacks": lambda: [AVERAGING["EMA"]()]}
    plain = fit_alone(Late, loader, loader, **options)
    seen = fit_in_pipeline(2, Late, loader, loader, strategy=FLUSHED, **options)
    assert seen[0].metrics == plain.metrics
    require_same_bits(seen[0].weights, plain.weights)
    said = cause(2, Late(), callbacks=[AVERAGING["SWA"]()])
    assert "StochasticWeightAveraging copied the module before it had 'net.0.linear.bias' and 15 more" in said


def one_after_another(**options: Any) -> list[Any]:
    trainer = quiet_trainer(callbacks=[AVERAGING["EMA"]()], max_epochs=1, **options)
    module = Buffered()
    found: list[Any] = []
    for epochs in (1, 2):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(module, loader(), loader(seed=6))
        found += trainer.validate(module, loader(seed=6), verbose=False)
    trainer.save_checkpoint("after.ckpt")
    found.append(torch.load("after.ckpt", weights_only=True)["state_dict"] if trainer.is_global_zero else {})
    return found


@pytest.mark.full
def test_runs_may_follow_one_after_another() -> None:
    """The copy is of one stage in the first, and is there in the second."""
    plain = alone(one_after_another)
    first, _ = run_ranks(lambda _: one_after_another(strategy=ContinuousPipeStrategy(schedule="gpipe"), devices=2), 2)
    assert first[:2] == plain[:2]
    require_same_bits(first[2], plain[2])
