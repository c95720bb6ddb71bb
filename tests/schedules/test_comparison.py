"""What schedules cost is counted on their plans, and agrees with what is known of them."""

from __future__ import annotations

import pytest

from lightning_cpipe.schedules import Continuous, GPipe, Interleaved, OneFOneB, Schedule, ZeroBubble
from lightning_cpipe.schedules.comparison import Cost, as_markdown, as_text


# With a backward of two slots: (p - 1) / (m + p - 1), over v m for interleaved; zero bubble (p - 1) / (3 m + p - 1).
@pytest.mark.parametrize(
    ("schedule", "slots", "idle", "kept"),
    [
        (GPipe(), 33, 3 / 11, 8),
        (OneFOneB(), 33, 3 / 11, 4),
        (Interleaved(), 28.5, 3 / 19, 5.5),
        (ZeroBubble(), 27, 3 / 27, 4),
        (Continuous(), 33, 3 / 11, 4),
        (Continuous(early_input_gradient=True), 30, 6 / 30, 4),
    ],
    ids=str,
)
def test_each_schedule_costs_what_is_known_of_it(schedule: Schedule, slots: float, idle: float, kept: float) -> None:
    cost = Cost.of("it", schedule, 4, 8)
    assert cost.slots == slots
    assert cost.idle == pytest.approx(idle)
    assert cost.kept == kept


@pytest.mark.parametrize("schedule", [OneFOneB(), Interleaved(), Continuous()], ids=str)
def test_versions_and_delays_are_those_that_the_schedule_promises(schedule: Schedule) -> None:
    cost = Cost.of("it", schedule, 4, 20)
    found, stages = cost.per_stage, range(4 * schedule.stages_per_rank)
    assert found.delay == [schedule.delay(stage, len(stages), 19) for stage in stages]
    assert found.versions == [delay + 1 for delay in found.delay]
    assert all(counted <= schedule.in_flight(stage, len(stages), 20) for stage, counted in zip(stages, found.in_flight))


def test_a_table_has_a_line_for_each_schedule_and_one_number_where_all_stages_agree() -> None:
    costs = [Cost.of("1f1b", OneFOneB(), 3, 4), Cost.of("stream", Continuous(), 3, 4)]
    assert as_text(costs).splitlines() == [
        "schedule | slots | idle  | kept | in flight | versions | delay",
        "---------+-------+-------+------+-----------+----------+------",
        "1f1b     | 18    | 33.3% | 3    | 3 2 1     | 1        | 0",
        "stream   | 18    | 33.3% | 3    | 3 2 1     | 3 2 1    | 2 1 0",
    ]
    assert as_markdown(costs).splitlines()[1:3] == [
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| 1f1b | 18 | 33.3% | 3 | 3 2 1 | 1 | 0 |",
    ]
