"""Plain modules with a chain of blocks, to be cut; most tests of the probe start from one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

WIDTH = 6


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


class Block(nn.Module):
    """(rows, 6) -> (rows, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = linear()

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Blocks(nn.Module):
    """A loss of a chain.

    Args:
        block: makes a block.
        depth: how many.
    """

    def __init__(self, block: Callable[[], nn.Module] = Block, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the first block makes, and what the last one does."""
        late = early = self.blocks[0](x)
        for block in self.blocks[1:]:
            late = block(late)
        return early, late

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.body(x), y)


def batches(*shifts: float, rows: int = 4) -> list[tuple[Tensor, Tensor]]:
    """A batch for each of these means of its input."""
    return [(torch.randn(rows, WIDTH) + shift, torch.randn(rows, WIDTH)) for shift in shifts]
