"""After a run the module is the user's own again: whole, on the CPU, with all its methods and parameters."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_cpipe.errors import RankLostError
from lightning_cpipe.strategy.run_at_hand import RunAtHand
from tests.helpers.fits import alone, fit_alone, fit_in_pipeline, in_pipeline, quiet_trainer, require_plain_results
from tests.helpers.modules import WIDTH, Chain, noise_loader


class WithBuffers(Chain):
    """Has BatchNorm's buffers, and an attribute that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.net:
            block.norm = nn.BatchNorm1d(WIDTH)
        self.name = "mine"


def use(trainer: pl.Trainer, module: WithBuffers) -> dict[str, Any]:
    found: dict[str, Any] = {
        "attributes": sorted(vars(module)),
        "hooks": [len(each._forward_hooks) + len(each._forward_pre_hooks) for each in module.modules()],
        "callbacks": [type(each).__name__ for each in trainer.callbacks],
        "training": module.training,
        "name": module.name,
        "trainer": module.trainer is trainer,
        "requires_grad": {p.requires_grad for p in module.parameters()},
        "types": {type(p) for p in module.parameters()},
    }
    x = next(iter(noise_loader()))[0]
    found["output"] = module.eval()(x)
    found["state"] = {name: value.clone() for name, value in module.state_dict().items()}
    return found


@pytest.mark.parametrize("p", [1, 2, 3])
def test_the_module_is_the_users_own_again(p: int) -> None:
    options = {
        "module": WithBuffers, "train": partial(noise_loader, samples=21), "val": noise_loader, "look": use,
        "max_epochs": 1, "accumulate_grad_batches": 100,
    }  # fmt: skip
    plain = fit_alone(**options).found
    assert plain["types"] == {nn.Parameter}
    for seen in fit_in_pipeline(p, **options):
        found = seen.found
        for name in ("attributes", "hooks", "callbacks", "training", "name", "trainer", "requires_grad", "types"):
            assert found[name] == plain[name]
        # Scripts go on alike on all ranks: with weights of other stages absent, `torch.save` spoilt the file of rank 0.
        assert torch.equal(found["output"], plain["output"])
        assert found["state"].keys() == plain["state"].keys()
        for name, value in found["state"].items():
            assert torch.equal(value, plain["state"][name]), name


class Collects(Chain):
    """Has buffers that only the last stage makes, or makes larger."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("lazy", None)
        self.register_buffer("bank", torch.zeros(0))

    def on_validation_batch_end(self, *_: Any) -> None:
        """Runs where the outputs are."""
        self.lazy = torch.ones(3)
        self.bank = torch.cat([self.bank, torch.ones(1)])


def fit_twice(**options: Any) -> dict[str, Tensor]:
    module = Collects()
    trainer = quiet_trainer(max_epochs=1, **options)
    trainer.fit(module, noise_loader(), noise_loader())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, noise_loader(), noise_loader())
    return module.state_dict()


def test_buffers_that_one_rank_made_are_on_all_afterwards() -> None:
    """Ranks went over other lists of buffers, and one waited for ever for what no other had."""
    first, other = in_pipeline(2, fit_twice)
    assert first["bank"].numel() > 2
    assert first.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in first.items())


class MadeLate(Chain):
    """Makes its blocks in `configure_model`, as a module does that is too big to be made in `__init__`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = Chain().net


@pytest.mark.parametrize("p", [1, 3])
def test_configure_model_makes_the_blocks(p: int) -> None:
    require_plain_results(p, MadeLate, noise_loader)


def other_start_everywhere(**options: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Every rank makes other weights; those of rank 0 count."""
    module = Chain()
    trainer = quiet_trainer(max_epochs=1, accumulate_grad_batches=100, **options)
    if trainer.global_rank != 0:
        nn.init.zeros_(module.net[0].linear.weight)
        nn.init.zeros_(module.net[3].linear.weight)
    trainer.fit(module, noise_loader())
    weights = dict(module.state_dict()) if trainer.is_global_zero else {}
    return [float(trainer.callback_metrics["loss_epoch"])], weights


def test_the_weights_of_rank_0_count() -> None:
    plain = alone(other_start_everywhere)
    first, *others = in_pipeline(3, other_start_everywhere)
    assert first[0] == plain[0]
    assert all(torch.equal(value, plain[1][name]) for name, value in first[1].items())
    assert all(losses == plain[0] for losses, _ in others)


def test_what_was_undone_before_the_end_failed_is_not_undone_again() -> None:
    """Lightning tears down once more then, and a second error would hide the first."""
    undone: list[str] = []
    whole = mock.Mock(put_together=mock.Mock(side_effect=RankLostError("rank 1 is lost", 1)))
    undo = [lambda: undone.append("first"), lambda: undone.append("second")]
    run = RunAtHand(mock.Mock(), mock.Mock(), mock.Mock(), whole, mock.Mock(), mock.Mock(), undo)
    with pytest.raises(RankLostError):
        run.end()
    run.break_off()
    assert undone == ["second", "first"]
