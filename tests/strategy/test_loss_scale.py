"""`16-mixed` on the CPU: the last stage's scale travels, and overflows leave updates out, as the oracle says."""

from __future__ import annotations

import math
from functools import partial
from itertools import groupby
from typing import Any

import pytest
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.amp import GradScaler
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.comparing import require_equal_to_reference
from tests.helpers.fits import fit_alone, fit_in_pipeline, require_same_bits
from tests.helpers.modules import Block, Chain, make_optimizer, noise_loader
from tests.helpers.reference import ByNorm, Scaled

FIRST, INTERVAL = 2.0**21, 6


def plugins() -> dict[str, Any]:
    """By its name, `16-mixed` would be `bf16-mixed` on the CPU."""
    scaler = GradScaler("cpu", init_scale=FIRST, growth_interval=INTERVAL)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


def in_a_row() -> DataLoader[Any]:
    """Mini-batches 3, 4 and 5 of 8 break."""
    x, y = noise_loader().dataset.tensors
    x[9:18] += 10
    return DataLoader(TensorDataset(x, y), 3)


class Breaks(Block):
    """The gradient of its output is not finite for some mini-batches."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.training and out.requires_grad and bool(x.sum() > 100):
            out.register_hook(lambda gradient: gradient * float("inf"))
        return out


def course(scales: list[float]) -> float:
    """A number for how the scale changed."""
    return float(sum(place * math.log2(scale) for place, (scale, _) in enumerate(groupby(scales), 1)))


class Overflows(Chain):
    """Logs the scale, and its course. The first block breaks; at first the scale is too large for half precision."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__(optimizer=optimizer)
        self.net[0] = Breaks()
        self.scales: list[float] = [FIRST]

    def on_train_batch_end(self, *_: Any) -> None:
        self.scales.append(self.trainer.precision_plugin.scaler.get_scale())
        self.log_dict({"scale": self.scales[-1], "course": course(self.scales)})


def require_exact(p: int, **options: Any) -> Scaled:
    scaled = Scaled(FIRST, INTERVAL, 1 + options.get("extra_in_flight", 0))
    seen = require_equal_to_reference(
        p,
        partial(Overflows, optimizer="adamw"),
        in_a_row,
        make_optimizer("adamw", None),
        epochs=3 * options.get("replicas", 1) ** 2,
        scaled=scaled,
        options=plugins(),
        **options,
    )[0]
    assert seen.metrics["course"] == course([*scaled.scales, scaled.scale])
    return scaled


@pytest.mark.parametrize(
    ("p", "options"),
    [
        (3, {"clip": ByNorm("lagged", 0.1)}),
        pytest.param(3, {"devices": 1}, marks=pytest.mark.full),
        pytest.param(4, {"devices": 2, "accumulate": 2}, marks=pytest.mark.full),
        pytest.param(2, {"early_input_gradient": True}, marks=pytest.mark.full),
        pytest.param(3, {"extra_in_flight": 1, "devices": 1}, marks=pytest.mark.full),
        pytest.param(2, {"replicas": 2, "clip": ByNorm("lagged", 0.1)}, marks=pytest.mark.full),
        pytest.param(3, {"replicas": 2, "accumulate": 2}, marks=pytest.mark.full),
    ],
)
def test_equals_the_reference(p: int, options: dict[str, Any]) -> None:
    scaled = require_exact(p, **options)
    # At first all stages overflow; later the first one alone does.
    assert scaled.overflows[0] == [True] * p
    assert [True] + [False] * (p - 1) in scaled.overflows
    assert [False] * p in scaled.overflows
    # What broke in a row was scaled alike, and lowers the scale once: when the last stage hears of the first.
    late = (p - 1) * (1 + options.get("extra_in_flight", 0))
    alone = [i for i, each in enumerate(scaled.overflows[: -late - 1]) if each == [True] + [False] * (p - 1)]
    changes = {tuple(scaled.scales[heard] / scaled.scales[i] for heard in (i + late, i + late + 1)) for i in alone}
    # With accumulation there are too few updates for that.
    assert "accumulate" in options or {(1.0, 0.5), (0.5, 0.5)} <= changes


@pytest.mark.full
@pytest.mark.parametrize("most", [1, 3])
def test_flush_schedules_are_plain_lightning(most: int) -> None:
    """With one micro-batch to the bit; with more, the gradients of slices overflow for themselves."""
    options = {"max_epochs": 3, "gradient_clip_val": 0.1, **plugins()}
    strategy = {"schedule": "1f1b", "num_microbatches": most}
    seen = fit_in_pipeline(2, Overflows, in_a_row, strategy=strategy, **options)[0]
    if most == 1:
        plain = fit_alone(Overflows, in_a_row, **options)
        assert (seen.losses, seen.metrics) == (plain.losses, plain.metrics)
        require_same_bits(seen.weights, plain.weights)
    assert seen.metrics["scale"] < FIRST
