"""What a pipeline will do, as far as that follows from its cut, its blocks' costs and its schedule.

No second table: what is in flight where, the delay and the bubble are asked of the schedule that will run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from lightning_cpipe.balance.costs import BlockCost, Costs
from lightning_cpipe.balance.memory import MemoryNeeds, StageMemory
from lightning_cpipe.schedules.continuous import Continuous
from lightning_cpipe.stage.cut import Crossing, Cut
from lightning_cpipe.tree import TemplateTable

DOMINANT = 1.3
"""A block that costs this many times the mean stage makes its stage the slowest, wherever is cut."""


@dataclass(frozen=True)
class StageForecast:
    """What one stage will do.

    Attributes:
        stage: which.
        blocks: its blocks.
        forward_s: seconds of a forward.
        backward_s: seconds of a backward.
        memory: what it keeps.
        in_flight: mini-batches, at most.
        versions: of its weights that live at once, at most.
        delay: of its gradients, in updates.
        sends: bytes of activations that go to the next stage for each mini-batch.
        gets_back: bytes of their gradients.
    """

    stage: int
    blocks: tuple[str, ...]
    forward_s: float
    backward_s: float
    memory: StageMemory
    in_flight: int
    versions: int
    delay: int
    sends: int
    gets_back: int

    @property
    def seconds(self) -> float:
        """Of both passes."""
        return self.forward_s + self.backward_s


@dataclass(frozen=True)
class TieForecast:
    """What two stages that train the same parameters tell each other.

    Attributes:
        user: the stage with copies.
        owner: the stage whose optimizer updates them.
        size: bytes of gradients for each mini-batch, and of weights after each update.
    """

    user: int
    owner: int
    size: int


@dataclass(frozen=True)
class Forecast:
    """What a pipeline will do.

    Attributes:
        costs: of the blocks.
        starts: the modules that begin stages 1, 2, ….
        stages: each of them.
        ties: between stages that train the same parameters.
        needs: of memory.
        num_samples: of a mini-batch, where known.
        num_batches: mini-batches of the run, where known.
    """

    costs: Costs
    starts: tuple[str, ...]
    stages: tuple[StageForecast, ...]
    ties: tuple[TieForecast, ...]
    needs: MemoryNeeds
    num_samples: int | None
    num_batches: int | None

    @property
    def period_s(self) -> float | None:
        """Seconds per mini-batch in the steady state: of the slowest stage, without its updates and transfers."""
        return max(stage.seconds for stage in self.stages) if self.costs.timed else None

    @property
    def imbalance(self) -> float | None:
        """Share of the steady state in which the stages wait for the slowest one, on average."""
        if self.period_s is None:
            return None
        return 1 - sum(stage.seconds for stage in self.stages) / (len(self.stages) * self.period_s)

    @property
    def bubble(self) -> float | None:
        """Share of the run's slots that the schedule leaves idle: fill and drain."""
        if self.num_batches is None:
            return None
        schedule, p = self.needs.schedule, len(self.stages)
        if isinstance(schedule, Continuous):
            return schedule.idle_ratio(p, self.num_batches, drained=True)
        return schedule.slot_exact_ratio(p, self.needs.num_batches)

    @property
    def dominant(self) -> tuple[BlockCost, float] | None:
        """The block that alone costs far more than the mean stage, and how many times as much; None if none does."""
        costs = self.costs.to_balance
        worst = max(range(len(costs)), key=costs.__getitem__)
        mean = sum(costs) / len(self.stages)
        if len(self.stages) == 1 or costs[worst] <= DOMINANT * mean:
            return None
        return self.costs.blocks[worst], costs[worst] / mean


def forecast(
    cut: Cut, step: str, costs: Costs, needs: MemoryNeeds, num_samples: int | None, num_batches: int | None
) -> Forecast:
    """What a pipeline will do.

    Args:
        cut: how the module is cut.
        step: the name of the step that trains.
        costs: of its blocks; each stage begins at one of them.
        needs: of memory.
        num_samples: of a mini-batch, where known.
        num_batches: mini-batches of the run, where known.
    """
    names = [block.name for block in costs.blocks]
    starts = [names.index(start) for start in cut.starts]
    p = cut.num_stages
    step_cut = cut.steps[step]
    stages = []
    places = pairwise([0, *starts, len(names)])
    for stage, ((begin, end), memory) in enumerate(zip(places, needs.of_all(costs, starts))):
        sends = step_cut.passages[stage].sends
        stages.append(
            StageForecast(
                stage=stage,
                blocks=tuple(names[begin:end]),
                forward_s=sum(block.forward_s for block in costs.blocks[begin:end]),
                backward_s=sum(block.backward_s for block in costs.blocks[begin:end]),
                memory=memory,
                in_flight=needs.in_flight(stage),
                versions=needs.schedule.live_versions(stage, p),
                delay=needs.schedule.most_delay(stage, p),
                sends=_bytes(sends, step_cut.templates),
                gets_back=_bytes((each for each in sends if each.gradient), step_cut.templates),
            )
        )
    sizes = {name: size for block in costs.blocks for name, size in block.trained.items()}
    ties = tuple(TieForecast(tie.user, tie.owner, sum(sizes[name] for name in tie.names)) for tie in cut.ties)
    return Forecast(costs, cut.starts, tuple(stages), ties, needs, num_samples, num_batches)


def _bytes(crossings: Iterable[Crossing], templates: TemplateTable) -> int:
    values = (crossing.value for crossing in crossings)
    return sum(templates[value.module, value.call].specs[value.leaf].num_bytes for value in values)
