"""The fetcher draws ahead what will be trained, counts its updates, and says so if the count turns out wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from lightning_cpipe.engine.timeline import Timeline
from lightning_cpipe.errors import PlanError
from lightning_cpipe.strategy.data.drawn import Drawn
from lightning_cpipe.strategy.data.fetcher import LookaheadFetcher


def fetcher(trainer: Any, batches: int, lag: int = 2) -> LookaheadFetcher:
    """In the trainer's first epoch, of so many batches; it draws `lag` + 2 ahead."""
    loader = CombinedLoader(DataLoader(torch.arange(batches), batch_size=1), "max_size_cycle")
    made = LookaheadFetcher(trainer, lag, 2, 0, None, Timeline(), crosses_epochs=True)
    loader.limits = [batches]
    made.setup(loader)
    iter(made)
    made.begin_epoch(0)
    return made


def trainer(**changes: Any) -> Any:
    """Stands for a Trainer at its beginning."""
    loop = SimpleNamespace(total_batch_idx=-1, _last_train_dl_reload_epoch=0)
    state = {
        "fit_loop": loop, "global_step": 0, "current_epoch": 0, "max_steps": -1, "max_epochs": 2,
        "accumulate_grad_batches": 1, "reload_dataloaders_every_n_epochs": 0,
    }  # fmt: skip
    return SimpleNamespace(**(state | changes))


def drawn_by(made: LookaheadFetcher, state: Any) -> list[Drawn]:
    """Everything that it hands out; `state` counts the updates that are made with it."""
    found = []
    while True:
        try:
            drawn = next(made)[0].drawn
        except StopIteration:
            return found
        found.append(drawn)
        state.global_step += drawn.is_last or (drawn.index + 1) % state.accumulate_grad_batches == 0
        state.current_epoch += drawn.is_last


def test_it_walks_through_the_epochs_and_no_further() -> None:
    state = trainer()
    found = drawn_by(fetcher(state, batches=3), state)
    assert [(each.epoch, each.index, each.is_last) for each in found] == [
        (epoch, index, index == 2) for epoch in range(2) for index in range(3)
    ]
    assert [each.number for each in found] == list(range(6))
    assert len({each.seed for each in found}) == 6


@pytest.mark.parametrize(
    ("accumulate", "steps_before"),
    [
        (1, [0, 1, 2, 3]),
        (2, [0, 0, 1, 1, 2, 3, 3]),
        (5, [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3]),
    ],
)
def test_it_stops_with_the_last_update_that_is_allowed(accumulate: int, steps_before: list[int]) -> None:
    """An epoch's last mini-batch makes one, too: here every fifth."""
    state = trainer(max_steps=4, accumulate_grad_batches=accumulate, max_epochs=9)
    found = drawn_by(fetcher(state, batches=5), state)
    assert [each.updates_before for each in found] == steps_before


def test_what_is_in_the_queue_is_counted_anew_when_an_epoch_begins() -> None:
    """It was counted for the set-up, before hooks changed how many mini-batches make an update."""
    state = trainer(max_steps=3)
    made = fetcher(state, batches=9)
    assert made.peek() is not None
    state.accumulate_grad_batches = 2
    made.begin_epoch(0)
    assert [each.updates_before for each in drawn_by(made, state)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("lag", [0, 2, 5])
def test_an_empty_epoch_is_walked_over_and_the_loop_finds_nothing_in_it(lag: int) -> None:
    """It was taken for the end of the data, by some stages, and then read a second time."""
    times: list[int] = []

    class Sometimes(IterableDataset[Any]):
        def __iter__(self) -> Any:
            times.append(len(times))
            return iter([[], torch.arange(2)][len(times) not in (2, 3)])

    state = trainer(max_epochs=5)
    made = LookaheadFetcher(state, lag, 2, 0, None, Timeline(), crosses_epochs=True)
    made.setup(CombinedLoader(DataLoader(Sometimes(), batch_size=1), "max_size_cycle"))
    found = []
    for epoch in range(5):
        state.current_epoch = epoch
        iter(made)
        made.begin_epoch(0)
        found += [(each.drawn.number, each.drawn.epoch) for each, _, _ in made]
    assert found == list(enumerate([0, 0, 3, 3, 4, 4]))
    assert len(times) == 5


def test_a_second_fit_goes_on_with_other_random_numbers() -> None:
    first, second = trainer(), trainer()
    second.fit_loop.total_batch_idx = 5
    seeds = [{each.seed for each in drawn_by(fetcher(state, batches=3), state)} for state in (first, second)]
    assert not seeds[0] & seeds[1]


def test_updates_that_will_never_come_are_not_waited_for() -> None:
    """Empty epochs followed each other for ever, and `max_steps` was never reached."""
    state = trainer(max_steps=6, max_epochs=-1)
    made = fetcher(state, batches=20)
    for done in range(4):
        next(made)
        state.global_step = done + 1
    state.accumulate_grad_batches = 2
    story = r"^\d optimizer steps were made where 6 were planned .* max_steps=6 would never be reached"
    with pytest.raises(PlanError, match=story):
        drawn_by(made, state)


def test_a_mini_batch_is_found_by_its_number_while_it_is_needed() -> None:
    made = fetcher(trainer(max_epochs=1), batches=9, lag=1)
    for number in range(5):
        next(made)
        found = [made.mini_batch(each) for each in range(number - 1, number + 6)]
        assert [None if each is None else each.number for each in found] == [
            None, *(each if each < min(9, number + 4) else None for each in range(number, number + 6))
        ]  # fmt: skip
