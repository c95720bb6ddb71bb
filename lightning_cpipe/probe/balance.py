"""Splits a chain of blocks into stages so that the slowest stage is as fast as it can be.

The exact optimum by dynamic programming.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from itertools import accumulate

from lightning_cpipe.errors import CutError


def balanced_starts(costs: Sequence[float], num_stages: int) -> list[int]:
    """Where stages 1 … p − 1 begin.

    Among the splits with the least cost of the slowest stage, the one with the least sum of squares is taken, so that
    the other stages are balanced too; among those, the one that cuts earliest.

    Args:
        costs: of each block, in any unit.
        num_stages: p.

    Returns:
        ``p - 1`` positions in `costs`, ascending.

    Raises:
        CutError: if there are fewer blocks than stages.
    """
    if len(costs) < num_stages:
        raise CutError(
            f"{len(costs)} blocks can't make {num_stages} stages: a stage needs at least one. Lower `num_stages` (or"
            f" `devices`) to {len(costs)}, or name finer places to cut with `split_points`."
        )
    before = [0.0, *accumulate(costs)]

    def cost(begin: int, end: int) -> float:
        return before[end] - before[begin]

    # There is always a split whose slowest stage takes no more than this, so worse ones need not be looked at.
    at_most = sum(costs) / num_stages + max(costs)
    slowest, _ = _best(len(costs), num_stages, cost, max, at_most)
    _, starts = _best(len(costs), num_stages, lambda begin, end: cost(begin, end) ** 2, operator.add, slowest**2)
    return starts


def _best(
    num_blocks: int,
    num_stages: int,
    cost: Callable[[int, int], float],
    combine: Callable[[float, float], float],
    limit: float,
) -> tuple[float, list[int]]:
    """The best combined cost of a split whose stages each cost at most `limit`, and where its stages begin."""
    # best[k][n]: the best combined cost of the first n blocks in k stages, and where the last of them begins.
    best: list[list[tuple[float, int]]] = [[(0.0, 0) if n == 0 else (math.inf, 0) for n in range(num_blocks + 1)]]
    for stage in range(1, num_stages + 1):
        row = [(math.inf, 0)] * (num_blocks + 1)
        for end in range(stage, num_blocks + 1):
            for begin in reversed(range(stage - 1, end)):
                here = cost(begin, end)
                if here > limit * (1 + 1e-12):
                    break
                row[end] = min(row[end], (combine(best[-1][begin][0], here), begin))
        best.append(row)
    starts = []
    end = num_blocks
    for stage in range(num_stages, 1, -1):
        end = best[stage][end][1]
        starts.append(end)
    return best[num_stages][num_blocks][0], starts[::-1]
