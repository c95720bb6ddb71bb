"""What each schedule costs, side by side: one line per schedule, all counted by walking its plan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_cpipe.schedules.check import delays, live_versions, most_in_flight, most_on_rank
from lightning_cpipe.schedules.clock import WHOLE_BACKWARD_TWICE, span
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
        in_flight: for each stage, the largest number of batches that it has forwarded and not yet backwarded.
        versions: for each stage, the largest number of versions of its weights that are needed at once.
        delay: for each stage, by how many updates its gradients are late.
    """

    title: str
    slots: float
    idle: float
    kept: float
    in_flight: Sequence[int]
    versions: Sequence[int]
    delay: Sequence[int]

    @classmethod
    def of(cls, title: str, schedule: Schedule, num_ranks: int, num_batches: int) -> Cost:
        """Count it."""
        v = schedule.stages_per_rank
        plan = schedule.plan(num_ranks * v, num_batches)
        slots = span(plan, WHOLE_BACKWARD_TWICE)
        stages = range(plan.num_stages)
        return cls(
            title,
            slots / v,
            1 - 3 * v * num_batches / slots,
            max(most_on_rank(plan, line) for line in range(num_ranks)) / v,
            [most_in_flight(plan, stage) for stage in stages],
            [live_versions(plan, stage, schedule.versions) for stage in stages],
            [max(delays(plan, stage, schedule.versions).values()) for stage in stages],
        )

    def cells(self) -> list[str]:
        """As words: per stage from the first to the last, or one where all are the same."""
        per_stage = (self.in_flight, self.versions, self.delay)
        words = [str(each[0]) if len(set(each)) == 1 else " ".join(map(str, each)) for each in per_stage]
        return [self.title, f"{self.slots:g}", f"{self.idle:.1%}", f"{self.kept:g}", *words]


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
