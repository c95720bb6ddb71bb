"""What each stage did, in order, is the plan: over three epochs with validations between them, nothing is drained."""

from __future__ import annotations

from functools import partial

import pytest

from lightning_cpipe.engine.timeline import BACKWARD, EVALUATION, FORWARD, IDLE, UPDATE, WAIT_DECISION
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


def test_a_stage_that_waits_for_the_last_ones_decision_is_idle() -> None:
    """It once counted as *other*: a slow logger on rank 0 stalled everyone, and no idle time was seen."""
    last, first = fit_in_pipeline(2, Chain, partial(noise_loader, samples=3 * PER_EPOCH), max_epochs=1)
    kinds = [kind for kind, _ in first.spans]
    assert kinds.count(WAIT_DECISION) >= PER_EPOCH
    assert WAIT_DECISION in IDLE
    assert WAIT_DECISION not in [kind for kind, _ in last.spans]
