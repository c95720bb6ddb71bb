"""Random scopes of `stage/randomness.py`: what is drawn inside follows from the seed alone, and leaves no trace."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch

from lightning_cpipe.stage import randomness
from lightning_cpipe.stage.randomness import (
    SeededScope,
    Stream,
    derived_seed,
    get_state,
    get_torch_state,
    same_state,
    seeded,
    set_state,
    set_torch_state,
    unchanged,
)


def draw() -> list[float]:
    """Numbers from each generator; normal ones in pairs, as NumPy makes them."""
    return [float(torch.rand(())), np.random.rand(), *np.random.randn(2), random.random(), random.gauss(0, 1)]


def stream() -> AbstractContextManager[None]:
    with seeded(3):
        return Stream(get_state())()


SCOPES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "seeded": lambda: seeded(3),
    "SeededScope": lambda: SeededScope()(3),
    "Stream": stream,
    "unchanged": unchanged,
}


@pytest.mark.parametrize("name", SCOPES)
def test_outside_nothing_was_drawn(name: str) -> None:
    scope, before = SCOPES[name](), get_state()
    with scope:
        draw()
    assert same_state(before, get_state())


@pytest.mark.parametrize("name", SCOPES)
def test_outside_nothing_was_drawn_after_an_error(name: str) -> None:
    scope, before = SCOPES[name](), get_state()

    def fail() -> None:
        with scope:
            draw()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert same_state(before, get_state())


@pytest.mark.parametrize("inner", SCOPES)
@pytest.mark.parametrize("outer", ["seeded", "SeededScope", "Stream"])
def test_scopes_may_be_nested(outer: str, inner: str) -> None:
    with SCOPES[outer]():
        expected = [draw(), draw()]
    with SCOPES[outer]():
        found = [draw()]
        with SCOPES[inner]():
            draw()
        found.append(draw())
    assert found == expected


@pytest.mark.parametrize("name", ["seeded", "SeededScope", "Stream"])
def test_what_is_drawn_follows_from_the_seed(name: str) -> None:
    found = []
    for _ in range(2):
        draw()
        with SCOPES[name]():
            found.append([draw(), draw()])
    assert found[0] == found[1]


def test_both_ways_to_seed_are_one() -> None:
    scope, found = SeededScope(), []
    for seed in (5, 2**62 + 5, 5):
        with seeded(seed):
            one = [draw(), draw()]
        with scope(seed):
            found.append([draw(), draw()])
        assert found[-1] == one
    assert found[0] == found[2] != found[1]


def test_a_scope_may_be_used_within_itself() -> None:
    scope = SeededScope()
    with scope(1):
        first = draw()
        with scope(2):
            second = draw()
        third = draw()
    with scope(1):
        assert [draw(), draw()] == [first, third]
    with scope(2):
        assert draw() == second


def test_a_stream_goes_on_where_it_was() -> None:
    with seeded(3):
        state = get_state()
        expected = [draw() for _ in range(3)]
    used = Stream(state)
    found = []
    for _ in range(3):
        draw()
        with used():
            found.append(draw())
    assert found == expected


def test_a_stream_goes_on_after_an_error() -> None:
    with seeded(3):
        state = get_state()
        expected = [draw() for _ in range(2)]
    used = Stream(state)

    def fail() -> None:
        with used():
            assert draw() == expected[0]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with used():
        assert draw() == expected[1]


def test_derived_seeds_are_the_same_on_every_machine() -> None:
    """Else a run could not be repeated elsewhere, nor resumed by a later version."""
    assert derived_seed(1, "mini-batch", 2) == 4279108683978656623
    assert derived_seed("net.0") == 7176454941913949953


def test_half_a_pair_of_numpy_s_normal_numbers_is_lost() -> None:
    """On every rank alike: each use of a stream begins without it."""
    with seeded(3):
        state = get_state()
        expected = np.random.randn(4).tolist()
    used = Stream(state)
    with used():
        assert np.random.randn() == expected[0]
    with used():
        assert np.random.randn() == expected[2]


def test_derived_seeds_differ() -> None:
    parts = [(), (0,), (1,), ("1",), (1, 2), (12,), ("a", "b"), ("ab",), (1, "a"), ((1, "a"),)]
    assert len({derived_seed(*each) for each in parts}) == len(parts)


def test_derived_seeds_suit_every_generator() -> None:
    seeds = [derived_seed(number) for number in range(300)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62
    for seed in seeds[:3]:
        with seeded(seed):
            draw()


@pytest.mark.parametrize(
    "use",
    [lambda: torch.rand(1), lambda: np.random.rand(), lambda: random.random()],
    ids=["torch", "numpy", "python"],
)
def test_a_single_draw_is_noticed(use: Callable[[], Any]) -> None:
    before = get_state()
    assert same_state(before, get_state())
    use()
    assert not same_state(before, get_state())
    set_state(before)
    assert same_state(before, get_state())


def test_accelerators_are_seeded_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another generator stands for that of a GPU."""
    device = torch.Generator().manual_seed(1)
    monkeypatch.setattr(randomness, "_cuda_generators", lambda: [device])
    before, torch_before = get_state(), get_torch_state()
    found = []
    for _ in range(2):
        with SeededScope()(3):
            found.append(torch.rand(2, generator=device).tolist())
        assert same_state(before, get_state())
    assert found[0] == found[1]
    torch.rand(2, generator=device)
    assert not same_state(before, get_state())
    set_torch_state(torch_before)
    assert same_state(before, get_state())
