"""Splits a chain of blocks into stages so that the slowest stage is as fast as it can be.

The exact optimum by dynamic programming.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from itertools import accumulate

from lightning_cpipe.errors import CutError

Cost = Callable[[int, int, int], float]
"""Of stage s if it holds the blocks from ``begin`` up to ``end``: ``cost(s, begin, end)``. More blocks cost no less."""


def balanced_starts(
    costs: Sequence[float], num_stages: int, fits: Callable[[int, int, int], bool] | None = None
) -> list[int] | None:
    """Where stages 1 … p − 1 begin.

    Among the splits with the least cost of the slowest stage, the one with the least sum of squares is taken, so that
    the other stages are balanced too; among those, the one that cuts earliest.

    Args:
        costs: of each block, in any unit.
        num_stages: p.
        fits: whether a stage may hold the blocks from one position up to another: ``fits(stage, begin, end)``. What
            does not fit does not fit with more blocks either. None if all fit.

    Returns:
        ``p - 1`` positions in `costs`, ascending; None if in no split every stage fits.

    Raises:
        CutError: if there are fewer blocks than stages.
    """
    if len(costs) < num_stages:
        raise CutError(
            f"{len(costs)} blocks can't make {num_stages} stages: a stage needs at least one. Lower `num_stages` (or"
            f" `devices`) to {len(costs)}, or name finer places to cut with `split_points`."
        )
    before = [0.0, *accumulate(costs)]

    def cost(stage: int, begin: int, end: int) -> float:
        return before[end] - before[begin] if fits is None or fits(stage, begin, end) else math.inf

    # Where everything fits, there is always a split whose slowest stage takes no more than this, so worse ones need
    # not be looked at.
    at_most = sum(costs) / num_stages + max(costs) if fits is None else math.inf
    slowest, _ = _best(len(costs), num_stages, cost, max, at_most)
    if slowest == math.inf:
        return None
    _, starts = _best(len(costs), num_stages, lambda *place: cost(*place) ** 2, operator.add, slowest**2)
    return starts


def least_largest(num_blocks: int, num_stages: int, cost: Cost) -> list[int]:
    """Where stages 1 … p − 1 begin so that the largest cost of a stage is least, whatever the place costs there."""
    return _best(num_blocks, num_stages, cost, max, math.inf)[1]


def _best(
    num_blocks: int, num_stages: int, cost: Cost, combine: Callable[[float, float], float], limit: float
) -> tuple[float, list[int]]:
    """The best combined cost of a split whose stages each cost at most `limit`, and where its stages begin."""
    # best[k][n]: the best combined cost of the first n blocks in k stages, and where the last of them begins.
    best: list[list[tuple[float, int]]] = [[(0.0, 0) if n == 0 else (math.inf, 0) for n in range(num_blocks + 1)]]
    for stage in range(1, num_stages + 1):
        row = [(math.inf, 0)] * (num_blocks + 1)
        for end in range(stage, num_blocks + 1):
            for begin in reversed(range(stage - 1, end)):
                here = cost(stage - 1, begin, end)
                if here == math.inf or here > limit * (1 + 1e-12):
                    break
                row[end] = min(row[end], (combine(best[-1][begin][0], here), begin))
        best.append(row)
    starts = []
    end = num_blocks
    for stage in range(num_stages, 1, -1):
        end = best[stage][end][1]
        starts.append(end)
    return best[num_stages][num_blocks][0], starts[::-1]
