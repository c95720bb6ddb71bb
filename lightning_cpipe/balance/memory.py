"""What a stage keeps in memory while it trains, and where to cut so that it is within a limit.

    weights + gradients + optimizer + (live versions - 1) x trained weights + in flight x saved activations

Live versions and mini-batches in flight are the schedule's, so the same blocks take more memory on an earlier stage.
Not counted: what operations need for a moment, messages on their way, and what the allocator and libraries keep.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import pairwise

from torch.optim import Optimizer

from lightning_cpipe.balance.costs import Costs, Held
from lightning_cpipe.balance.split import balanced_starts, least_largest
from lightning_cpipe.errors import CutError
from lightning_cpipe.schedules.schedule import Schedule

_UNITS = {"": 1, "B": 1}
for _power, _prefix in enumerate("KMGT", start=1):
    _UNITS[f"{_prefix}B"] = 1000**_power
    _UNITS[f"{_prefix}IB"] = 1024**_power

ADAM = 2.0
"""What is assumed of an optimizer that is not known: two moments per weight, as in Adam."""

_STATES = {
    "Adadelta": 2.0, "Adafactor": 0.0, "Adagrad": 1.0, "Adam": ADAM, "Adamax": 2.0, "ASGD": 1.0, "Muon": 0.0,
    "NAdam": 2.0, "RAdam": 2.0, "RMSprop": 1.0, "Rprop": 2.0, "SGD": 0.0,
}  # fmt: skip
"""The tensors of a weight's size that torch's optimizers keep for it at least; their subclasses count as they do."""

_ONE_MORE = ("momentum", "centered", "amsgrad")
"""Options that add one."""


def bytes_of(amount: str | int) -> int:
    """The bytes that a user wrote: ``16GB`` (10^9 each), ``16GiB`` (2^30 each), or a number.

    Raises:
        ValueError: if it is no positive amount.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(amount))
    unit = _UNITS.get(match[2].upper()) if match else None
    found = 0 if match is None or unit is None else int(float(match[1]) * unit)
    if found <= 0:
        raise ValueError(f"{amount!r} is no amount of memory: write '16GB', '16GiB' or a number of bytes")
    return found


def in_words(amount: float) -> str:
    """Bytes as a person reads them: ``1.5 MB``, 10^6 each."""
    for unit in ("B", "kB", "MB"):
        if amount < 999.5:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} GB" if amount < 999.5 else f"{amount:.0f} GB"


def state_multiple(optimizer: Optimizer) -> float:
    """What an optimizer keeps for the trained weights, in multiples of them; `ADAM` where its class is not known."""
    for cls in type(optimizer).__mro__:
        if cls.__name__ in _STATES:
            return _STATES[cls.__name__] + sum(bool(optimizer.defaults.get(name)) for name in _ONE_MORE)
    return ADAM


@dataclass(frozen=True)
class StageMemory:
    """What one stage keeps, in bytes.

    Attributes:
        weights: trained and frozen ones, and buffers.
        gradients: of the trained ones.
        optimizer: its state.
        versions: the older versions of the trained weights that mini-batches in flight need.
        activations: what was saved for the backward of each mini-batch in flight.
    """

    weights: int
    gradients: int
    optimizer: int
    versions: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{field.name} {in_words(getattr(self, field.name))}" for field in fields(self))
        return f"{in_words(self.total)} ({parts})"


@dataclass(frozen=True)
class MemoryNeeds:
    """How much memory the stages of a pipeline need.

    Attributes:
        schedule: says what is in flight where, and how many versions live.
        num_stages: p.
        state_multiple: the optimizer's state, in multiples of the trained weights.
        limit: bytes that a stage may take; None for any.
        num_batches: that the schedule's plan is for.
    """

    schedule: Schedule
    num_stages: int
    state_multiple: float = ADAM
    limit: int | None = None
    num_batches: int = sys.maxsize

    def of(self, stage: int, held: Held) -> StageMemory:
        """What a stage needs that holds this."""
        return StageMemory(
            weights=held.trained + held.frozen,
            gradients=held.trained,
            optimizer=round(self.state_multiple * held.trained),
            versions=(self.schedule.live_versions(stage, self.num_stages) - 1) * held.trained,
            activations=self.in_flight(stage) * held.saved,
        )

    def in_flight(self, stage: int) -> int:
        """The mini-batches, or micro-batches, that a stage has forwarded and not yet backwarded, at most."""
        return self.schedule.in_flight(stage, self.num_stages, self.num_batches)

    def of_all(self, costs: Costs, starts: Sequence[int]) -> list[StageMemory]:
        """What each stage needs if stages 1 … p − 1 begin at these positions."""
        ends = pairwise([0, *starts, len(costs.blocks)])
        return [self.of(stage, costs.held(begin, end)) for stage, (begin, end) in enumerate(ends)]

    def balanced_starts(self, costs: Costs) -> list[int]:
        """Where stages 1 … p − 1 begin: see `balance`; each stage within the limit.

        Raises:
            CutError: if there are too few blocks, or no cut is within the limit.
        """
        size = cache(lambda stage, begin, end: self.of(stage, costs.held(begin, end)).total)
        limit = self.limit
        fits = None if limit is None else lambda *place: size(*place) <= limit
        starts = balanced_starts(costs.to_balance, self.num_stages, fits)
        if starts is None:
            self.require_within(costs, least_largest(len(costs.blocks), self.num_stages, size), "the best cut there is")
            raise AssertionError
        return starts

    def require_within(self, costs: Costs, starts: Sequence[int], which: str) -> None:
        """Every stage must be within the limit.

        Raises:
            CutError: if one is not; the message tells what each stage needs.
        """
        found = self.of_all(costs, starts)
        if self.limit is None or max(each.total for each in found) <= self.limit:
            return
        cut = ", ".join(costs.blocks[start].name for start in starts) or "nowhere"
        stages = "".join(f"\n  stage {stage}: {each}" for stage, each in enumerate(found))
        raise CutError(
            f"memory_limit={in_words(self.limit)} per stage: {which} ({cut}) needs"
            f" {in_words(max(each.total for each in found))}:{stages}\nRaise the limit, take more `devices` or a"
            " smaller batch, checkpoint activations inside the blocks, or let several mini-batches share an update"
            " (`accumulate_grad_batches` of p - 1 or more leaves two versions of the weights)."
        )
