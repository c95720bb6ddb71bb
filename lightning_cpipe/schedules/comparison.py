"""What each schedule costs, side by side: one line per schedule, all counted by walking its plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lightning_cpipe.schedules.check import most_on_rank
from lightning_cpipe.schedules.clock import WHOLE_BACKWARD_TWICE, span
from lightning_cpipe.schedules.per_stage import PerStage
from lightning_cpipe.schedules.schedule import Schedule


@dataclass(frozen=True)
class Cost:
    """What one schedule costs.

    Attributes:
        title: of the schedule.
        slots: from the first forward to the last backward. A slot is the time of a forward through the share of one
            rank, whether that is one stage or several; a backward takes two, and each half of one, one.
        idle: share of the slots in which a rank has nothing to do.
        kept: the largest number of batches whose forwards a rank keeps for their backwards. With several stages on a
            rank, each counts for its share.
        per_stage: batches in flight, versions and delay.
    """

    title: str
    slots: float
    idle: float
    kept: float
    per_stage: PerStage

    @classmethod
    def of(cls, title: str, schedule: Schedule, num_ranks: int, num_batches: int) -> Cost:
        """Count it."""
        v = schedule.stages_per_rank
        plan = schedule.plan(num_ranks * v, num_batches)
        slots = span(plan, WHOLE_BACKWARD_TWICE)
        return cls(
            title,
            slots / v,
            1 - 3 * v * num_batches / slots,
            max(most_on_rank(plan, line) for line in range(num_ranks)) / v,
            PerStage.of(plan, schedule.versions),
        )

    def cells(self) -> list[str]:
        """As words."""
        return [self.title, f"{self.slots:g}", f"{self.idle:.1%}", f"{self.kept:g}", *self.per_stage.words()]


HEADS = ("schedule", "slots", "idle", "kept", "in flight", "versions", "delay")


def as_text(costs: Iterable[Cost]) -> str:
    """Aligned columns."""
    table = [list(HEADS), *(cost.cells() for cost in costs)]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = [" | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in table]
    return "\n".join([lines[0], "-+-".join("-" * width for width in widths), *lines[1:]])


def as_markdown(costs: Iterable[Cost]) -> str:
    """A Markdown table."""
    table = [HEADS, ["---"] * len(HEADS), *(cost.cells() for cost in costs)]
    return "\n".join(f"| {' | '.join(row)} |" for row in table)
