"""Rank 0 holds the last stages."""

from __future__ import annotations

import pytest

from lightning_cpipe.schedules.placement import in_words, neighbouring, rank_of, stages_of


@pytest.mark.parametrize(("per_rank", "on_ranks"), [(1, [(3,), (2,), (1,), (0,)]), (2, [(2, 3), (0, 1)])])
def test_the_stages_of_a_rank_and_the_rank_of_a_stage(per_rank: int, on_ranks: list[tuple[int, ...]]) -> None:
    held = neighbouring(4, per_rank)
    assert [stages_of(rank, held) for rank in range(len(on_ranks))] == on_ranks
    for rank, stages in enumerate(on_ranks):
        assert [rank_of(stage, held) for stage in stages] == [rank] * len(stages)


def test_stages_in_words() -> None:
    assert [in_words([3]), in_words([2, 0, 1]), in_words([0, 1, 3]), in_words([])] == ["3", "0-2", "0-1, 3", ""]
