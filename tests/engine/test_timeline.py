"""A stage's time is noted span by span, summed whatever is kept, and on a GPU read without waiting for it."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from lightning_cpipe.engine.timeline import (
    BACKWARD,
    DATA,
    EVALUATION,
    FORWARD,
    IDLE,
    KINDS,
    LEFT_OUT,
    OF_EVALUATION,
    UPDATE,
    WAIT_ACTIVATION,
    WAIT_DECISION,
    WAIT_EVALUATION,
    WAIT_GRADIENT,
    CudaTimeline,
    Span,
    Timeline,
)


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000
        monkeypatch.setattr(time, "perf_counter_ns", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def run(timeline: Timeline, clock: Clock, *spans: tuple[str, int, int]) -> None:
    """Let spans of these kinds, mini-batches and lengths pass."""
    for kind, batch, length in spans:
        with timeline.measure(kind, batch):
            clock.now += length


def test_a_span_is_noted_with_its_kind_and_its_mini_batch(clock: Clock) -> None:
    timeline = Timeline()
    run(timeline, clock, (WAIT_ACTIVATION, 3, 5), (FORWARD, 3, 20), (BACKWARD, 0, 40))
    assert timeline.spans == [
        Span(WAIT_ACTIVATION, 3, 1_000, 1_005),
        Span(FORWARD, 3, 1_005, 1_025),
        Span(BACKWARD, 0, 1_025, 1_065),
    ]
    assert timeline.start_ns == 1_000


def test_the_sums_hold_every_span_and_the_list_the_first_and_the_last(clock: Clock) -> None:
    timeline = Timeline(keep=3)
    run(timeline, clock, *((FORWARD, batch, 10) for batch in range(6)))
    assert [span.batch for span in timeline.spans] == [0, 1, 2, 3, 4, 5]
    run(timeline, clock, *((FORWARD, batch, 10) for batch in range(6, 10)))
    assert timeline.sums_ns == {**dict.fromkeys(KINDS, 0), FORWARD: 100}
    assert [span.batch for span in timeline.spans if span.kind == FORWARD] == [0, 1, 2, 7, 8, 9]
    # What was not kept is told of: mini-batches 3 to 6.
    assert timeline.spans[3] == Span(LEFT_OUT, 2, 1_030, 1_070)


def test_the_sums_given_out_do_not_change(clock: Clock) -> None:
    timeline = Timeline()
    before = timeline.sums_ns
    run(timeline, clock, (DATA, 0, 10))
    assert before[DATA] == 0
    assert timeline.sums_ns[DATA] == 10


def test_an_update_ends_in_another_function_than_it_began(clock: Clock) -> None:
    timeline = Timeline()
    timeline.end_update()
    assert timeline.spans == []
    timeline.begin_update(4)
    clock.now += 7
    timeline.end_update()
    timeline.end_update()
    assert timeline.spans == [Span(UPDATE, 4, 1_000, 1_007)]


def test_what_a_stage_is_at_is_known_while_it_is_at_it(clock: Clock) -> None:
    told: list[int] = []
    timeline = Timeline(tell=told.append)
    assert timeline.now_at is None
    with timeline.measure(WAIT_GRADIENT, 2):
        assert timeline.now_at == (WAIT_GRADIENT, 2)
    timeline.begin_update(2)
    assert timeline.now_at == (UPDATE, 2)
    assert told == [2, 2]


def test_a_span_that_ends_with_an_error_is_noted_too(clock: Clock) -> None:
    timeline = Timeline()

    def fail() -> None:
        with timeline.measure(FORWARD, 1):
            clock.now += 3
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert timeline.spans == [Span(FORWARD, 1, 1_000, 1_003)]
    assert timeline.now_at == (FORWARD, 1)


def test_idle_is_waiting_for_a_neighbour_and_nothing_else() -> None:
    assert set(IDLE) == {WAIT_ACTIVATION, WAIT_GRADIENT, WAIT_DECISION}
    assert set(IDLE) < set(KINDS)
    assert set(OF_EVALUATION) < set(KINDS) - set(IDLE)


VALIDATED = (
    (FORWARD, 0, 10), (WAIT_GRADIENT, 0, 1), (BACKWARD, 0, 20), (WAIT_EVALUATION, 0, 3), (EVALUATION, 0, 7),
    (EVALUATION, 1, 7), (WAIT_ACTIVATION, 1, 2), (FORWARD, 1, 10), (WAIT_GRADIENT, 1, 5), (BACKWARD, 1, 20),
    (WAIT_GRADIENT, 2, 1), (BACKWARD, 2, 20), (EVALUATION, 0, 7),
)  # fmt: skip


def test_what_an_evaluation_makes_a_stage_wait_for_is_its_own_until_the_next_backward(clock: Clock) -> None:
    """It was idle time of training's."""
    timeline = Timeline()
    run(timeline, clock, *VALIDATED)
    assert [timeline.sums_ns[kind] for kind in (WAIT_EVALUATION, WAIT_ACTIVATION, WAIT_GRADIENT)] == [3 + 2 + 5, 0, 2]
    assert timeline.evaluations == 2
    timeline.begin_training()
    run(timeline, clock, (WAIT_ACTIVATION, 0, 9))
    assert timeline.sums_ns[WAIT_ACTIVATION] == 9


def test_where_every_mini_batch_begins_with_an_empty_pipeline_it_waits_for_that(clock: Clock) -> None:
    timeline = Timeline(flows_on=False)
    run(timeline, clock, *VALIDATED)
    assert [timeline.sums_ns[kind] for kind in (WAIT_EVALUATION, WAIT_ACTIVATION, WAIT_GRADIENT)] == [3, 2, 7]


class Gpu:
    """A stream that passes events when it is told to. Its clock shows milliseconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.passed = 0.0
        self.synchronised = 0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.now

            def query(self) -> bool:
                return self.at <= gpu.passed

            def elapsed_time(self, later: Any) -> float:
                return later.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self)

    def synchronize(self) -> None:
        self.synchronised += 1
        self.passed = self.now


def test_on_a_gpu_a_span_is_read_once_the_stream_has_passed_it(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    gpu = Gpu(monkeypatch)
    timeline = CudaTimeline()

    def run(kind: str, batch: int, length: float) -> None:
        with timeline.measure(kind, batch):
            gpu.now += length

    run(FORWARD, 0, 1.0)
    run(BACKWARD, 0, 2.0)
    assert timeline.spans == []
    gpu.passed = 1.5
    timeline.begin_update(0)
    gpu.now += 0.25
    timeline.end_update()
    timeline.end_update()
    run(FORWARD, 1, 1.0)
    assert timeline.spans == [Span(FORWARD, 0, 1_000, 1_001_000)]
    assert gpu.synchronised == 0
    timeline.settle()
    assert gpu.synchronised == 1
    assert timeline.spans == [
        Span(FORWARD, 0, 1_000, 1_001_000),
        Span(BACKWARD, 0, 1_001_000, 3_001_000),
        Span(UPDATE, 0, 3_001_000, 3_251_000),
        Span(FORWARD, 1, 3_251_000, 4_251_000),
    ]
    assert timeline.sums_ns[BACKWARD] == 2_000_000
    assert timeline.now_at == (FORWARD, 1)
