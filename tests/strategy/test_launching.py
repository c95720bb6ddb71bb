"""By name, as in a notebook: the ranks are forked or spawned, and the trained module comes back to the caller."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry

import lightning_cpipe
from lightning_cpipe import ContinuousPipeStrategy
from tests.helpers.fits import fit_in_pipeline, fit_on_rank, quiet_trainer, require_same_bits
from tests.helpers.modules import Chain, noise_loader
from tests.helpers.ranks import run_ranks

NAMES = {
    "continuous_pipe": "popen",
    "continuous_pipe_spawn": "spawn",
    "continuous_pipe_fork": "fork",
    "continuous_pipe_notebook": "fork",
}


@pytest.mark.parametrize("name", NAMES)
def test_the_import_registers_the_names(name: str) -> None:
    with mock.patch.dict(StrategyRegistry):
        StrategyRegistry.remove(name)
        importlib.reload(lightning_cpipe)
        assert name in StrategyRegistry.available_strategies()
        lightning_cpipe.register()
    strategy = pl.Trainer(strategy=name, accelerator="cpu", devices=2, logger=False).strategy
    assert isinstance(strategy, ContinuousPipeStrategy)
    assert strategy.num_stages == 2
    assert strategy.launcher._start_method == NAMES[name] if NAMES[name] != "popen" else not strategy.launcher.procs


def test_the_name_is_as_good_as_the_object() -> None:
    named = run_ranks(
        lambda _: fit_on_rank(Chain, noise_loader, None, strategy="continuous_pipe", devices=2, max_epochs=1), 2
    )
    made = fit_in_pipeline(2, Chain, noise_loader, max_epochs=1)
    assert [of_rank.losses for of_rank in named] == [of_rank.losses for of_rank in made]
    require_same_bits(named[0].weights, made[0].weights)


def fit(name: str) -> tuple[pl.Trainer, Chain]:
    pl.seed_everything(7, verbose=False)
    trainer = quiet_trainer(strategy=name, devices=2, max_epochs=2)
    module = Chain()
    trainer.fit(module, noise_loader(), noise_loader())
    return trainer, module


def require_what_a_pipeline_gives(trainer: pl.Trainer, module: Chain) -> None:
    expected = fit_in_pipeline(2, Chain, noise_loader, noise_loader, max_epochs=2)[0]
    require_same_bits(dict(module.named_parameters()), expected.weights)
    assert {name: float(value) for name, value in trainer.callback_metrics.items()} == expected.metrics
    assert trainer.state.finished


@pytest.fixture
def environment_as_before() -> Iterator[None]:
    """Lightning leaves the seed and the port there, for processes that are started later."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("environment_as_before")
@pytest.mark.parametrize(
    "name", ["continuous_pipe_fork", pytest.param("continuous_pipe_notebook", marks=pytest.mark.full)]
)
def test_forked_ranks_bring_the_module_back(name: str) -> None:
    trainer, module = fit(name)
    require_what_a_pipeline_gives(trainer, module)
    x = next(iter(noise_loader()))[0]
    assert torch.isfinite(module(x)).all()
    found = trainer.validate(module, noise_loader(), verbose=False)
    assert found[0]["val_loss"] == pytest.approx(float(trainer.callback_metrics["val_loss"]))


@pytest.mark.usefixtures("environment_as_before")
@pytest.mark.timeout(180)
def test_spawned_ranks_bring_the_module_back() -> None:
    require_what_a_pipeline_gives(*fit("continuous_pipe_spawn"))
