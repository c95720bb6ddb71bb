"""Which stages a rank holds, where there are more stages than ranks. Rank 0 always holds the last one."""

from __future__ import annotations

from lightning_cpipe.errors import PlanError
from lightning_cpipe.schedules.plan import Held


def neighbouring(num_stages: int, per_rank: int) -> Held:
    """`per_rank` stages in a row on each rank, ``(0, 1), (2, 3)``: little crosses between processes.

    Raises:
        PlanError: if `per_rank` does not divide `num_stages`.
    """
    ranks = range(_ranks(num_stages, per_rank))
    return tuple(tuple(range(line * per_rank, (line + 1) * per_rank)) for line in ranks)


def interleaved(num_stages: int, per_rank: int) -> Held:
    """Every R-th stage on one of R ranks, ``(0, 2), (1, 3)``: the pipeline fills faster, and more crosses.

    Raises:
        PlanError: if `per_rank` does not divide `num_stages`.
    """
    ranks = _ranks(num_stages, per_rank)
    return tuple(tuple(range(line, num_stages, ranks)) for line in range(ranks))


def _ranks(num_stages: int, per_rank: int) -> int:
    ranks, left_over = divmod(num_stages, per_rank)
    if left_over:
        raise PlanError(
            f"{num_stages} stages do not go into ranks of {per_rank}: the number of stages must be a multiple of the"
            f" stages per rank, for example {per_rank * max(1, ranks)} or {per_rank * (ranks + 1)}."
        )
    return ranks
