"""What each block of a module costs: time, and memory.

A block's costs include those of what lies between it and the next one; what comes before the first block counts to the
first. In memory, what several blocks hold counts once in a stage that has them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

CLEAR_S = 2e-3
"""Seconds. Blocks that take less on average are too quick to be told apart by the clock: the next look would find other
times, and other cuts. They are balanced by what they compute."""


@dataclass(frozen=True)
class BlockCost:
    """What one block costs.

    Attributes:
        name: of the module.
        operations: floating-point operations of its forward, and one for each weight, for its update.
        forward_s: seconds of its forward; 0 where no time was taken.
        backward_s: seconds of its backward.
        trained: bytes of each parameter that is trained, by name.
        frozen: bytes of each other parameter and buffer, by name.
        saved: bytes of each tensor that is kept for the backward; tensors are numbered through all blocks.
        output: bytes of what the module returns.
    """

    name: str
    operations: float
    forward_s: float = 0.0
    backward_s: float = 0.0
    trained: Mapping[str, int] = field(default_factory=dict)
    frozen: Mapping[str, int] = field(default_factory=dict)
    saved: Mapping[str, int] = field(default_factory=dict)
    output: int = 0

    @property
    def seconds(self) -> float:
        """Of both passes."""
        return self.forward_s + self.backward_s


class Held(NamedTuple):
    """The bytes that blocks hold together.

    Attributes:
        trained: parameters that are trained.
        frozen: other parameters, and buffers.
        saved: what one mini-batch leaves for its backward.
    """

    trained: int
    frozen: int
    saved: int


@dataclass(frozen=True)
class Costs:
    """What the blocks of a module cost, in the order of their calls."""

    blocks: tuple[BlockCost, ...]

    @property
    def timed(self) -> bool:
        """Whether there are times."""
        return any(block.seconds for block in self.blocks)

    @property
    def by_time(self) -> bool:
        """Whether the times are long enough to balance by; otherwise operations stand for them."""
        return sum(block.seconds for block in self.blocks) >= CLEAR_S * len(self.blocks)

    @property
    def to_balance(self) -> list[float]:
        """One number for each block: seconds, or operations."""
        return [block.seconds if self.by_time else block.operations for block in self.blocks]

    def held(self, begin: int, end: int) -> Held:
        """What the blocks from `begin` up to `end` hold together."""
        return self._held[begin][end - begin - 1]

    @cached_property
    def _held(self) -> list[list[Held]]:
        return [list(self._growing(begin)) for begin in range(len(self.blocks))]

    def _growing(self, begin: int) -> list[Held]:
        """What the blocks from `begin` on hold: one of them, two of them, …."""
        seen: tuple[dict[str, int], ...] = ({}, {}, {})
        totals = [0, 0, 0]
        found = []
        for block in self.blocks[begin:]:
            for kind, own in enumerate((block.trained, block.frozen, block.saved)):
                totals[kind] += sum(size - seen[kind].get(name, 0) for name, size in own.items())
                seen[kind].update(own)
            found.append(Held(*totals))
        return found
