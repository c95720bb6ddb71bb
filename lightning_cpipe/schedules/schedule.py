"""What every schedule can say of itself: its rows, and what follows from them in closed form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from lightning_cpipe.schedules.action import Row
from lightning_cpipe.schedules.placement import neighbouring
from lightning_cpipe.schedules.plan import Held, Plan
from lightning_cpipe.schedules.policies import VersionPolicy


@dataclass(frozen=True)
class Schedule(ABC):
    """Who does what, when.

    A schedule writes computation only. The sends and receives are added by `lightning_cpipe.schedules.transfers`,
    for both sides at once. Every closed form below has a test that counts the same by walking the plan.

    In a flush schedule `num_batches` counts the micro-batches of one mini-batch, and the plan is one optimizer step.
    In the continuous schedule it counts mini-batches, and the plan is a whole run.

    Attributes:
        stages_per_rank: how many stages each rank holds. What a stage does, and so every number that comes out, is
            the same for any; only what a rank does in between differs.
    """

    stages_per_rank: int = field(default=1, kw_only=True)

    name: ClassVar[str]
    streams: ClassVar[bool]
    """Whether it streams whole mini-batches and is never flushed; then its plan is that of a whole run."""
    unit: ClassVar[str]
    """What one action is about: ``mini-batch`` or ``micro-batch``."""
    mark: ClassVar[str] = ""
    """What the paper writes between the number and the letter in a table: ``M`` for whole mini-batches."""

    @property
    @abstractmethod
    def versions(self) -> VersionPolicy:
        """Which weights a mini-batch uses."""

    @abstractmethod
    def rows(self, stage: int, num_stages: int, num_batches: int) -> Iterator[Row]:
        """The rows of one stage, in order."""

    def lag(self, stage: int, num_stages: int) -> int:
        """The rows that a stage is ahead of the last one: its forwards run so far ahead of its backwards."""
        return num_stages - 1 - stage

    def too_few(self, num_stages: int, accumulate: int) -> str | None:
        """Why `accumulate` mini-batches per update are too few for the versions to be enough; None if they are not."""
        least = self.lag(0, num_stages)
        if not self.versions.of_window or accumulate >= least:
            return None
        return (
            f"for two versions to be enough, at least {least} mini-batches must share an update, as many as stage 0 of"
            f" {num_stages} is ahead"
        )

    def on(self, num_stages: int, num_ranks: int) -> Schedule:
        """The same for so many ranks, each with as many stages as the others; every number that comes out stays."""
        return replace(self, stages_per_rank=max(1, num_stages // num_ranks))

    def held(self, num_stages: int) -> Held:
        """Which stages each rank holds.

        Raises:
            PlanError: if `stages_per_rank` does not divide `num_stages`.
        """
        return neighbouring(num_stages, self.stages_per_rank)

    def rank_rows(self, stages: Sequence[int], num_stages: int, num_batches: int) -> Iterator[Row]:
        """The rows of the rank that holds `stages`; they may be endless."""
        if len(stages) == 1:
            return self.rows(stages[0], num_stages, num_batches)
        return self.rows_in_turn(stages, num_stages, num_batches)

    def rows_in_turn(self, stages: Sequence[int], num_stages: int, num_batches: int) -> Iterator[Row]:
        """The rows of several stages of one rank, which name their stage.

        The stages take turns, the last one first: its forward is the one that others wait for. A stage begins as many
        rows before the next one as its lag is longer.
        """
        lags = {stage: self.lag(stage, num_stages) for stage in stages}
        to_come = {stage: self.rows(stage, num_stages, num_batches) for stage in reversed(stages)}
        step = -max(lags.values())
        while to_come:
            for stage in [stage for stage in to_come if step + lags[stage] >= 0]:
                row = next(to_come[stage], None)
                if row is None:
                    del to_come[stage]
                else:
                    yield tuple(action.at(stage) for action in row)
            step += 1

    def plan(self, num_stages: int, num_batches: int) -> Plan:
        """The rows of all ranks.

        Raises:
            PlanError: if `stages_per_rank` does not divide `num_stages`.
        """
        held = self.held(num_stages)
        return Plan(tuple(tuple(self.rank_rows(stages, num_stages, num_batches)) for stages in held), held)

    @abstractmethod
    def in_flight(self, stage: int, num_stages: int, num_batches: int) -> int:
        """The largest number of batches that `stage` has forwarded and not yet backwarded."""

    @abstractmethod
    def chosen_at(self, stage: int, num_stages: int, batch: int, window_start: int) -> int:
        """The local step at whose beginning the version was the newest that `batch` uses on `stage`.

        Args:
            stage: which.
            num_stages: p.
            batch: counted from where the pipeline was filled, as local steps are.
            window_start: the first batch that shares an update with `batch`.
        """

    @abstractmethod
    def version(self, stage: int, num_stages: int, batch: int) -> int:
        """The version (number of updates) of `stage` that `batch` uses."""

    @abstractmethod
    def delay(self, stage: int, num_stages: int, batch: int) -> int:
        """How many updates old the version is that the gradient of `batch` is for, when `stage` applies it."""

    @abstractmethod
    def most_delay(self, stage: int, num_stages: int) -> int:
        """The largest delay in the steady state."""

    @abstractmethod
    def live_versions(self, stage: int, num_stages: int) -> int:
        """The largest number of versions that are needed at once, the newest included."""

    @abstractmethod
    def rows_late(self, user: int, owner: int) -> int:
        """By how many of its own rows the owner of a tied parameter adds the gradient of stage `user` later."""

    @property
    def slots_per_batch(self) -> int:
        """Slots that a stage takes for one batch: a forward and a backward, or its two halves."""
        return 2

    def slots(self, num_stages: int, num_batches: int) -> int:
        """Slots from the first forward to the last backward, if everything that a stage does takes one."""
        busy = self.slots_per_batch * self.stages_per_rank * num_batches
        return busy + self.idle_slots(num_stages, num_batches)

    def idle_slots(self, num_stages: int, num_batches: int) -> int:
        """Slots of a whole plan in which a rank has nothing to do: ``2 (p - 1)``, the same for each rank.

        For GPipe and 1F1B: Huang et al. 2019 (GPipe), section 2.3, and Narayanan et al. 2021, section 2.2. For the
        continuous schedule: the ContinuousPipe paper, "Parallel Training in ContinuousPipe".

        With v stages on each of R ranks, at least as many as v times bigger stages would leave: ``2 v (R - 1)``. But a
        stage may forward no further ahead than its own lag, so from three on a rank pauses in the fill, see
        `fill_pauses`.
        """
        v = self.stages_per_rank
        return (num_stages // v - 1) * (2 * v + self.fill_pauses(num_batches))

    def fill_pauses(self, num_batches: int) -> int:
        """Further slots that a rank waits in the fill for the next one, where it holds several stages.

        Found by trying, and counted in a test for all sizes: after the first mini-batch, each one adds ``v - 2``, then
        less and less, as the stages begin to have backwards to do in between.
        """
        v, per_row = self.stages_per_rank, self.lag(0, 2)
        return sum(max(0, v - 1 - (batch + 2) // (2 * per_row)) for batch in range(num_batches - 1))

    def slot_exact_ratio(self, num_stages: int, num_batches: int) -> float:
        """Share of all slots that are idle, counted from the table itself.

        ``(p - 1) / (N + p - 1)`` with one stage per rank and whole backwards.
        """
        return self.idle_slots(num_stages, num_batches) / self.slots(num_stages, num_batches)

    @abstractmethod
    def paper_ratio(self, num_stages: int, num_batches: int) -> float:
        """The bubble ratio by the formula that the ContinuousPipe paper prints for this schedule."""
