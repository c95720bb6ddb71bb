"""The split is the best there is: compared with all others."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_cpipe.balance.split import balanced_starts
from lightning_cpipe.errors import CutError


def stage_costs(costs: Sequence[float], starts: Sequence[int]) -> list[float]:
    return [sum(costs[begin:end]) for begin, end in itertools.pairwise([0, *starts, len(costs)])]


def best_by_trying(costs: Sequence[float], num_stages: int) -> list[int]:
    """Least cost of the slowest stage; of those the least sum of squares; of those the earliest."""

    def rank(starts: tuple[int, ...]) -> tuple[float, float, tuple[int, ...]]:
        made = stage_costs(costs, starts)
        return max(made), sum(cost**2 for cost in made), starts

    return list(min(itertools.combinations(range(1, len(costs)), num_stages - 1), key=rank))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_it_is_the_best_of_all_splits(data: st.DataObject) -> None:
    costs = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=8))
    num_stages = data.draw(st.integers(1, len(costs)))
    starts = balanced_starts(costs, num_stages)
    assert starts == sorted(set(starts))
    best = best_by_trying(costs, num_stages)
    assert max(stage_costs(costs, starts)) == max(stage_costs(costs, best))
    assert sum(cost**2 for cost in stage_costs(costs, starts)) == sum(cost**2 for cost in stage_costs(costs, best))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(1e-3, 1e9), min_size=2, max_size=8), st.integers(2, 4))
def test_fractions_do_no_harm(costs: list[float], num_stages: int) -> None:
    num_stages = min(num_stages, len(costs))
    slowest = max(stage_costs(costs, balanced_starts(costs, num_stages)))
    assert slowest == pytest.approx(max(stage_costs(costs, best_by_trying(costs, num_stages))))


@pytest.mark.parametrize(
    ("costs", "num_stages", "starts"),
    [
        ([1, 1, 1, 1], 1, []),
        ([1, 1, 1, 1], 2, [2]),
        ([1, 1, 1, 1], 4, [1, 2, 3]),
        ([9, 1, 1, 1], 2, [1]),
        ([1, 1, 1, 9], 2, [3]),
        # The last block is the slowest stage whatever is done; the others are balanced all the same.
        ([1, 1, 1, 1, 9], 3, [2, 4]),
        ([0, 0, 0], 3, [1, 2]),
    ],
)
def test_known_splits(costs: list[float], num_stages: int, starts: list[int]) -> None:
    assert balanced_starts(costs, num_stages) == starts


def test_fewer_blocks_than_stages_are_refused() -> None:
    with pytest.raises(CutError, match=r"2 blocks can't make 3 stages.*Lower `num_stages`.* to 2.*`split_points`"):
        balanced_starts([1.0, 2.0], 3)


def test_many_blocks_and_stages_take_no_time() -> None:
    assert len(balanced_starts([1.0] * 200, 16)) == 15
