"""Which stages a rank holds, where there are more stages than ranks. Rank 0 always holds the last one."""

from __future__ import annotations

from collections.abc import Iterable

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


def stages_of(rank: int, held: Held) -> tuple[int, ...]:
    """The stages that a rank holds. Rank 0 holds the last one.

    Loss, metrics, progress bar and loggers are born on the last stage, and Lightning does all of that on rank 0. The
    last stage is also the first to finish a local step, so what rank 0 says comes in time for everyone.
    """
    return held[-1 - rank % len(held)]


def rank_of(stage: int, held: Held) -> int:
    """The rank that holds a stage."""
    return next(rank for rank in range(len(held)) if stage in stages_of(rank, held))


def places_of(stages: Iterable[int]) -> list[tuple[int, ...]]:
    """The places of a rank that holds these stages, in order: neighbours have one together."""
    places: list[tuple[int, ...]] = []
    for stage in sorted(stages):
        if places and stage == places[-1][-1] + 1:
            places[-1] = (*places[-1], stage)
        else:
            places.append((stage,))
    return places


def in_words(stages: Iterable[int]) -> str:
    """For a reader: ``0``, ``0-2`` or ``0, 3``."""
    return ", ".join(str(each[0]) if len(each) == 1 else f"{each[0]}-{each[-1]}" for each in places_of(stages))


def _ranks(num_stages: int, per_rank: int) -> int:
    ranks, left_over = divmod(num_stages, per_rank)
    if left_over:
        raise PlanError(
            f"{num_stages} stages do not go into ranks of {per_rank}: the number of stages must be a multiple of the"
            f" stages per rank, for example {per_rank * max(1, ranks)} or {per_rank * (ranks + 1)}."
        )
    return ranks
