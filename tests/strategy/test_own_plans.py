"""A plan of a user's own runs as it stands: from a file, or made by a schedule of the user's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lightning_cpipe.schedules import SCHEDULES, Given, GPipe, Interleaved, OneFOneB, Schedule, ZeroBubble
from lightning_cpipe.schedules.action import Row, backward, forward, update
from lightning_cpipe.schedules.exchange import read_csv, write_csv
from lightning_cpipe.schedules.flushed import Flushed
from lightning_cpipe.schedules.folding import folded
from lightning_cpipe.schedules.plan import Plan
from tests.helpers.fits import Seen, fit_in_pipeline, require_same_bits
from tests.helpers.modules import Chain, noise_loader
from tests.schedules.test_exchange import from_torch
from tests.strategy.test_refusals import no_processes, refused

__all__ = ["no_processes"]

# The last batch of an epoch has two samples, so two micro-batches.
train = partial(noise_loader, 14, 6)


class InOrder(Flushed):
    """All forwards, then all backwards in the same order."""

    name: ClassVar[str] = "in-order"

    def rows(self, stage: int, num_stages: int, num_batches: int) -> Iterator[Row]:
        for batch in range(num_batches):
            yield (forward(batch),)
        for batch in range(num_batches):
            yield (backward(batch),)
        yield (update(num_batches - 1),)

    def in_flight(self, stage: int, num_stages: int, num_batches: int) -> int:
        return num_batches


class Forgetful(InOrder):
    """Forgets a backward of a mini-batch with two micro-batches."""

    def rows(self, stage: int, num_stages: int, num_batches: int) -> Iterator[Row]:
        rows = super().rows(stage, num_stages, num_batches)
        return (row for row in rows if num_batches != 2 or row != (backward(0),))


def fit(schedule: Any, stages: Any = 2, devices: int = 2, most: int = 1) -> Seen:
    strategy = {"schedule": schedule, "num_microbatches": most}
    return fit_in_pipeline(stages, partial(Chain, 8), train, devices=devices, strategy=strategy, max_epochs=2)[0]


def require_same(a: Seen, b: Seen) -> None:
    assert a.losses == b.losses
    assert len(a.losses) == 6
    assert a.spans == b.spans
    require_same_bits(a.weights, b.weights)


@pytest.mark.parametrize(
    ("schedule", "stages", "devices"),
    [
        (OneFOneB(), 2, 2),
        *(
            pytest.param(*each, marks=pytest.mark.full)
            for each in (
                (GPipe(), 3, 3),
                (ZeroBubble(), 2, 2),
                (OneFOneB(stages_per_rank=2), 4, 2),
                (GPipe(stages_per_rank=4), 4, 1),
            )
        ),
    ],
    ids=str,
)
def test_a_plan_in_a_file_has_the_bits_of_its_schedule(
    schedule: Schedule, stages: int, devices: int, tmp_path: Path
) -> None:
    """Also where a mini-batch has fewer samples than the plan has micro-batches."""
    path = tmp_path / "plan.csv"
    path.write_text(write_csv(schedule.plan(stages, 4)))
    require_same(fit(str(path), stages, devices), fit(schedule.name, stages, devices, most=4))


@pytest.mark.parametrize(
    ("plan", "fewer"),
    [
        (InOrder().plan(2, 3), [1]),
        *(
            pytest.param(*each, marks=[pytest.mark.full, pytest.mark.timeout(240)])
            for each in (
                (InOrder().plan(8, 3), [4, 2, 1]),
                (Interleaved().plan(8, 3), [2, 1]),
                # Not as many stages on each.
                (folded(ZeroBubble().plan(6, 4), 3), [1]),
                (read_csv("0F0,0F1,1F0,1F1,1B0,0B0,1B1,0B1\n2F0,2B0,2F1,2B1\n"), [1]),
            )
        ),
    ],
    ids=["2 on 1", "8 on fewer", "interleaved", "folded before", "uneven"],
)
def test_a_plan_in_a_file_is_rehearsed_on_fewer_devices(plan: Plan, fewer: list[int], tmp_path: Path) -> None:
    """With `num_stages` from the plan."""
    path = tmp_path / "plan.csv"
    path.write_text(write_csv(plan))
    as_written, *rehearsed = (fit(str(path), "auto", devices) for devices in (plan.num_ranks, *fewer))
    assert len(as_written.losses) == 6
    for each in rehearsed:
        assert each.losses == as_written.losses
        require_same_bits(each.weights, as_written.weights)


def test_a_schedule_of_ones_own_runs() -> None:
    seen = fit(InOrder(), most=3)
    require_same(fit(Given(InOrder().plan(2, 3))), seen)
    assert [each for each in seen.spans if each[0] in ("forward", "backward")][:6] == [
        *(("forward", number) for number in range(3)),
        *(("backward", number) for number in range(3)),
    ]


@pytest.mark.full
def test_a_plan_that_torch_wrote_runs(tmp_path: Path) -> None:
    """torch writes schedules of several stages per rank; with one, its interleaved one is 1F1B."""
    path = tmp_path / "plan.csv"
    from_torch("ScheduleInterleaved1F1B", 2, 1, 4, path)
    require_same_bits(fit(str(path)).weights, fit("1f1b", most=4).weights)


@pytest.mark.usefixtures("no_processes")
@pytest.mark.parametrize(
    ("text", "options", "parts"),
    [
        ("0F0,0F1,0B0\n1F0,1B0,1F1,1B1\n", {}, ["stage 0: F1 has no B1", "can't run"]),
        ("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n", {}, ["stage 0, row 1: RECV_B0 waits for ever", "; stage 1, row 1"]),
        ("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n2F0\n3F0\n", {}, ["stage 2: F0 has no B0", "can't run"]),
        ("0F0,0B0,0U0,0F1,0B1,0U1\n1F0,1B0,1U0,1F1,1B1,1U1\n", {}, ["stage 0: U0 before F1", "updates once"]),
        ("0F1,0F0,0B0,0B1\n1F1,1F0,1B0,1B1\n", {}, ["stage 0: F1 where F0 is due", "in order"]),
        ("0F0,0B0\n1F0,1B0\n2F0,2B0\n", {}, ["for 3 stages on 3 devices, not for 3 on 2", "to 3 or a divisor of it"]),
        ("0F0,0B0\n1F0,1B0\n", {"num_stages": 4}, ["for 2 stages on 2 devices, not for 4 on 2", "leave `num_stages`"]),
        ("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n", {"num_microbatches": 3}, ["num_microbatches=3", "for 2 of them"]),
        ("0F0,3F0,3B0,0B0\n1F0,2F0,2B0,1B0\n", {}, ["stage 3: is the last one of its rank where stage 2 is due"]),
        ("0F0,hello\n", {}, ["'hello' is not an action"]),
        ("", {}, ["the plan is empty: write one line for each rank"]),
    ],
)
def test_a_plan_that_can_not_run_is_refused_by_its_name(
    text: str, options: dict[str, Any], parts: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "plan.csv"
    path.write_text(text)
    (reason,) = refused(Chain(), {"schedule": str(path), **options})
    assert not [part for part in [repr(str(path)), *parts] if part not in reason], reason


@pytest.mark.usefixtures("no_processes")
def test_a_schedule_of_ones_own_is_checked_for_every_number_of_micro_batches() -> None:
    (reason,) = refused(Chain(), {"schedule": Forgetful(), "num_microbatches": 3})
    assert "schedule=Forgetful(…): the plan for 2 micro-batches can't run: stage 0: F0 has no B0" in reason


@pytest.mark.usefixtures("no_processes")
def test_a_schedule_that_was_added_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """With several stages on a rank."""
    monkeypatch.setitem(SCHEDULES, "forgetful", Forgetful)
    (reason,) = refused(Chain(), {"schedule": "forgetful", "num_microbatches": 3, "num_stages": 4})
    assert "schedule='forgetful': the plan for 2 micro-batches can't run: stage 0: F0 has no B0; stage 1" in reason


def test_a_plan_for_fewer_batches_keeps_the_order() -> None:
    plan = OneFOneB().plan(2, 4)
    for size in (1, 2, 3):
        shorter = Plan(tuple(tuple(Given(plan).rank_rows(held, 2, size)) for held in plan.held), plan.held)
        assert write_csv(shorter) == write_csv(OneFOneB().plan(2, size))
    assert read_csv(write_csv(plan)) == Given(read_csv(write_csv(plan))).plan(2, 4)
