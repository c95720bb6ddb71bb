"""What a stage tells of itself: sums of its time, and the delay it measured.

The figures of all stages ride beside the activations to the last one, which holds rank 0. They are sums, so none is
lost if one is not looked at.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from lightning_cpipe.engine.timeline import (
    BACKWARD,
    FORWARD,
    IDLE,
    KINDS,
    OF_EVALUATION,
    OTHER,
    WAIT_EVALUATION,
    Timeline,
)


class StageFigures(NamedTuple):
    """One stage at one moment.

    Attributes:
        elapsed_ns: since training began.
        by_kind_ns: in the order of `KINDS`.
        fill_ns: how much of `elapsed_ns` came before the first gradient.
        fill_idle_ns: how much of that was idle.
        backwards: mini-batches backwarded.
        delay: of the last backward, in updates.
        most_delay: the largest of all backwards.
        evaluations: how many there were.
    """

    elapsed_ns: int = 0
    by_kind_ns: tuple[int, ...] = (0,) * len(KINDS)
    fill_ns: int = 0
    fill_idle_ns: int = 0
    backwards: int = 0
    delay: int = 0
    most_delay: int = 0
    evaluations: int = 0

    def seconds(self, kind: str) -> float:
        """Time spent on one kind, *other* included."""
        if kind == OTHER:
            return (self.elapsed_ns - sum(self.by_kind_ns)) / 1e9
        return self.by_kind_ns[KINDS.index(kind)] / 1e9

    @property
    def idle_s(self) -> float:
        """Seconds spent waiting for neighbours."""
        return sum(self.seconds(kind) for kind in IDLE)

    @property
    def training_ns(self) -> int:
        """The time so far without evaluations."""
        return self.elapsed_ns - sum(self.by_kind_ns[KINDS.index(kind)] for kind in OF_EVALUATION)

    @property
    def slot_s(self) -> float:
        """Seconds that a forward or a backward takes, on average."""
        return (self.seconds(FORWARD) + self.seconds(BACKWARD)) / max(1, 2 * self.backwards)

    @property
    def waited_per_evaluation_s(self) -> float:
        """Seconds that an evaluation makes this stage wait, on average."""
        return self.seconds(WAIT_EVALUATION) / max(1, self.evaluations)

    @property
    def idle_ratio(self) -> float:
        """Share of the training time so far that was idle."""
        return self.idle_s / (self.training_ns / 1e9) if self.training_ns > 0 else 0.0

    @property
    def steady_idle_ratio(self) -> float:
        """The same without the fill."""
        steady_ns = self.training_ns - self.fill_ns
        return (self.idle_s * 1e9 - self.fill_idle_ns) / steady_ns if steady_ns > 0 else 0.0

    def since(self, earlier: StageFigures) -> StageFigures:
        """What came after an earlier moment."""
        return self._replace(
            elapsed_ns=self.elapsed_ns - earlier.elapsed_ns,
            by_kind_ns=tuple(now - then for now, then in zip(self.by_kind_ns, earlier.by_kind_ns)),
            fill_ns=self.fill_ns - earlier.fill_ns,
            fill_idle_ns=self.fill_idle_ns - earlier.fill_idle_ns,
            backwards=self.backwards - earlier.backwards,
            evaluations=self.evaluations - earlier.evaluations,
        )


class Bookkeeper:
    """Keeps one stage's figures.

    Args:
        timeline: of the stage.
    """

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._fill = (0, 0)
        self._backwards = self._delay = self._most_delay = 0
        self.begin()

    def begin(self) -> None:
        """Training begins now; what came before does not count."""
        self._begun_ns = time.perf_counter_ns()
        self._timeline.begin_training()
        self._before, self._evaluations_before = self._timeline.sums_ns, self._timeline.evaluations

    def backward_begins(self, delay: int) -> None:
        """A backward begins, whose gradient is `delay` updates old."""
        if self._backwards == 0:
            now = self.figures()
            self._fill = now.elapsed_ns, int(now.idle_s * 1e9)
        self._backwards += 1
        self._delay = delay
        self._most_delay = max(delay, self._most_delay)

    def figures(self) -> StageFigures:
        """The stage as it is now."""
        sums = self._timeline.sums_ns
        return StageFigures(
            time.perf_counter_ns() - self._begun_ns,
            tuple(sums[kind] - self._before[kind] for kind in KINDS),
            *self._fill,
            self._backwards,
            self._delay,
            self._most_delay,
            self._timeline.evaluations - self._evaluations_before,
        )
