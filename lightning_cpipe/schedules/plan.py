"""A plan is data: for each stage, its rows in order.

The same plan is run, checked, drawn and timed; there is no second table for a picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lightning_cpipe.errors import PlanError
from lightning_cpipe.schedules.action import Action, Kind, Row, format_row, parse_row


@dataclass(frozen=True)
class Plan:
    """The rows of every stage.

    Attributes:
        rows: ``rows[stage][step]`` is what `stage` does in its local step `step`.
    """

    rows: tuple[tuple[Row, ...], ...]

    @property
    def num_stages(self) -> int:
        """How many stages the plan is for."""
        return len(self.rows)

    def actions(self, stage: int) -> Iterator[Action]:
        """The actions of one stage in order, without their rows."""
        for row in self.rows[stage]:
            yield from row

    def batches(self, stage: int, kind: Kind) -> list[int]:
        """The mini-batches that `stage` does `kind` for, in order."""
        return [action.batch for action in self.actions(stage) if action.kind is kind]

    def __str__(self) -> str:
        """One line per stage, its rows between bars: ``0 | F0 | F1 B0 U0``. `parse` reads it back."""
        return "\n".join(" | ".join([str(stage), *map(format_row, rows)]) for stage, rows in enumerate(self.rows))

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read a plan, the inverse of `str`.

        Raises:
            PlanError: if a word is not an action, or the lines are not stages 0, 1, 2, … in order.
        """
        lines = [line for line in text.splitlines() if line.strip()]
        rows = []
        for expected, line in enumerate(lines):
            stage, *cells = line.split("|")
            if stage.strip() != str(expected):
                raise PlanError(
                    f"line {expected + 1} of the plan starts with {stage.strip()!r} where stage {expected} is due:"
                    " write one line per stage, beginning with its number, in order."
                )
            rows.append(tuple(parse_row(cell) for cell in cells))
        return cls(tuple(rows))
