"""Losses of every step and final weights equal a one-process reference with delayed gradients, bit for bit.

One thread per stage, everywhere.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest

from tests.helpers.comparing import require_equal_to_reference
from tests.helpers.fits import fit_alone, fit_in_pipeline, require_same_bits
from tests.helpers.modules import Chain, make_optimizer, noise_loader

EPOCHS = 3

EVERY = list(itertools.product([1, 2, 3, 4], ["sgd", "adamw"], [1, 3], ["step", None]))
PAIRWISE = [
    (1, "sgd", 1, "step"),
    (1, "adamw", 3, None),
    (2, "sgd", 3, "step"),
    (2, "adamw", 1, None),
    (3, "sgd", 3, None),
    (3, "adamw", 1, "step"),
    (4, "sgd", 1, None),
    (4, "adamw", 3, "step"),
]


def require_exact(
    p: int,
    optimizer: str = "sgd",
    accumulate: int = 1,
    schedule: str | None = None,
    extra_in_flight: int = 0,
    early_input_gradient: bool = False,
    options: dict[str, Any] | None = None,
    **chain: Any,
) -> None:
    """Three shuffled epochs of 8 mini-batches, the last one shorter."""
    require_equal_to_reference(
        p,
        partial(Chain, optimizer=optimizer, schedule=schedule, **chain),
        partial(noise_loader, samples=22, batch_size=3, shuffle=True),
        make_optimizer(optimizer, schedule),
        epochs=EPOCHS,
        accumulate=accumulate,
        extra_in_flight=extra_in_flight,
        early_input_gradient=early_input_gradient,
        options=options,
    )


@pytest.mark.parametrize(
    ("p", "optimizer", "accumulate", "schedule"),
    [*PAIRWISE, *(pytest.param(*case, marks=pytest.mark.full) for case in EVERY if case not in PAIRWISE)],
)
def test_equals_the_reference(p: int, optimizer: str, accumulate: int, schedule: str | None) -> None:
    require_exact(p, optimizer, accumulate, schedule)


@pytest.mark.parametrize("p", [2, 3])
def test_equals_the_reference_with_more_in_flight(p: int) -> None:
    require_exact(p, extra_in_flight=1)


@pytest.mark.parametrize(
    ("p", "extra"), [(3, 0), *(pytest.param(*each, marks=pytest.mark.full) for each in ((1, 0), (2, 1)))]
)
def test_equals_the_reference_with_early_input_gradients(p: int, extra: int) -> None:
    require_exact(p, "adamw", 1, "step", extra, early_input_gradient=True, dropout=0.3, noise=True)


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_equals_the_reference_with_dropout_and_noise(p: int) -> None:
    require_exact(p, dropout=0.3, noise=True)


def test_delay_makes_a_difference() -> None:
    """Else the tests above would say nothing."""
    one, two = (fit_in_pipeline(p, Chain, noise_loader, max_epochs=1)[0] for p in (1, 2))
    assert one.losses[0] == two.losses[0]
    assert one.losses[1:] != two.losses[1:]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_stage_is_plain_lightning(optimizer: str, accumulate: int) -> None:
    module = partial(Chain, optimizer=optimizer, schedule="epoch")
    loader = partial(noise_loader, shuffle=True)
    options = {"max_epochs": EPOCHS, "accumulate_grad_batches": accumulate}
    ours = fit_in_pipeline(1, module, loader, noise_loader, **options)[0]
    plain = fit_alone(module, loader, noise_loader, **options)
    assert ours.losses == plain.losses
    assert ours.metrics == plain.metrics
    require_same_bits(ours.weights, plain.weights)


@pytest.mark.full
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_equals_the_reference_in_other_precisions(precision: str) -> None:
    require_exact(3, "adamw", 1, "step", options={"precision": precision})
