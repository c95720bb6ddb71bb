"""A plan is data: for each rank, its rows in order.

The same plan is run, checked, drawn and timed; there is no second table for a picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from lightning_cpipe.errors import PlanError
from lightning_cpipe.schedules.action import Action, Kind, Row, format_row, parse_row

Held = tuple[tuple[int, ...], ...]
"""The stages that each rank holds, in order. Like the stages, the lines of a plan go along with the data: the first one
holds stage 0. Ranks are counted from the other end, so line k of R is rank R - 1 - k."""


@dataclass(frozen=True)
class Plan:
    """The rows of every rank.

    Attributes:
        rows: ``rows[line][step]`` is one row of what the rank of that line does. An action names its stage where the
            rank holds several.
        held: the stages of each line; left out, one per line, so that line s is stage s.

    Raises:
        PlanError: if some stage is held by no line, or by two.
    """

    rows: tuple[tuple[Row, ...], ...]
    held: Held = ()

    def __post_init__(self) -> None:
        if not self.held:
            object.__setattr__(self, "held", tuple((stage,) for stage in range(len(self.rows))))
        stages = sorted(stage for held in self.held for stage in held)
        if stages != list(range(len(stages))) or len(self.held) != len(self.rows):
            raise PlanError(
                f"{len(self.rows)} lines of a plan hold the stages {self.held}: every stage from 0 on must be held by"
                " exactly one line."
            )

    @property
    def num_stages(self) -> int:
        """How many stages the plan is for."""
        return len(self.line_of)

    @property
    def num_ranks(self) -> int:
        """How many ranks hold them: the number of lines."""
        return len(self.rows)

    @cached_property
    def line_of(self) -> dict[int, int]:
        """The line that holds each stage."""
        return {stage: line for line, stages in enumerate(self.held) for stage in stages}

    @property
    def busy_slots(self) -> int:
        """How many actions take a slot, on all stages together."""
        return sum(action.kind.computes for rows in self.rows for row in rows for action in row)

    def together(self, stage: int, other: int) -> bool:
        """Whether both are stages, and one rank holds them."""
        return stage in self.line_of and self.line_of[stage] == self.line_of.get(other)

    def numbered(self, line: int) -> Iterator[tuple[int, Action]]:
        """The actions of one line in order, each with the number of its row, and with its stage where it is clear."""
        stages = self.held[line]
        for number, row in enumerate(self.rows[line]):
            for action in row:
                yield number, action.at(stages[0]) if len(stages) == 1 else action

    def actions(self, stage: int) -> Iterator[Action]:
        """The actions of one stage in order, without their rows."""
        line = self.line_of[stage]
        alone = len(self.held[line]) == 1
        for row in self.rows[line]:
            yield from (action for action in row if alone or action.stage == stage)

    def batches(self, stage: int, *kinds: Kind) -> list[int]:
        """The mini-batches that `stage` does one of `kinds` for, in order."""
        return [action.batch for action in self.actions(stage) if action.kind in kinds]

    def __str__(self) -> str:
        """One line per rank, which begins with its stages, its rows between bars. `parse` reads it back.

        For example ``0 | F0 | F1 B0 U0``, or ``0 2 | 0F0 | 2F0 2B0``.
        """
        return "\n".join(
            " | ".join([" ".join(map(str, stages)), *map(format_row, rows)])
            for stages, rows in zip(self.held, self.rows)
        )

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read a plan, the inverse of `str`.

        Raises:
            PlanError: if a word is not an action, or the lines do not begin with stages 0, 1, 2, … in order.
        """
        held: list[tuple[int, ...]] = []
        rows = []
        for line in (line for line in text.splitlines() if line.strip()):
            head, *cells = line.split("|")
            known = {stage for stages in held for stage in stages}
            due = next(stage for stage in range(len(known) + 1) if stage not in known)
            words = head.split()
            if not all(word.isdecimal() for word in words) or words[:1] != [str(due)]:
                raise PlanError(
                    f"line {len(held) + 1} of the plan starts with {head.strip()!r} where stage {due} is due:"
                    " write one line per stage, beginning with its number, in order; where a rank holds several, one"
                    " line for them, beginning with all their numbers."
                )
            held.append(tuple(map(int, words)))
            rows.append(tuple(parse_row(cell) for cell in cells))
        return cls(tuple(rows), tuple(held))
