"""What every schedule can say of itself: its rows, and what follows from them in closed form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from lightning_cpipe.schedules.action import Row
from lightning_cpipe.schedules.plan import Plan


class Schedule(ABC):
    """Who does what, when.

    A schedule writes computation only. The sends and receives are added by `lightning_cpipe.schedules.transfers`,
    for both sides at once. Every closed form below has a test that counts the same by walking the plan.

    In a flush schedule `num_batches` counts the micro-batches of one mini-batch, and the plan is one optimizer step.
    In the continuous schedule it counts mini-batches, and the plan is a whole run.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    """What one action is about: ``mini-batch`` or ``micro-batch``."""
    mark: ClassVar[str] = ""
    """What the paper writes between the number and the letter in a table: ``M`` for whole mini-batches."""

    @abstractmethod
    def rows(self, stage: int, num_stages: int, num_batches: int) -> Iterator[Row]:
        """The rows of one stage, in order."""

    def plan(self, num_stages: int, num_batches: int) -> Plan:
        """The rows of all stages."""
        return Plan(tuple(tuple(self.rows(stage, num_stages, num_batches)) for stage in range(num_stages)))

    @abstractmethod
    def in_flight(self, stage: int, num_stages: int, num_batches: int) -> int:
        """The largest number of batches that `stage` has forwarded and not yet backwarded."""

    @abstractmethod
    def version(self, stage: int, num_stages: int, batch: int) -> int:
        """The version (number of updates) of `stage` that the forward and the backward of `batch` use."""

    @abstractmethod
    def delay(self, stage: int, num_stages: int, batch: int) -> int:
        """How many updates old the version is that the gradient of `batch` is for, when `stage` applies it."""

    @abstractmethod
    def rows_late(self, user: int, owner: int) -> int:
        """By how many of its own rows the owner of a tied parameter adds the gradient of stage `user` later."""

    def slots(self, num_stages: int, num_batches: int) -> int:
        """Slots from the first forward to the last backward, if every forward and backward takes one."""
        return 2 * num_batches + self.idle_slots(num_stages)

    def idle_slots(self, num_stages: int) -> int:
        """Slots of a whole plan in which a stage has nothing to do; the same for each stage.

        For GPipe and 1F1B: Huang et al. 2019 (GPipe), section 2.3, and Narayanan et al. 2021, section 2.2. For the
        continuous schedule: the ContinuousPipe paper, "Parallel Training in ContinuousPipe".
        """
        return 2 * (num_stages - 1)

    def slot_exact_ratio(self, num_stages: int, num_batches: int) -> float:
        """Share of all slots that are idle: ``(p - 1) / (N + p - 1)``, counted from the table itself."""
        return self.idle_slots(num_stages) / self.slots(num_stages, num_batches)

    @abstractmethod
    def paper_ratio(self, num_stages: int, num_batches: int) -> float:
        """The bubble ratio by the formula that the ContinuousPipe paper prints for this schedule."""
