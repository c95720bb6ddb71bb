"""Averages the gradients of one rank's stages over pipelines side by side, while the backward is still running.

Gradients lie in *buckets*, those that a backward makes first in the first one. As soon as all gradients of a bucket are
there, they are copied into its flat buffer, and the sum over the pipelines begins; what is left is waited for before
the update. Buckets begin in the same order on all counterparts, whatever order their gradients come in.

How often a backward adds to each gradient is learned from the first update, in which all sums begin at the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_cpipe.errors import CPipeError
from lightning_cpipe.stage.versions import Version

FIRST_BUCKET = 2**20
"""Bytes. A small one, so that the first sum begins early."""

BUCKET = 25 * 2**20
"""Bytes, of all others; they are those of DDP."""

StartSum = Callable[[Tensor], Callable[[], None]]
"""Begins to add up a tensor over the counterparts, in place, and returns what waits for it."""


class Bucket:
    """Some gradients, which travel together.

    Args:
        parameters: whose gradients they are; of one dtype, on one device.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        like = parameters[0]
        marks = nn.Parameter(torch.zeros(len(parameters), dtype=like.dtype, device=like.device))
        room = Version.flat_like([*parameters, marks])
        *self._gradients, self._marks = room.data
        (self.flat,) = room.flats

    def fill(self) -> None:
        """Copy the gradients; with a mark for each that is there."""
        there = [parameter.grad is not None for parameter in self.parameters]
        for parameter, room in zip(self.parameters, self._gradients):
            if parameter.grad is None:
                room.zero_()
            elif parameter.grad.data_ptr() != room.data_ptr():
                room.copy_(parameter.grad)
        if all(there):
            self._marks.fill_(1)
        else:
            self._marks.copy_(torch.tensor(there))

    def hand_out(self, num_replicas: int) -> None:
        """Let the parameters have the mean; one that got no gradient in any pipeline has none."""
        self.flat.div_(num_replicas)
        marks: list[float] | None = None
        for place, (parameter, room) in enumerate(zip(self.parameters, self._gradients)):
            if parameter.grad is None:
                # Looked at only here: on a GPU that waits for the device.
                marks = self._marks.tolist() if marks is None else marks
                if not marks[place]:
                    continue
            parameter.grad = room


class Averaging:
    """Averages what the updates of one rank use.

    Args:
        parameters: in the order in which a backward is likely to reach them, each once.
        added_to: those whose gradient is not complete when the backward is done.
        start_sum: begins a sum over the counterparts.
        num_replicas: how many there are, this rank included.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        added_to: Iterable[nn.Parameter],
        start_sum: StartSum,
        num_replicas: int,
    ) -> None:
        self._num_replicas = num_replicas
        self._start_sum = start_sum
        late = {id(parameter): parameter for parameter in added_to}
        early = [parameter for parameter in parameters if id(parameter) not in late]
        first = _in_buckets(early)
        self._buckets = [*first, *_in_buckets(late.values())]
        self._place = {id(each): place for place, bucket in enumerate(first) for each in bucket.parameters}
        self._learned: dict[int, Counter[int]] = {}
        """By the number of backwards in an update: how often they add to each gradient, by the parameter's `id`."""
        self._seen: Counter[int] | None = None
        self._backwards = 0
        self._missing: list[int] = []
        self._waits: list[Callable[[], None]] = []
        self._watched = early
        self._hooks: list[RemovableHandle] = []

    def attach(self) -> None:
        """Training begins: see when each gradient is there."""
        for each in self._watched:
            self._hooks.append(each.register_post_accumulate_grad_hook(self._gradient_is_there))  # type: ignore[no-untyped-call]

    def detach(self) -> None:
        """Training is over: leave the parameters as they were."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def begin(self, backwards: int) -> None:
        """The backwards begin after which the update comes; what was accumulated before stays in the gradients.

        Args:
            backwards: how many there are: of micro-batches, or one.
        """
        self._backwards, self._seen = backwards, Counter()
        expected = self._learned.get(backwards)
        if expected is None:
            self._missing = []
            return
        # A gradient that was not there once may be there another time: its bucket waits to the end.
        self._missing = [
            sum(expected[id(each)] for each in bucket.parameters)
            if all(expected[id(each)] for each in bucket.parameters)
            else -1
            for bucket in self._buckets
        ]

    def finish(self) -> None:
        """The backwards are done: wait for all sums, and let all parameters have the mean gradient."""
        while len(self._waits) < len(self._buckets):
            self._begin_next()
        for wait in self._waits:
            wait()
        for bucket in self._buckets:
            bucket.hand_out(self._num_replicas)
        self._waits.clear()
        assert self._seen is not None
        if self._seen:
            # Else the mini-batch was left out in this pipeline: there was nothing to learn.
            self._learned.setdefault(self._backwards, self._seen)
        self._seen = None

    def _gradient_is_there(self, parameter: Tensor) -> None:
        if self._seen is None:
            return
        self._seen[id(parameter)] += 1
        if not self._missing:
            return
        at = self._place[id(parameter)]
        if at < len(self._waits):
            raise CPipeError(
                f"a backward added to the gradient of a parameter of shape {tuple(parameter.shape)} more often than the"
                " first one did, after the sum over the pipelines had begun. With data_parallel_size > 1, every"
                " backward must reach a parameter as often as the first: a module that is checkpointed with"
                " `use_reentrant=True` and called now once, now twice does not; set `use_reentrant=False`."
            )
        if self._seen[id(parameter)] <= self._learned[self._backwards][id(parameter)]:
            self._missing[at] -= 1
        while len(self._waits) < len(self._buckets) and self._missing[len(self._waits)] == 0:
            self._begin_next()

    def _begin_next(self) -> None:
        bucket = self._buckets[len(self._waits)]
        bucket.fill()
        self._waits.append(self._start_sum(bucket.flat))


def _in_buckets(parameters: Iterable[nn.Parameter]) -> list[Bucket]:
    by_kind: dict[tuple[torch.dtype, torch.device], list[list[nn.Parameter]]] = {}
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    for parameter in parameters:
        kind, size = (parameter.dtype, parameter.device), parameter.numel() * parameter.element_size()
        groups = by_kind.setdefault(kind, [])
        if not groups or sizes[kind] >= (FIRST_BUCKET if len(groups) == 1 else BUCKET):
            groups.append([])
            sizes[kind] = 0
        groups[-1].append(parameter)
        sizes[kind] += size
    return [Bucket(group) for groups in by_kind.values() for group in groups]
