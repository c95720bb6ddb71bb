"""What a stage does when: spans of time, their sums, and what it is at right now.

Idle is waiting for a neighbour, nothing else: for an activation, for a gradient, and for the last stage's decisions,
which come late only if its hooks or loggers take longer than a local step. What an evaluation makes a stage wait for
is kept apart from training's idle time: its mini-batches, what the last stage logs of them, and afterwards the next
gradient, since the last stage, which ends the evaluation last, goes on last. So is waiting for the gradients of
pipelines side by side. What is in no span is the time of the training loop, its hooks and its loggers; it is called
*other* where it is shown.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from typing_extensions import override

from lightning_cpipe.schedules.action import Kind

FORWARD = "forward"
BACKWARD = "backward"
UPDATE = "update"
WAIT_ACTIVATION = "wait_activation"
WAIT_GRADIENT = "wait_gradient"
WAIT_DECISION = "wait_decision"
WAIT_REPLICAS = "wait_replicas"
DATA = "data"
EVALUATION = "evaluation"
WAIT_EVALUATION = "wait_evaluation"
OTHER = "other"

KINDS = (
    FORWARD,
    BACKWARD,
    UPDATE,
    WAIT_ACTIVATION,
    WAIT_GRADIENT,
    WAIT_DECISION,
    WAIT_REPLICAS,
    DATA,
    EVALUATION,
    WAIT_EVALUATION,
)
"""Every kind of span that is recorded. *Other* is what they leave."""

ACTIONS = {
    FORWARD: Kind.FORWARD,
    BACKWARD: Kind.BACKWARD,
    UPDATE: Kind.UPDATE,
    WAIT_ACTIVATION: Kind.RECV_FORWARD,
    WAIT_GRADIENT: Kind.RECV_BACKWARD,
}
"""The kinds that are actions of a plan."""

IDLE = (WAIT_ACTIVATION, WAIT_GRADIENT, WAIT_DECISION)
"""The kinds that count as idle."""

OF_EVALUATION = (EVALUATION, WAIT_EVALUATION)
"""The kinds that are no part of training."""

LEFT_OUT = "left_out"
"""No kind that is recorded: the time of the spans that a long run did not keep."""


class Span(NamedTuple):
    """One stretch of time.

    Attributes:
        kind: one of `KINDS`, or `LEFT_OUT`.
        batch: the mini-batch it was for.
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

    Args:
        keep: how many.
        tell: called with the number of the mini-batch whenever a span begins.
        flows_on: whether what a stage waits for between an evaluation and the next backward is due to the evaluation;
            not where every mini-batch is begun with an empty pipeline.
    """

    def __init__(self, keep: int = 4096, tell: Callable[[int], None] | None = None, *, flows_on: bool = True) -> None:
        self._keep = keep
        self._tell = tell
        self._flows_on = flows_on
        self._was_evaluated = False
        self.evaluations = 0
        """How many there were: each is followed by a backward, or is the last thing."""
        self._first: list[Span] = []
        self._last: deque[Span] = deque(maxlen=keep)
        self._left_out = False
        self._sums = dict.fromkeys(KINDS, 0)
        self._update: tuple[int, Any] | None = None
        self.now_at: tuple[str, int] | None = None
        """Kind and mini-batch of the span that began last; None before the first."""
        self.start_ns = time.perf_counter_ns()
        """When the timeline began."""

    def measure(self, kind: str, batch: int) -> AbstractContextManager[None]:
        """The time inside is a span."""
        return _Measured(self, self._note(kind, batch), batch)

    def begin_update(self, batch: int) -> None:
        """The span of an update begins; it ends in another function, with `end_update`."""
        self._note(UPDATE, batch)
        self._update = batch, self.mark()

    def end_update(self) -> None:
        """The update that began ends here; does nothing if none did."""
        if self._update is not None:
            self.end(UPDATE, *self._update)
            self._update = None

    def mark(self) -> Any:
        """This moment, for `end`."""
        return time.perf_counter_ns()

    def end(self, kind: str, batch: int, begun: Any) -> None:
        """A span ends, which began at that mark."""
        self._add(Span(kind, batch, begun, self.mark()))

    def begin_training(self) -> None:
        """What comes next does not wait because of an evaluation before."""
        self._was_evaluated = False

    @property
    def batch(self) -> int:
        """The mini-batch of the span that began last."""
        return 0 if self.now_at is None else self.now_at[1]

    def settle(self) -> None:
        """Wait until every span is known; nothing to wait for on the CPU."""

    @property
    def sums_ns(self) -> dict[str, int]:
        """Nanoseconds by kind, of all spans so far."""
        return self._sums.copy()

    @property
    def spans(self) -> list[Span]:
        """The spans that were kept, in the order in which they ended; one of `LEFT_OUT` where some were not."""
        if not self._left_out:
            return [*self._first, *self._last]
        before, after = self._first[-1], self._last[0]
        return [*self._first, Span(LEFT_OUT, before.batch, before.end_ns, after.start_ns), *self._last]

    def _note(self, kind: str, batch: int) -> str:
        """A span begins; returns the kind that it counts as."""
        self.now_at = kind, batch
        if self._tell is not None:
            self._tell(batch)
        if kind in OF_EVALUATION:
            self.evaluations += not self._was_evaluated
            self._was_evaluated = True
        elif kind == BACKWARD:
            self._was_evaluated = False
        waits = kind in (WAIT_ACTIVATION, WAIT_GRADIENT)
        return WAIT_EVALUATION if waits and self._was_evaluated and self._flows_on else kind

    def _add(self, span: Span) -> None:
        self._sums[span.kind] += span.end_ns - span.start_ns
        if len(self._first) < self._keep:
            self._first.append(span)
        else:
            self._left_out = len(self._last) == self._keep
            self._last.append(span)


class _Measured(AbstractContextManager[None]):
    """A span; a class, since a generator would cost more than all else here."""

    def __init__(self, timeline: Timeline, kind: str, batch: int) -> None:
        self._timeline = timeline
        self._of = kind, batch

    def __enter__(self) -> None:
        self._begun = self._timeline.mark()

    def __exit__(self, *_: object) -> None:
        self._timeline.end(*self._of, self._begun)


class CudaTimeline(Timeline):
    """The spans of one stage, by the GPU's clock.

    A span is a pair of events in the current stream, so a wait is the time that the stream waited. Events are read
    once they have passed, so nothing synchronises. Not yet run on a GPU.
    """

    def __init__(self, keep: int = 4096, tell: Callable[[int], None] | None = None, *, flows_on: bool = True) -> None:
        super().__init__(keep, tell, flows_on=flows_on)
        self._pending: deque[tuple[str, int, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._zero = self.mark()
        self._zero_ns = self.start_ns

    def settle(self) -> None:
        """Wait until every span is known."""
        torch.cuda.current_stream().synchronize()
        self._read()

    @override
    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    @override
    def end(self, kind: str, batch: int, begun: Any) -> None:
        self._pending.append((kind, batch, begun, self.mark()))
        self._read()

    def _read(self) -> None:
        while self._pending and self._pending[0][3].query():  # type: ignore[no-untyped-call]
            kind, batch, start, end = self._pending.popleft()
            # Between neighbouring events: CUDA counts in 32-bit milliseconds, too coarse from the start of a long run.
            self._zero_ns += _ns_between(self._zero, start)
            self._zero = start
            self._add(Span(kind, batch, self._zero_ns, self._zero_ns + _ns_between(start, end)))


def _ns_between(start: torch.cuda.Event, end: torch.cuda.Event) -> int:
    return int(start.elapsed_time(end) * 1e6)
