"""What a stage needs is the sum that the schedule promises, and cuts within a limit are the best of all."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_cpipe.balance.costs import CLEAR_S, BlockCost, Costs, Held
from lightning_cpipe.balance.memory import MemoryNeeds, StageMemory, bytes_of, in_words, state_multiple
from lightning_cpipe.errors import CutError
from lightning_cpipe.schedules.continuous import Continuous


def costs_of(rows: Sequence[tuple[int, int, int]]) -> Costs:
    """Blocks of so many operations, bytes of trained weights and bytes of saved activations."""
    return Costs(
        tuple(
            BlockCost(f"net.{i}", operations, trained={f"w{i}": trained}, saved={f"a{i}": saved})
            for i, (operations, trained, saved) in enumerate(rows)
        )
    )


def test_a_stage_keeps_versions_and_what_is_in_flight() -> None:
    needs = MemoryNeeds(Continuous(), num_stages=4, state_multiple=2.0)
    held = Held(trained=100, frozen=30, saved=7)
    assert needs.of(0, held) == StageMemory(130, 100, 200, 3 * 100, 4 * 7)
    assert needs.of(2, held) == StageMemory(130, 100, 200, 100, 2 * 7)
    assert needs.of(3, held) == StageMemory(130, 100, 200, 0, 7)
    assert needs.of(3, held).total == 437


def test_accumulation_saves_versions_and_extra_in_flight_costs_activations() -> None:
    held = Held(100, 0, 7)
    accumulating = MemoryNeeds(Continuous(accumulate=3), 4).of(0, held)
    assert (accumulating.versions, accumulating.activations) == (100, 28)
    ahead = MemoryNeeds(Continuous(extra_in_flight=1), 4).of(0, held)
    assert (ahead.versions, ahead.activations) == (600, 49)


def slowest(costs: Costs, starts: Sequence[int]) -> tuple[float, float]:
    stages = [sum(costs.to_balance[a:b]) for a, b in itertools.pairwise([0, *starts, len(costs.blocks)])]
    return max(stages), sum(stage**2 for stage in stages)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_within_a_limit_it_is_the_best_of_all_splits(data: st.DataObject) -> None:
    row = st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
    costs = costs_of(data.draw(st.lists(row, min_size=1, max_size=7)))
    p = data.draw(st.integers(1, len(costs.blocks)))
    schedule = Continuous(data.draw(st.integers(0, 1)), data.draw(st.integers(1, 3)))
    needs = MemoryNeeds(schedule, p, data.draw(st.sampled_from([0.0, 1.0, 2.0])), data.draw(st.integers(1, 200)))
    every = [list(starts) for starts in itertools.combinations(range(1, len(costs.blocks)), p - 1)]
    fitting = [starts for starts in every if all(each.total <= needs.limit for each in needs.of_all(costs, starts))]
    if not fitting:
        least = min(max(each.total for each in needs.of_all(costs, starts)) for starts in every)
        with pytest.raises(CutError, match=rf"needs {in_words(least)}:"):
            needs.balanced_starts(costs)
        return
    found = needs.balanced_starts(costs)
    assert found in fitting
    assert slowest(costs, found) == min(slowest(costs, starts) for starts in fitting)


def test_a_limit_moves_work_to_later_stages() -> None:
    costs = costs_of([(10, 0, 10)] * 8)
    free = MemoryNeeds(Continuous(), 4)
    assert free.balanced_starts(costs) == [2, 4, 6]
    assert [each.total for each in free.of_all(costs, [2, 4, 6])] == [80, 60, 40, 20]
    limited = MemoryNeeds(Continuous(), 4, limit=60)
    assert limited.balanced_starts(costs) == [1, 3, 5]
    assert MemoryNeeds(Continuous(), 4, limit=40).balanced_starts(costs) == [1, 2, 4]


def test_if_nothing_fits_it_says_what_each_stage_needs_and_what_to_do() -> None:
    costs = costs_of([(1, 1000, 500)] * 2)
    needs = MemoryNeeds(Continuous(), 2, limit=4000)
    with pytest.raises(CutError) as raised:
        needs.balanced_starts(costs)
    said = str(raised.value)
    for part in (
        "memory_limit=4 kB per stage: the best cut there is (net.1)",
        "needs 6 kB",
        "stage 0: 6 kB (weights 1 kB, gradients 1 kB, optimizer 2 kB, versions 1 kB, activations 1 kB)",
        "stage 1: 4.5 kB (weights 1 kB",
        "accumulate_grad_batches",
    ):
        assert part in said, said


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("16GB", 16 * 10**9),
        ("16 gib", 16 * 2**30),
        ("1.5MB", 1_500_000),
        ("512", 512),
        (512, 512),
        ("3kB", 3000),
        ("2TiB", 2**41),
        ("7B", 7),
    ],
)
def test_amounts_are_read(text: str | int, amount: int) -> None:
    assert bytes_of(text) == amount


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0", 0, -5, "16XB", "GB", "1.5.2GB", True, 0.1, "1e9"])
def test_other_amounts_are_refused(text: str | int) -> None:
    with pytest.raises(ValueError, match="is no amount of memory: write '16GB'"):
        bytes_of(text)


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (999_600, "1 MB"), (16e9, "16 GB"), (1234e9, "1234 GB")],
)
def test_amounts_are_written(amount: float, text: str) -> None:
    assert in_words(amount) == text


class Users(torch.optim.Optimizer):
    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__(parameters, {})


class UsersAdam(torch.optim.Adam):
    pass


@pytest.mark.parametrize(
    ("make", "multiple"),
    [
        (torch.optim.SGD, 0),
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), 1),
        (torch.optim.Adam, 2),
        (torch.optim.AdamW, 2),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), 3),
        (torch.optim.NAdam, 2),
        (torch.optim.RAdam, 2),
        (torch.optim.Adamax, 2),
        (torch.optim.Adagrad, 1),
        (torch.optim.Adadelta, 2),
        (torch.optim.RMSprop, 1),
        (lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True), 3),
        (torch.optim.Rprop, 2),
        (torch.optim.ASGD, 1),
        (UsersAdam, 2),
    ],
)
def test_an_optimizers_state_is_what_it_keeps_after_a_step(make: object, multiple: int) -> None:
    weight = torch.nn.Parameter(torch.ones(8, 8))
    optimizer = make([weight])
    assert state_multiple(optimizer) == multiple
    weight.grad = torch.ones(8, 8)
    optimizer.step()
    assert sum(tensor.shape == weight.shape for tensor in optimizer.state[weight].values()) == multiple


def test_of_an_unknown_optimizer_as_much_as_adams_is_assumed() -> None:
    assert state_multiple(Users([torch.nn.Parameter(torch.ones(1))])) == 2


def test_quick_blocks_are_balanced_by_operations() -> None:
    def costs(seconds: float) -> Costs:
        return Costs((BlockCost("a", 1.0, seconds, seconds), BlockCost("b", 9.0, seconds, 2 * seconds)))

    assert costs(0.3 * CLEAR_S).to_balance == [1.0, 9.0]
    assert costs(CLEAR_S).to_balance == [2 * CLEAR_S, 3 * CLEAR_S]
    assert not costs(0.0).timed
