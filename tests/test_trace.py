"""What each stage did, in order, is the plan: over three epochs with validations between them, nothing is drained."""

from __future__ import annotations

from functools import partial

import pytest

from lightning_cpipe.engine.timeline import BACKWARD, EVALUATION, FORWARD, UPDATE
from lightning_cpipe.schedules.continuous import Continuous
from tests.helpers.fits import fit_in_pipeline
from tests.helpers.modules import Chain, noise_loader

EPOCHS = 3
PER_EPOCH = 8
LETTERS = {FORWARD: "F", BACKWARD: "B", UPDATE: "U"}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("extra_in_flight", [0, 1])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_the_trace_is_the_plan(p: int, extra_in_flight: int, accumulate: int) -> None:
    schedule = Continuous(extra_in_flight, accumulate, PER_EPOCH)
    seen = fit_in_pipeline(
        p,
        Chain,
        partial(noise_loader, samples=3 * PER_EPOCH),
        noise_loader,
        strategy={"extra_in_flight": extra_in_flight},
        max_epochs=EPOCHS,
        accumulate_grad_batches=accumulate,
    )
    plan = schedule.plan(p, EPOCHS * PER_EPOCH)
    for stage, of_rank in enumerate(reversed(seen)):
        trace = [f"{LETTERS[kind]}{batch}" for kind, batch in of_rank.spans if kind in LETTERS]
        assert trace == list(map(str, plan.actions(stage)))
        # Two validations lie inside the stream, with forwards in flight around them on all stages but the last.
        assert sum(kind == EVALUATION for kind, _ in of_rank.spans) >= EPOCHS * PER_EPOCH


@pytest.mark.parametrize("p", [2, 4])
def test_forwards_of_the_next_epoch_run_before_the_epoch_ends(p: int) -> None:
    seen = fit_in_pipeline(p, Chain, partial(noise_loader, samples=3 * PER_EPOCH), max_epochs=2)
    for stage, of_rank in enumerate(reversed(seen)):
        spans = of_rank.spans
        last_backward = spans.index((BACKWARD, PER_EPOCH - 1))
        ahead = [batch for kind, batch in spans[:last_backward] if kind == FORWARD and batch >= PER_EPOCH]
        assert len(ahead) == p - 1 - stage
