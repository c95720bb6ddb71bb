"""Clipping by norm in the continuous schedule, and the norm of all gradients: the oracle's bits."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest

from tests.helpers.comparing import require_equal_to_reference
from tests.helpers.modules import Chain, Tied, make_optimizer, noise_loader
from tests.helpers.reference import ByNorm

LARGEST = 0.1


class LogsNorm(Chain):
    """Logs the norm of all gradients."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log("norm", self.trainer.strategy.full_grad_norm())


class TiedLogsNorm(Tied, LogsNorm):
    """And ties weights."""


def require_exact(how: str, p: int, module: type[pl.LightningModule] = LogsNorm, **options: Any) -> None:
    """Three shuffled epochs of 8 mini-batches, most of whose gradients are clipped."""
    clip = ByNorm(how, LARGEST, late=1 + options.get("extra_in_flight", 0))
    ranks = require_equal_to_reference(
        p,
        partial(module, optimizer="adamw"),
        partial(noise_loader, samples=22, batch_size=3, shuffle=True),
        make_optimizer("adamw", None),
        epochs=3,
        clip=clip,
        **options,
    )
    assert all(seen.metrics["norm"] == float(clip.full(p - 1).float()) for seen in ranks)
    assert float(clip.full(p - 1)) > LARGEST


@pytest.mark.parametrize(
    ("how", "p", "options"),
    [
        ("suffix", 3, {"accumulate": 3, "early_input_gradient": True}),
        ("lagged", 4, {"devices": 2}),
        ("lagged", 3, {"module": TiedLogsNorm, "extra_in_flight": 2}),
        *(
            pytest.param(how, p, options, marks=pytest.mark.full)
            for how in ("stage", "suffix", "lagged")
            for p in (2, 4)
            for options in ({}, {"accumulate": 3}, {"module": TiedLogsNorm}, {"devices": 1}, {"extra_in_flight": 1})
        ),
    ],
)
def test_equals_the_reference(how: str, p: int, options: dict[str, Any]) -> None:
    require_exact(how, p, **options)
