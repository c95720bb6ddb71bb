"""Times the blocks of a step: forward and backward of each, and of what lies between them.

Hooks note the moments at which a block is entered and left. Its backward begins when a gradient arrives at one of its
outputs, or when an activation checkpoint runs it again; it ends with the last of its inputs' gradients that comes
before the next block's backward begins.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_cpipe.probe.gradients import gradients
from lightning_cpipe.probe.step import Step
from lightning_cpipe.probe.untouched import untouched
from lightning_cpipe.tree import tensors_in

FEWEST, MOST = 3, 7
"""How often a step is timed, after once to warm up; the fastest of them counts."""

ENOUGH_S = 2.0
"""Seconds after which it is not timed again, once that was done often enough."""


class Clock(Protocol):
    """Tells moments."""

    def now(self) -> Any:
        """This moment."""

    def read(self, moments: Sequence[Any]) -> list[float]:
        """Moments in seconds, from any start."""


class CpuClock:
    """Of the CPU: the time that this thread has run, whatever else keeps the machine busy meanwhile."""

    def now(self) -> float:
        """This moment."""
        return time.thread_time()

    def read(self, moments: Sequence[float]) -> list[float]:
        """Moments in seconds, from any start."""
        return list(moments)


class CudaClock:
    """Of a GPU: moments are noted on its stream, in between its work, and read when that is done."""

    def now(self) -> torch.cuda.Event:
        """This moment."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def read(self, moments: Sequence[torch.cuda.Event]) -> list[float]:
        """Moments in seconds, from the first one."""
        torch.cuda.synchronize()
        return [moments[0].elapsed_time(moment) / 1000 for moment in moments]


def clock_of(device: torch.device) -> Clock:
    """The clock for what runs on a device."""
    return CudaClock() if device.type == "cuda" else CpuClock()


@dataclass(frozen=True)
class Pass:
    """The times of one pass through the blocks, in seconds.

    Attributes:
        before: the first one.
        inside: each block.
        after: each block, until the next one; in a backward, what the forward did there.
    """

    before: float
    inside: list[float]
    after: list[float]

    @classmethod
    def fastest(cls, passes: Sequence[Pass]) -> Pass:
        """The least of each time."""
        return cls(
            min(each.before for each in passes),
            [min(times) for times in zip(*(each.inside for each in passes))],
            [min(times) for times in zip(*(each.after for each in passes))],
        )

    def alike(self, kinds: Sequence[Hashable]) -> Pass:
        """Blocks of one kind take the median of their times, so that noise does not tell them apart.

        What comes after them does too, if the next blocks are also of one kind.
        """
        following = [*kinds[1:], None]
        return Pass(self.before, _medians(self.inside, kinds), _medians(self.after, list(zip(kinds, following))))

    @property
    def of_blocks(self) -> list[float]:
        """Of each block with what comes after it, and before the first one."""
        times = [inside + after for inside, after in zip(self.inside, self.after)]
        return [self.before + times[0], *times[1:]]


def time_blocks(
    root: nn.Module, step: Step, blocks: Sequence[str], kinds: Sequence[Hashable], clock: Clock
) -> tuple[list[float], list[float]]:
    """The seconds of each block, forward and backward, up to where the next one begins.

    If gradients come by the blocks in another order, the time of the whole backward is split as the forward's.

    Args:
        root: the whole module.
        step: its step; if it does not train, backwards take no time.
        blocks: in the order of their calls; each is called once.
        kinds: equal for blocks that do the same.
        clock: of the device.
    """
    forwards, backwards = [], []
    begun = time.perf_counter()
    for number in range(1 + MOST):
        if number > FEWEST and time.perf_counter() - begun > ENOUGH_S:
            break
        run = _TimedRun(root, blocks, clock)
        with untouched(root):
            run.go(step)
        forward, backward = run.passes()
        # The first one warms up.
        if number:
            forwards.append(forward)
            backwards.append(backward)
    forward_s = Pass.fastest(forwards).alike(kinds).of_blocks
    return forward_s, Pass.fastest(backwards).alike(kinds).of_blocks


class _TimedRun:
    """One forward and backward of a step, and the moments in it."""

    def __init__(self, root: nn.Module, blocks: Sequence[str], clock: Clock) -> None:
        self._root = root
        self._blocks = blocks
        self._clock = clock
        self._in_backward = False
        self._moments: list[Any] = []
        self._names: list[tuple[str, int]] = []
        self._hooks = ExitStack()

    def go(self, step: Step) -> None:
        """Run it."""
        weights = [parameter for parameter in self._root.parameters() if parameter.requires_grad]
        with self._hooks:
            for number, name in enumerate(self._blocks):
                self._watch(number, self._root.get_submodule(name))
            self._note("forward")
            loss = step.run().loss
            self._note("backward")
            self._in_backward = True
            if loss is not None and loss.requires_grad and weights:
                gradients([loss], [torch.ones_like(loss)], weights)
            self._note("end")

    def passes(self) -> tuple[Pass, Pass]:
        """The times of the forward and the backward."""
        moments = list(zip(self._names, self._clock.read(self._moments)))
        first: dict[tuple[str, int], float] = {}
        given: dict[int, list[float]] = {}
        for name, moment in moments:
            first.setdefault(name, moment)
            if name[0] == "given":
                given.setdefault(name[1], []).append(moment)
        begin, turn, end = (first[name, 0] for name in ("forward", "backward", "end"))
        count = range(len(self._blocks))
        forward = _forward([first["enter", n] for n in count], [first["leave", n] for n in count], begin, turn)
        arrivals = [first.get(("arrive", number)) for number in count]
        return forward, _backward(arrivals, [given.get(n, []) for n in count], turn, end) or _split(forward, end - turn)

    def _note(self, what: str, number: int = 0) -> None:
        self._names.append((what, number))
        self._moments.append(self._clock.now())

    def _watch(self, number: int, module: nn.Module) -> None:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._in_backward:
                self._note("arrive", number)
            else:
                self._note("enter", number)
                self._when_graded(tensors_in((args, kwargs)), "given", number)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if not self._in_backward:
                self._when_graded(tensors_in(output), "arrive", number)
                self._note("leave", number)

        self._hooks.callback(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True).remove)
        self._hooks.callback(module.register_forward_hook(leave).remove)

    def _when_graded(self, tensors: Sequence[Tensor], what: str, number: int) -> None:
        def note(_: Tensor) -> None:
            self._note(what, number)

        for tensor in tensors:
            if tensor.requires_grad:
                hook = tensor.register_hook(note)  # type: ignore[no-untyped-call]
                self._hooks.callback(hook.remove)


def _forward(entered: Sequence[float], left: Sequence[float], begin: float, end: float) -> Pass:
    """A module that holds another block ends where that one begins."""
    following = [*entered[1:], end]
    left = [min(leave, then) for leave, then in zip(left, following)]
    return Pass(
        entered[0] - begin,
        [leave - enter for enter, leave in zip(entered, left)],
        [then - leave for leave, then in zip(left, following)],
    )


def _backward(
    arrivals: Sequence[float | None], given: Sequence[Sequence[float]], begin: float, end: float
) -> Pass | None:
    """A block at which no gradient arrives has no backward. None if gradients arrive in another order."""
    reached = [(number, moment) for number, moment in enumerate(arrivals) if moment is not None]
    if [moment for _, moment in reached] != sorted((moment for _, moment in reached), reverse=True):
        return None
    inside, after = ([0.0] * len(arrivals) for _ in range(2))
    if not reached:
        # Only what comes after the blocks is trained, or what stands beside them.
        after[-1] = end - begin
        return Pass(0.0, inside, after)
    after[reached[-1][0]] += reached[-1][1] - begin
    before = 0.0
    for (previous, following), (number, arrived) in pairwise([(-1, end), *reached]):
        done = max((moment for moment in given[number] if arrived <= moment <= following), default=following)
        inside[number] = done - arrived
        if previous >= 0:
            after[previous] += following - done
        else:
            before = following - done
    if reached[0][0] > 0:
        # The blocks before it have no backward.
        after[reached[0][0] - 1] += before
        before = 0.0
    return Pass(before, inside, after)


def _split(forward: Pass, total: float) -> Pass:
    """`total` in the proportions of a forward."""
    whole = sum(forward.of_blocks)
    share = total / whole if whole else 0.0
    return Pass(
        forward.before * share, [time * share for time in forward.inside], [time * share for time in forward.after]
    )


def _medians(times: Sequence[float], kinds: Sequence[Hashable]) -> list[float]:
    groups: dict[Hashable, list[float]] = {}
    for time_s, kind in zip(times, kinds):
        groups.setdefault(kind, []).append(time_s)
    return [median(groups[kind]) for kind in kinds]
