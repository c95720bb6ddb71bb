"""What a plan costs each of its stages, counted by walking it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_cpipe.schedules.check import delays, live_versions, most_in_flight
from lightning_cpipe.schedules.plan import Plan
from lightning_cpipe.schedules.policies import VersionPolicy


@dataclass(frozen=True)
class PerStage:
    """The largest numbers of each stage, from the first to the last.

    Attributes:
        in_flight: batches that it has forwarded and not yet backwarded.
        versions: of its weights that are needed at once.
        delay: updates by which its gradients are late.
    """

    in_flight: Sequence[int]
    versions: Sequence[int]
    delay: Sequence[int]

    @classmethod
    def of(cls, plan: Plan, policy: VersionPolicy) -> PerStage:
        """Count it."""
        stages = range(plan.num_stages)
        return cls(
            [most_in_flight(plan, stage) for stage in stages],
            [live_versions(plan, stage, policy) for stage in stages],
            [max(delays(plan, stage, policy).values()) for stage in stages],
        )

    def words(self) -> list[str]:
        """``4 3 2 1`` for each attribute, or one number where all stages agree."""
        numbers = (self.in_flight, self.versions, self.delay)
        return [str(each[0]) if len(set(each)) == 1 else " ".join(map(str, each)) for each in numbers]
