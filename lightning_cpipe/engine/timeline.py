"""What a stage did when: spans of time, and their sums.

Idle is waiting for a neighbour, nothing else: `WAIT_ACTIVATION` and `WAIT_GRADIENT`. What is in no span is the time
of the training loop, its hooks and its loggers; it is called *other* where it is shown.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

FORWARD = "forward"
BACKWARD = "backward"
UPDATE = "update"
WAIT_ACTIVATION = "wait_activation"
WAIT_GRADIENT = "wait_gradient"
DATA = "data"
EVALUATION = "evaluation"
OTHER = "other"

KINDS = (FORWARD, BACKWARD, UPDATE, WAIT_ACTIVATION, WAIT_GRADIENT, DATA, EVALUATION)
"""Every kind of span that is recorded. *Other* is what they leave."""

IDLE = (WAIT_ACTIVATION, WAIT_GRADIENT)
"""The kinds that count as idle."""


class Span(NamedTuple):
    """One stretch of time.

    Attributes:
        kind: one of `KINDS`.
        batch: the mini-batch it was for; −1 where it is for none.
        start_ns: nanoseconds on the machine's monotonic clock, which all processes of a machine share.
        end_ns: likewise.
    """

    kind: str
    batch: int
    start_ns: int
    end_ns: int


class Timeline:
    """The spans of one stage, by the CPU's clock.

    All spans are summed; the first `keep` and the last `keep` are kept one by one.
    """

    def __init__(self, keep: int = 4096) -> None:
        self._first: list[Span] = []
        self._last: deque[Span] = deque(maxlen=keep)
        self._keep = keep
        self._sums = dict.fromkeys(KINDS, 0)
        self._begun: tuple[str, int, int] | None = None
        self.start_ns = time.perf_counter_ns()
        """When the timeline began."""

    @contextmanager
    def measure(self, kind: str, batch: int = -1) -> Iterator[None]:
        """The time inside is a span."""
        start = time.perf_counter_ns()
        try:
            yield
        finally:
            self._add(Span(kind, batch, start, time.perf_counter_ns()))

    def begin(self, kind: str, batch: int) -> None:
        """A span begins here; `end` ends it."""
        self._begun = kind, batch, time.perf_counter_ns()

    def end(self) -> None:
        """The span that `begin` began ends here, if one did."""
        if self._begun is not None:
            self._add(Span(*self._begun, time.perf_counter_ns()))
            self._begun = None

    def settle(self) -> None:
        """Wait until every span is known; nothing to wait for on the CPU."""

    @property
    def sums_ns(self) -> dict[str, int]:
        """Nanoseconds by kind, of all spans so far."""
        return dict(self._sums)

    @property
    def spans(self) -> list[Span]:
        """The spans that were kept, in the order in which they ended."""
        return [*self._first, *self._last]

    def _add(self, span: Span) -> None:
        self._sums[span.kind] += span.end_ns - span.start_ns
        if len(self._first) < self._keep:
            self._first.append(span)
        else:
            self._last.append(span)


class CudaTimeline(Timeline):
    """The spans of one stage, by the GPU's clock.

    A span is a pair of events in the current stream, so a wait is the time that the stream waited. Events are read
    once they have passed, so nothing synchronises. Never run by this project's own tests, which have no GPU.
    """

    def __init__(self, keep: int = 4096) -> None:
        super().__init__(keep)
        self._pending: deque[tuple[str, int, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._open: tuple[str, int, torch.cuda.Event] | None = None
        self._zero = self._mark()

    @contextmanager
    def measure(self, kind: str, batch: int = -1) -> Iterator[None]:
        """The time inside, in the stream's order, is a span."""
        start = self._mark()
        try:
            yield
        finally:
            self._pending.append((kind, batch, start, self._mark()))
            self._read()

    def begin(self, kind: str, batch: int) -> None:
        """A span begins here; `end` ends it."""
        self._open = kind, batch, self._mark()

    def end(self) -> None:
        """The span that `begin` began ends here, if one did."""
        if self._open is not None:
            self._pending.append((*self._open, self._mark()))
            self._open = None

    def settle(self) -> None:
        """Wait until every span is known."""
        torch.cuda.current_stream().synchronize()
        self._read()

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read(self) -> None:
        while self._pending and self._pending[0][3].query():
            kind, batch, start, end = self._pending.popleft()
            self._add(Span(kind, batch, self._ns(start), self._ns(end)))

    def _ns(self, event: torch.cuda.Event) -> int:
        return self.start_ns + int(self._zero.elapsed_time(event) * 1e6)
