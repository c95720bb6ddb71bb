"""A plan that somebody else wrote, as a schedule: it can be checked, drawn and compared like the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import ClassVar

from lightning_cpipe.errors import PlanError
from lightning_cpipe.schedules.action import Action, Kind, Row
from lightning_cpipe.schedules.as_one_step import not_once, not_one_step
from lightning_cpipe.schedules.check import check, delays, live_versions, most_in_flight, versions
from lightning_cpipe.schedules.clock import span
from lightning_cpipe.schedules.exchange import read_csv
from lightning_cpipe.schedules.folding import folded
from lightning_cpipe.schedules.plan import Held, Plan
from lightning_cpipe.schedules.policies import STASH, VersionPolicy
from lightning_cpipe.schedules.schedule import Schedule


@dataclass(frozen=True)
class Given(Schedule):
    """A plan that somebody else wrote. It promises what it does: all is counted by walking it.

    Attributes:
        given: the plan. How many stages each rank holds is said there.
    """

    given: Plan

    name: ClassVar[str] = "given"
    streams: ClassVar[bool] = False
    unit: ClassVar[str] = "batch"

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages_per_rank", max(map(len, self.given.held)))

    @classmethod
    def read(cls, path: str | Path) -> Given:
        """The plan of a file.

        Raises:
            PlanError: if the file can't be read, or holds no plan.
        """
        try:
            text = Path(path).read_text()
        except UnicodeDecodeError as error:
            raise PlanError(f"the plan {str(path)!r} can't be read: it is no text.") from error
        except OSError as error:
            raise PlanError(f"the plan {str(path)!r} can't be read: {error.strerror}.") from error
        return cls(read_csv(text))

    @property
    def versions(self) -> VersionPolicy:
        """A plan says nothing of versions, so each stage takes what is the newest."""
        return STASH

    @property
    def num_batches(self) -> int:
        """How many batches the plan is for."""
        return len(self.given.batches(0, Kind.FORWARD))

    @cached_property
    def is_one_step(self) -> bool:
        """Whether the plan is one optimizer step, as those of flush schedules are."""
        return not not_one_step(self.given)

    def on(self, num_stages: int, num_ranks: int) -> Given:
        """The plan folded, if that can be: one optimizer step, for a multiple of these ranks. Else as it is."""
        if num_ranks not in self._on_ranks:
            more = num_ranks < self.given.num_ranks and not self.given.num_ranks % num_ranks
            folds = more and not check(self.given) and not not_once(self.given)
            self._on_ranks[num_ranks] = Given(folded(self.given, num_ranks)) if folds else self
        return self._on_ranks[num_ranks]

    @cached_property
    def _on_ranks(self) -> dict[int, Given]:
        return {}

    def plan(self, num_stages: int, num_batches: int) -> Plan:
        """The plan as it is.

        Raises:
            PlanError: if it is asked for in another size.
        """
        if (num_stages, num_batches) != (self.given.num_stages, self.num_batches):
            raise PlanError(
                f"the plan is for {self.given.num_stages} stages and {self.num_batches} batches, not for {num_stages}"
                f" and {num_batches}."
            )
        return self.given

    def held(self, num_stages: int) -> Held:
        """As in the plan."""
        return self.given.held

    def rank_rows(self, stages: Sequence[int], num_stages: int, num_batches: int) -> Iterator[Row]:
        """The rows of a rank; for fewer batches than the plan's, without the actions of those that are not there.

        What is left keeps its order, so it can't lock where the whole plan does not.
        """
        for row in self.given.rows[self.given.line_of[stages[0]]]:
            left = (self._left(action, num_batches) for action in row)
            yield tuple(action for action in left if action is not None)

    def _left(self, action: Action, num_batches: int) -> Action | None:
        if action.batch < num_batches:
            return action
        return Action(Kind.UPDATE, num_batches - 1, action.stage) if action.kind is Kind.UPDATE else None

    def rows(self, stage: int, num_stages: int, num_batches: int) -> Iterator[Row]:
        """One action per row."""
        return ((action,) for action in self.plan(num_stages, num_batches).actions(stage))

    def in_flight(self, stage: int, num_stages: int, num_batches: int) -> int:
        """As counted."""
        return most_in_flight(self.given, stage)

    def chosen_at(self, stage: int, num_stages: int, batch: int, window_start: int) -> int:
        """As counted: the backwards before the forward of `batch`. In one optimizer step, all use the same version."""
        if self.is_one_step:
            return 0
        actions = self.given.actions(stage)
        before = takewhile(lambda action: (action.kind, action.batch) != (Kind.FORWARD, batch), actions)
        return sum(action.kind.frees for action in before)

    def version(self, stage: int, num_stages: int, batch: int) -> int:
        """As counted."""
        return versions(self.given, stage)[batch]

    def delay(self, stage: int, num_stages: int, batch: int) -> int:
        """As counted."""
        return delays(self.given, stage)[batch]

    def most_delay(self, stage: int, num_stages: int) -> int:
        """As counted."""
        return max(delays(self.given, stage).values())

    def live_versions(self, stage: int, num_stages: int) -> int:
        """As counted."""
        return live_versions(self.given, stage)

    def rows_late(self, user: int, owner: int) -> int:
        """0: stages that share weights wait for each other."""
        return 0

    def slots(self, num_stages: int, num_batches: int) -> int:
        """As counted."""
        return span(self.plan(num_stages, num_batches))

    def slot_exact_ratio(self, num_stages: int, num_batches: int) -> float:
        """As counted."""
        total = self.given.num_ranks * self.slots(num_stages, num_batches)
        return (total - self.given.busy_slots) / total

    def paper_ratio(self, num_stages: int, num_batches: int) -> float:
        """As counted: no paper has a formula for it."""
        return self.slot_exact_ratio(num_stages, num_batches)
