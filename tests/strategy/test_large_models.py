"""A module that is made in `configure_model` and too big to be compared uncut is never whole on any rank."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_cpipe import ContinuousPipeStrategy
from lightning_cpipe.stage.absent import AbsentParameter
from tests.helpers.fits import Seen, fit_alone, fit_in_pipeline, quiet_trainer, require_same_bits
from tests.helpers.modules import Block, Chain, noise_loader
from tests.helpers.ranks import run_ranks

FILLS = {"check": "fills"}
"""Without the comparison with the uncut module, no module is too small to stay in parts."""


class MadeLate(Chain):
    """Makes its blocks in `configure_model`, and some of them with an initialiser of its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(depth=1, **options)
        self.net = None
        self.made: list[str] = []

    def configure_model(self) -> None:
        if self.net is not None:
            return
        self.net = nn.Sequential(*(Block() for _ in range(5)))
        for block in self.net[2:]:
            nn.init.trunc_normal_(block.linear.weight, std=0.3, a=-0.3, b=0.3)
            nn.init.normal_(block.norm.weight, 1, 0.1)
        self.register_buffer("noise_in_the_data", torch.randn(8))
        self.made.append("net")

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return super().loss((batch[0] + self.noise_in_the_data, batch[1]))

    def on_fit_end(self) -> None:
        assert self.made == ["net"]


def joined(ranks: Sequence[Seen]) -> dict[str, Tensor]:
    """The parts of all ranks; each weight is on one."""
    parts = [seen.weights for seen in ranks]
    whole = {name: tensor for part in parts for name, tensor in part.items()}
    assert sum(map(len, parts)) == len(whole)
    assert all(parts)
    return whole


@pytest.mark.parametrize("p", [2, 3])
def test_a_module_in_parts_trains_as_a_plain_one(p: int) -> None:
    loader = partial(noise_loader, shuffle=True)
    options: Any = {"max_epochs": 1, "accumulate_grad_batches": 1000}
    seen = fit_in_pipeline(p, MadeLate, loader, noise_loader, strategy=FILLS, **options)
    plain = fit_alone(MadeLate, loader, noise_loader, **options)
    assert seen[0].losses == plain.losses
    assert seen[0].metrics == plain.metrics
    require_same_bits(joined(seen), plain.weights)


def test_a_small_module_is_compared_uncut_and_whole_again() -> None:
    options: Any = {"max_epochs": 1, "accumulate_grad_batches": 1000}
    seen = fit_in_pipeline(2, MadeLate, noise_loader, **options)
    plain = fit_alone(MadeLate, noise_loader, **options)
    assert seen[0].losses == plain.losses
    require_same_bits(seen[0].weights, plain.weights)


class MadeFromOthers(MadeLate):
    """The last block begins as a copy of the first one's weights, long after that was made."""

    def configure_model(self) -> None:
        super().configure_model()
        self.net[4].linear.weight.data.copy_(self.net[0].linear.weight)


def test_a_module_that_cannot_be_built_in_parts_is_built_as_a_whole() -> None:
    options: Any = {"max_epochs": 1, "accumulate_grad_batches": 1000}
    seen = fit_in_pipeline(2, MadeFromOthers, noise_loader, strategy=FILLS, **options)
    plain = fit_alone(MadeFromOthers, noise_loader, **options)
    assert seen[0].losses == plain.losses
    require_same_bits(seen[0].weights, plain.weights)


def one_after_the_other(cuts: Sequence[list[str]], **options: Any) -> dict[str, Any]:
    """Fits, tests, fits once more and validates, each with a Trainer of its own."""
    pl.seed_everything(7, verbose=False)
    module = MadeLate()
    found: dict[str, Any] = {}
    for number, run in enumerate(("fit", "test", "fit", "validate")):
        if cuts:
            options["strategy"] = ContinuousPipeStrategy(check="fills", split_points=cuts[number])
        trainer = quiet_trainer(max_epochs=1, accumulate_grad_batches=1000, **options)
        getattr(trainer, run)(module, noise_loader(seed=number))
        found[f"{number} {run}"] = {name: float(value) for name, value in trainer.callback_metrics.items()}
    own = {n: p.detach().clone() for n, p in module.named_parameters() if not isinstance(p, AbsentParameter)}
    return {"metrics": found, "weights": own}


def test_runs_follow_one_another_while_the_module_stays_in_parts() -> None:
    """Each is cut elsewhere, so that weights move between ranks."""
    cuts = [["net.2", "net.3"], ["net.1", "net.4"], ["net.1", "net.2"], ["net.3", "net.4"]]
    ranks = run_ranks(lambda _: one_after_the_other(cuts, devices=3), 3)
    (plain,) = run_ranks(lambda _: one_after_the_other([], strategy="auto", devices=1), 1)
    assert ranks[0]["metrics"] == plain["metrics"]
    assert [sorted({name.split(".")[1] for name in each["weights"]}) for each in ranks] == [
        ["4"],
        ["3"],
        ["0", "1", "2"],
    ]
    require_same_bits({name: t for each in ranks for name, t in each["weights"].items()}, plain["weights"])
