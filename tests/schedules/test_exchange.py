"""torch reads the plans that are written here, and what torch writes is read here, checked and drawn."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.pipelining import schedules as torch_schedules

from lightning_cpipe.errors import PlanError
from lightning_cpipe.schedules import Continuous, Given, GPipe, Interleaved, OneFOneB, Schedule, ZeroBubble, named
from lightning_cpipe.schedules.action import Kind
from lightning_cpipe.schedules.check import check, versions
from lightning_cpipe.schedules.exchange import read_csv, write_csv
from lightning_cpipe.schedules.plan import Plan
from lightning_cpipe.schedules.table import Table

FLUSHED = [
    GPipe(),
    OneFOneB(),
    Interleaved(),
    Interleaved(stages_per_rank=3),
    ZeroBubble(),
    OneFOneB(stages_per_rank=2),
]

CONTINUOUS = [Continuous(), Continuous(accumulate=2), Continuous(early_input_gradient=True, stages_per_rank=2)]

ONE_F_ONE_B = """\
0F0,0F1,0B0,0B1
1F0,1B0,1F1,1B1
"""


def computation(plan: Plan) -> list[list[str]]:
    """The words of each line that are no updates."""
    lines = (plan.numbered(line) for line in range(plan.num_ranks))
    return [[str(action) for _, action in line if action.kind is not Kind.UPDATE] for line in lines]


def as_torch_reads(text: str) -> dict[int, list[Any]]:
    """What torch's `_load_csv` makes of each line."""
    lines = csv.reader(io.StringIO(text))
    return {rank: [torch_schedules._Action.from_str(cell) for cell in line] for rank, line in enumerate(lines)}


NEWEST = "2.13"
"""The version of torch that has all of these schedules for certain; older ones lack some."""


class Stage:
    """As much of a stage as torch's schedules ask for to make their plans."""

    has_backward = False
    submod = None
    is_first = is_last = False

    def __init__(self, rank: int, ranks: int, stages: int) -> None:
        self.group_rank = self.stage_index = rank
        self.group_size = ranks
        self.num_stages = stages


def from_torch(name: str, ranks: int, per_rank: int, num_batches: int, path: Path) -> str:
    """A plan of one of torch's schedules, as torch writes it."""
    if torch.__version__ < NEWEST and not hasattr(torch_schedules, name):
        pytest.skip(f"torch {torch.__version__} has no {name} yet")
    stages = [Stage(0, ranks, ranks * per_rank) for _ in range(per_rank)]
    schedule = getattr(torch_schedules, name)(stages, num_batches, loss_fn=lambda *_: None)
    torch_schedules.PipelineScheduleMulti._dump_csv(schedule, path)
    return path.read_text()


def test_a_plan_is_written_as_one_line_per_rank_and_one_action_per_cell() -> None:
    assert write_csv(OneFOneB().plan(2, 2)) == ONE_F_ONE_B


@pytest.mark.parametrize("schedule", FLUSHED, ids=str)
@pytest.mark.parametrize("num_batches", [1, 4, 7])
def test_torch_reads_a_plan_and_finds_it_valid(schedule: Schedule, num_batches: int) -> None:
    plan = schedule.plan(6, num_batches)
    read = as_torch_reads(write_csv(plan))
    ranks = torch_schedules._validate_schedule(read, plan.num_ranks, 6, num_batches)
    assert ranks == plan.line_of
    assert [list(map(str, read[rank])) for rank in range(plan.num_ranks)] == computation(plan)


@pytest.mark.parametrize("schedule", [*FLUSHED, *CONTINUOUS], ids=str)
def test_a_plan_reads_back(schedule: Schedule) -> None:
    plan = schedule.plan(6, 4)
    back = read_csv(write_csv(plan))
    assert back.held == plan.held
    assert computation(back) == computation(plan)
    for stage in range(6):
        assert versions(back, stage) == versions(plan, stage)
    assert check(back) == []


@pytest.mark.parametrize("schedule", CONTINUOUS, ids=str)
def test_a_given_plan_chooses_the_versions_at_the_same_steps(schedule: Continuous) -> None:
    given = Given(schedule.plan(6, 9))
    for stage in range(6):
        for batch in range(9):
            start = schedule.window_start(batch)
            assert given.chosen_at(stage, 6, batch, start) == schedule.chosen_at(stage, 6, batch, start)


def test_updates_on_the_way_are_written_and_torch_says_that_it_does_not_know_them() -> None:
    text = write_csv(Continuous().plan(2, 2))
    assert text == "0F0,0F1,0B0,0U0,0B1,0U1\n1F0,1B0,1U0,1F1,1B1,1U1\n"
    with pytest.raises(RuntimeError, match="0U0"):
        as_torch_reads(text)


@pytest.mark.parametrize(
    ("name", "per_rank"),
    [
        ("ScheduleInterleaved1F1B", 2),
        ("ScheduleLoopedBFS", 2),
        ("ScheduleInterleavedZeroBubble", 2),
        ("ScheduleZBVZeroBubble", 2),
        ("ScheduleDualPipeV", 2),
    ],
)
def test_what_torch_writes_is_read_and_has_no_faults(name: str, per_rank: int, tmp_path: Path) -> None:
    path = tmp_path / "plan.csv"
    from_torch(name, 4, per_rank, 8, path)
    given = Given.read(path)
    assert (given.given.num_ranks, given.given.num_stages, given.num_batches) == (4, 8, 8)
    assert check(given.given, given) == check(given.given, given, sends_wait=True) == []
    table = Table(given, 8, 8)
    assert table.in_run == table.in_window


def test_torchs_interleaved_plan_is_ours(tmp_path: Path) -> None:
    text = from_torch("ScheduleInterleaved1F1B", 4, 2, 8, tmp_path / "plan.csv")
    assert computation(read_csv(text)) == computation(Interleaved().plan(8, 8))


def test_idle_slots_transfers_and_what_shards_weights_are_left_out() -> None:
    text = "0UNSHARD,0F0,0SEND_F0,,0RECV_B0,0B0,0REDUCE_GRAD,0RESHARD\n,1RECV_F0,1F0,1B0,1SEND_B0,\n"
    assert str(read_csv(text)) == "0 | 0F0 | 0B0 | 0U0\n1 | 1F0 | 1B0 | 1U0"


def test_actions_at_the_same_time_are_read_one_after_the_other() -> None:
    assert str(read_csv("0F0,(0F1;0B0)OVERLAP_F_B,0B1\n")) == "0 | 0F0 | 0F1 | 0B0 | 0B1 | 0U1"


def test_lines_are_put_in_the_order_of_their_stages() -> None:
    assert read_csv("1F0,1B0\n0F0,0B0\n").held == ((0,), (1,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,B0\n", "B0 in a plan as CSV names no stage: write it in front, for example 2B0"),
        ("0F0,hello\n", "'hello' is not an action"),
        ("0F0,0B0\n2F0,2B0\n", "every stage from 0 on must be held by exactly one line"),
        ("0F0\n0B0\n", "every stage from 0 on must be held by exactly one line"),
    ],
)
def test_what_is_no_plan_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        read_csv(text)
    assert message in str(caught.value)


def test_a_file_is_found_by_its_name_and_has_one_size(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text(ONE_F_ONE_B)
    given = named(str(path))
    assert isinstance(given, Given)
    assert given.plan(2, 2) == given.given
    assert given.slots(2, 2) == OneFOneB().slots(2, 2)
    assert given.slot_exact_ratio(2, 2) == pytest.approx(1 / 3)
    assert [given.in_flight(stage, 2, 2) for stage in range(2)] == [2, 1]
    assert [given.delay(stage, 2, 1) for stage in range(2)] == [0, 0]
    with pytest.raises(PlanError, match="the plan is for 2 stages and 2 batches, not for 4 and 2"):
        given.plan(4, 2)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(PlanError, match=r"the plan 'nowhere\.csv' can't be read: No such file"):
        named("nowhere.csv")
