"""A mini-batch for which `training_step` returns None gives no gradient on any stage, as in plain Lightning."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
from torch import Tensor

from tests.helpers.comparing import require_equal_to_reference
from tests.helpers.fits import fit_in_pipeline, require_same_bits
from tests.helpers.modules import Chain, Tied, make_optimizer, noise_loader
from tests.strategy.test_loss_scale import plugins


class Leaves(Chain):
    """Has no loss for some mini-batches: it sees so before or after it ran its blocks."""

    at_once = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        out = bool(batch[0].sum() > 2)
        if out and self.at_once:
            return None
        loss = super().training_step(batch, batch_idx)
        return None if out else loss


class LeavesAtOnce(Leaves):
    at_once = True


class TiedLeaves(Tied, Leaves):
    """And ties weights."""


@pytest.mark.parametrize(
    ("module", "p", "options"),
    [
        (Leaves, 3, {}),
        # A stage in between looked at the step before it ran it, and took it for one that never comes to the cut.
        (LeavesAtOnce, 4, {"accumulate": 3}),
        *(
            pytest.param(module, p, options, marks=pytest.mark.full)
            for module in (Leaves, LeavesAtOnce, TiedLeaves)
            for p in (2, 4)
            for options in ({"accumulate": 2}, {"early_input_gradient": True}, {"devices": 1}, {"versions": "latest"})
        ),
    ],
)
def test_equals_the_reference(module: Any, p: int, options: dict[str, Any]) -> None:
    seen = require_equal_to_reference(
        p,
        partial(module, optimizer="adamw"),
        noise_loader,
        make_optimizer("adamw", None),
        epochs=3,
        **options,
    )[0]
    assert (len(seen.losses), len(seen.batches)) == (18, 24)


class SpoilsGradients(Leaves):
    """Changes gradients in a hook around the backward."""

    def on_after_backward(self) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (Leaves, {"accumulate": 2}),
        *(
            pytest.param(module, options, marks=pytest.mark.full)
            for module in (Leaves, LeavesAtOnce, TiedLeaves)
            for options in ({}, {"early_input_gradient": True}, {"devices": 2})
        ),
    ],
)
def test_the_mean_over_pipelines_counts_it_as_a_gradient_of_zero(module: Any, options: dict[str, Any]) -> None:
    """Also where all of them leave theirs out."""
    ranks = require_equal_to_reference(
        2,
        partial(module, optimizer="adamw"),
        partial(noise_loader, samples=30, seed=11),
        make_optimizer("adamw", None),
        epochs=2,
        replicas=2,
        **options,
    )
    first, second = ([float(x.sum()) > 2 for x, _ in each.batches] for each in ranks[:: len(ranks) // 2])
    assert {*zip(first, second)} == {(False, False), (False, True), (True, False), (True, True)}
    for rank in ranks:
        require_same_bits(rank.weights, {name: ranks[0].weights[name] for name in rank.weights})


@pytest.mark.full
@pytest.mark.parametrize("options", [{}, {"plugins": True, "gradient_clip_val": 0.1}], ids=str)
def test_pipelines_stay_alike_where_one_leaves_out(options: dict[str, Any]) -> None:
    """Hooks around the backward see the mean in all of them, and a loss scale stays the same."""
    ranks = fit_in_pipeline(
        2,
        SpoilsGradients,
        partial(noise_loader, samples=30, seed=11),
        devices=4,
        strategy={"data_parallel_size": 2},
        max_epochs=2,
        look=scale_of,
        **{**options, **(plugins() if options else {})},
    )
    assert len(ranks[0].losses) != len(ranks[2].losses)
    for one, other in ((0, 2), (1, 3)):
        assert ranks[one].found == ranks[other].found
    own = {name: each for name, each in ranks[0].weights.items() if name in ranks[2].weights}
    require_same_bits(own, ranks[2].weights)


def scale_of(trainer: pl.Trainer, _: pl.LightningModule) -> float | None:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else scaler.get_scale()
