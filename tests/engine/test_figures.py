"""A stage's figures are sums, from which idle time, its share and what is left over follow."""

from __future__ import annotations

import time

import pytest

from lightning_cpipe.engine.figures import Bookkeeper, StageFigures
from lightning_cpipe.engine.timeline import (
    BACKWARD,
    FORWARD,
    KINDS,
    OTHER,
    UPDATE,
    WAIT_ACTIVATION,
    WAIT_GRADIENT,
    Timeline,
)

SECOND = 10**9


def by_kind(**seconds: int) -> tuple[int, ...]:
    return tuple(seconds.get(kind, 0) * SECOND for kind in KINDS)


FIGURES = StageFigures(
    elapsed_ns=20 * SECOND,
    by_kind_ns=by_kind(forward=3, backward=6, update=1, wait_activation=4, wait_gradient=2),
    fill_ns=5 * SECOND,
    fill_idle_ns=3 * SECOND,
    backwards=9,
    delay=2,
    most_delay=3,
)


def test_seconds_are_told_by_kind_and_the_rest_is_other() -> None:
    assert FIGURES.seconds(FORWARD) == 3
    assert FIGURES.seconds(WAIT_GRADIENT) == 2
    assert FIGURES.seconds(OTHER) == 20 - 16
    assert sum(FIGURES.seconds(kind) for kind in (*KINDS, OTHER)) == 20


def test_idle_is_both_waits_and_in_the_steady_state_what_came_after_the_fill() -> None:
    assert FIGURES.idle_s == 6
    assert FIGURES.idle_ratio == 6 / 20
    assert FIGURES.steady_idle_ratio == (6 - 3) / (20 - 5)


def test_before_anything_has_happened_nothing_was_idle() -> None:
    nothing = StageFigures()
    assert nothing.idle_ratio == nothing.steady_idle_ratio == nothing.idle_s == 0
    assert StageFigures(elapsed_ns=5, fill_ns=5, fill_idle_ns=5).steady_idle_ratio == 0


def test_the_difference_of_two_moments_is_what_came_between() -> None:
    earlier = FIGURES._replace(
        elapsed_ns=8 * SECOND, by_kind_ns=by_kind(forward=1, backward=2, wait_activation=4), backwards=4, delay=3
    )
    since = FIGURES.since(earlier)
    assert since.elapsed_ns == 12 * SECOND
    assert since.by_kind_ns == by_kind(forward=2, backward=4, update=1, wait_gradient=2)
    assert since.backwards == 5
    assert (since.fill_ns, since.fill_idle_ns) == (0, 0)
    assert (since.delay, since.most_delay) == (2, 3)
    assert since.steady_idle_ratio == 2 / 12
    assert FIGURES.since(StageFigures()) == FIGURES


def test_the_books_begin_with_training_and_remember_the_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0]
    monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0])
    timeline = Timeline()

    def spend(kind: str, seconds: int) -> None:
        with timeline.measure(kind, 0):
            now[0] += seconds * SECOND

    spend(FORWARD, 100)
    books = Bookkeeper(timeline)
    spend(WAIT_ACTIVATION, 50)
    books.begin()
    assert books.figures() == StageFigures()

    spend(FORWARD, 2)
    spend(WAIT_ACTIVATION, 3)
    spend(BACKWARD, 4)
    books.backward_begins(delay=0)
    first = books.figures()
    assert (first.elapsed_ns, first.fill_ns, first.fill_idle_ns) == (9 * SECOND, 9 * SECOND, 3 * SECOND)
    assert first.by_kind_ns == by_kind(forward=2, wait_activation=3, backward=4)

    spend(UPDATE, 1)
    spend(WAIT_GRADIENT, 2)
    now[0] += 7 * SECOND
    books.backward_begins(delay=3)
    books.backward_begins(delay=1)
    later = books.figures()
    assert (later.fill_ns, later.fill_idle_ns) == (first.fill_ns, first.fill_idle_ns)
    assert (later.backwards, later.delay, later.most_delay) == (3, 1, 3)
    assert later.seconds(OTHER) == 7
    assert later.idle_s == 5
    assert later.steady_idle_ratio == 2 / 10
