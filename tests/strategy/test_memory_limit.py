"""A fit cuts within the memory limit that it was given, or says what would be needed; and it says where it cuts."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_cpipe.balance.memory import MemoryNeeds
from lightning_cpipe.errors import CutError
from lightning_cpipe.schedules.continuous import Continuous
from lightning_cpipe.strategy.setup.cutting import memory_needs
from lightning_cpipe.strategy.setup.probing import choose_starts, find_cut
from tests.helpers.fits import fit_in_pipeline, quiet_trainer
from tests.helpers.modules import Chain, noise_loader
from tests.helpers.probing import CPU, step_of

DEPTH = 6


def step_of_chain(module: Chain) -> Any:
    return step_of(module, next(iter(noise_loader())), run=lambda root, batch: root.loss(batch))


class NotesCut(pl.Callback):
    starts: tuple[str, ...] = ()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.starts = trainer.strategy.stage_run.cut.starts


def starts_seen(trainer: pl.Trainer, module: pl.LightningModule) -> tuple[str, ...]:
    return next(each.starts for each in trainer.callbacks if isinstance(each, NotesCut))


def test_a_limit_moves_the_cut_of_a_fit() -> None:
    module = Chain(DEPTH)
    # The module's optimizer is SGD with momentum.
    needs = MemoryNeeds(Continuous(), 2, 1.0)
    costs = choose_starts(module, step_of_chain(module), 2, "auto", CPU, needs).costs
    assert needs.balanced_starts(costs) == [3]
    limit = needs.of_all(costs, [3])[0].total - 1
    seen = fit_in_pipeline(
        2,
        lambda: Chain(DEPTH),
        noise_loader,
        strategy={"memory_limit": limit},
        callbacks=lambda: [NotesCut()],
        look=starts_seen,
        max_steps=3,
    )
    assert [each.found for each in seen] == [("net.2",)] * 2
    assert len(seen[0].losses) == 3


@pytest.mark.parametrize(
    ("optimizer", "accumulate", "multiple", "length"),
    [("sgd", 1, 1.0, None), ("plain_sgd", 4, 0.0, None), ("adamw", 3, 2.0, 8)],
)
def test_needs_follow_from_the_optimizer_and_the_accumulation(
    optimizer: str, accumulate: int, multiple: float, length: int | None
) -> None:
    """An epoch has 8 mini-batches."""
    module = Chain(2, optimizer=optimizer)
    trainer = quiet_trainer(max_epochs=1, accumulate_grad_batches=accumulate)
    trainer.strategy.connect(module)
    module.trainer = trainer
    trainer.fit_loop._data_source.instance = noise_loader()
    trainer.fit_loop.setup_data()
    needs = memory_needs(trainer, Continuous(extra_in_flight=1), 3, 100)
    assert needs == MemoryNeeds(Continuous(1, accumulate, length), 3, multiple, 100)


def test_where_it_cuts_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    module = Chain(DEPTH)
    with caplog.at_level(logging.INFO):
        find_cut(module, [step_of_chain(module)], 3, "auto", CPU, "fills")
    (said,) = [record.message for record in caplog.records if "split_points" in record.message]
    assert said.startswith("3 stages, balanced by ")
    assert "`split_points=['net.2', 'net.4']` would cut in the same places" in said
    caplog.clear()
    with caplog.at_level(logging.INFO):
        find_cut(module, [step_of_chain(module)], 3, ["net.1", "net.2"], CPU, "fills")
    assert not [record for record in caplog.records if "split_points" in record.message]


def test_the_users_split_points_need_no_costs_but_are_held_against_a_limit() -> None:
    module = Chain(DEPTH)
    step = step_of_chain(module)
    assert choose_starts(module, step, 2, ["net.1"], CPU).costs is None
    with pytest.raises(CutError, match=r"the cut that `split_points` asks for \(net\.1\) needs"):
        choose_starts(module, step, 2, ["net.1"], CPU, MemoryNeeds(Continuous(), 2, 1.0, limit=1))


def test_a_limit_is_for_what_trains() -> None:
    module = Chain(DEPTH)
    step = step_of(module, (torch.ones(3, 8),), run=lambda root, batch: root(*batch), name="predict_step")
    assert choose_starts(module, step, 2, "auto", CPU, MemoryNeeds(Continuous(), 2, 1.0, limit=1)).starts == ("net.3",)


def test_a_stage_may_begin_inside_a_block() -> None:
    module = Chain(DEPTH)
    step = step_of_chain(module)
    choice = choose_starts(module, step, 2, ["net.2.linear"], CPU, measured=True)
    assert choice.starts == ("net.2.linear",)
    assert choice.costs is not None
    assert [block.name for block in choice.costs.blocks][2:5] == ["net.2", "net.2.linear", "net.3"]
