"""The schedules to compare with: one mini-batch is sliced into micro-batches, and the pipeline is emptied after it."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lightning_cpipe.schedules.action import Row, backward, forward, update
from lightning_cpipe.schedules.clock import span
from lightning_cpipe.schedules.folding import in_turn
from lightning_cpipe.schedules.plan import Plan
from lightning_cpipe.schedules.policies import STASH, VersionPolicy
from lightning_cpipe.schedules.schedule import Schedule


@dataclass(frozen=True)
class Flushed(Schedule, ABC):
    """What the flush schedules have in common: one update per plan, so no delay and one version."""

    streams: ClassVar[bool] = False
    unit: ClassVar[str] = "micro-batch"

    @property
    def versions(self) -> VersionPolicy:
        """Any: there is but one."""
        return STASH

    def rows_in_turn(self, stages: Sequence[int], num_stages: int, num_batches: int) -> Iterator[Row]:
        """The rows of several stages of one rank: one action each, in the order of stages that have a rank each.

        Raises:
            PlanError: if stages that have a rank each can't run to their end; the message lists all faults.
        """
        apart = Plan(tuple(tuple(self.rows(stage, num_stages, num_batches)) for stage in range(num_stages)))
        return in_turn(apart, stages)

    def idle_slots(self, num_stages: int, num_batches: int) -> int:
        """``2 (p - 1)`` with one stage per rank, for schedules that do not say otherwise; with several, as counted."""
        if self.stages_per_rank == 1:
            return super().idle_slots(num_stages, num_batches)
        busy = self.slots_per_batch * self.stages_per_rank * num_batches
        return span(self.plan(num_stages, num_batches)) - busy

    def chosen_at(self, stage: int, num_stages: int, batch: int, window_start: int) -> int:
        """0: nothing changes before the last row."""
        return 0

    def version(self, stage: int, num_stages: int, batch: int) -> int:
        """0: all micro-batches of a mini-batch see the same weights."""
        return 0

    def delay(self, stage: int, num_stages: int, batch: int) -> int:
        """0: the update waits for every gradient."""
        return 0

    def most_delay(self, stage: int, num_stages: int) -> int:
        """0, always."""
        return 0

    def live_versions(self, stage: int, num_stages: int) -> int:
        """1."""
        return 1

    def rows_late(self, user: int, owner: int) -> int:
        """0: the update waits for every gradient."""
        return 0

    def paper_ratio(self, num_stages: int, num_batches: int) -> float:
        """What the table shows; for GPipe and 1F1B the paper has the same, ``(p - 1) / (m + p - 1)``."""
        return self.slot_exact_ratio(num_stages, num_batches)


@dataclass(frozen=True)
class GPipe(Flushed):
    """GPipe (Huang et al. 2019): all forwards, then all backwards in reverse order, then the update.

    3 stages, 4 micro-batches:

        stage 0 | 0F 1F 2F 3F  *  *  *  * 3B 2B 1B 0B
        stage 1 |  * 0F 1F 2F 3F  *  * 3B 2B 1B 0B  *
        stage 2 |  *  * 0F 1F 2F 3F 3B 2B 1B 0B  *  *
    """

    name: ClassVar[str] = "gpipe"

    def rows(self, stage: int, num_stages: int, num_batches: int) -> Iterator[Row]:
        """The rows of one stage; the same for all."""
        for batch in range(num_batches):
            yield (forward(batch),)
        for batch in reversed(range(num_batches)):
            yield (backward(batch),)
        yield (update(0),)

    def rows_in_turn(self, stages: Sequence[int], num_stages: int, num_batches: int) -> Iterator[Row]:
        """The rows of several stages of one rank: each micro-batch goes through all of them."""
        for step in range(num_batches):
            for stage in stages:
                yield (forward(step).at(stage),)
        for step in reversed(range(num_batches)):
            for stage in reversed(stages):
                yield (backward(step).at(stage),)
        yield tuple(update(0).at(stage) for stage in reversed(stages))

    idle_slots = Schedule.idle_slots

    def fill_pauses(self, num_batches: int) -> int:
        """0: no forward waits for a backward."""
        return 0

    def in_flight(self, stage: int, num_stages: int, num_batches: int) -> int:
        """All of them."""
        return num_batches


@dataclass(frozen=True)
class OneFOneB(Flushed):
    """1F1B, also PipeDream-flush (Narayanan et al. 2019; 2021): each stage alternates as soon as it can.

    3 stages, 4 micro-batches:

        stage 0 | 0F  * 1F  * 2F 0B 3F 1B  * 2B  * 3B
        stage 1 |  * 0F  * 1F 0B 2F 1B 3F 2B  * 3B  *
        stage 2 |  *  * 0F 0B 1F 1B 2F 2B 3F 3B  *  *
    """

    name: ClassVar[str] = "1f1b"

    def rows(self, stage: int, num_stages: int, num_batches: int) -> Iterator[Row]:
        """The rows of one stage: warm-up, one forward and one backward per row, cool-down, update."""
        ahead = self.lag(stage, num_stages)
        for step in range(num_batches + ahead):
            row: Row = (forward(step),) if step < num_batches else ()
            yield row + ((backward(step - ahead),) if step >= ahead else ())
        yield (update(num_batches - 1),)

    # Its forwards run ahead of its backwards by `lag` rows.
    rows_in_turn = Schedule.rows_in_turn
    idle_slots = Schedule.idle_slots

    def in_flight(self, stage: int, num_stages: int, num_batches: int) -> int:
        """``p - s``, or all of them where they are fewer."""
        return min(num_stages - stage, num_batches)
