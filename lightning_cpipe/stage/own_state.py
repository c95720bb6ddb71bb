"""What a step writes on the module, outside of blocks, is each stage's own, where one process runs several stages.

`training_step` runs once for each stage. With a process each, a counter on the module counts the mini-batches on every
stage's module; on one module it would count each as often as there are stages. So the attributes and buffers of what is
neither a block nor part of one hang in the module for the last stage, and every other stage has its own, which hang
there while it runs. Where a hook changes one, all stages go on from what it wrote.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_cpipe.errors import CutError
from lightning_cpipe.stage.cut import Cut

LARGEST = 2**20
"""Elements. What has more is taken for data, which stages share; to write into it is an error."""

_BOOKKEEPING = vars(nn.Module()).keys() - {"training"}

_CONTAINERS = (list, dict, set, deque)

_Place = tuple[int, str]
"""A holder of attributes or buffers, and a name in it."""


class OwnState:
    """The state of all stages of a process.

    Args:
        root: the whole module.
        cut: how it is cut.
        stages: of the process; the last one's state is what everybody sees.
    """

    def __init__(self, root: nn.Module, cut: Cut, stages: Sequence[int]) -> None:
        modules = list(_between_blocks(root, cut))
        self._holders: list[dict[str, Any]] = [each for m in modules for each in (vars(m), m._buffers)]
        self._last = stages[-1]
        self._own: dict[int, dict[_Place, Any]] = {stage: {} for stage in stages[:-1]}
        self._left: dict[_Place, _Mark] = {}
        """What everybody sees, as the steps left it; what differs was changed by a hook."""

    @contextmanager
    def of(self, stage: int) -> Iterator[None]:
        """A stage's step runs inside.

        Raises:
            CutError: if it writes into something large.
        """
        if not self._own:
            yield
            return
        seen = self._read()
        marks = {place: _Mark.of(value) for place, value in seen.items()}
        for place in [place for place, mark in marks.items() if mark != self._left.get(place)]:
            for own in self._own.values():
                own[place] = _copy(seen[place])
        self._left = marks
        if stage == self._last:
            yield
            self._left = {place: _Mark.of(value) for place, value in self._read().items()}
            return
        self._replace(seen, self._own[stage])
        try:
            yield
        finally:
            self._own[stage] = self._read()
            self._replace(self._own[stage], seen)
        for place, mark in marks.items():
            if _is_large(mark.value) and mark != _Mark.of(mark.value):
                raise CutError(
                    f"the step writes into {place[1]!r}, which has more than {LARGEST} elements. With several stages on"
                    " a device, each would need one of its own. Take as many devices as stages, or write into a copy."
                )

    def _read(self) -> dict[_Place, Any]:
        return {
            (number, name): value
            for number, holder in enumerate(self._holders)
            for name, value in holder.items()
            if name not in _BOOKKEEPING
        }

    def _replace(self, before: dict[_Place, Any], after: dict[_Place, Any]) -> None:
        for number, name in before.keys() - after.keys():
            del self._holders[number][name]
        for (number, name), value in after.items():
            self._holders[number][name] = value


def _between_blocks(root: nn.Module, cut: Cut) -> Iterator[nn.Module]:
    """The modules whose code runs on several stages: those around blocks, and beside them what has no weights."""
    around = {""}
    for start in cut.starts:
        while "." in start:
            start = start.rpartition(".")[0]
            around.add(start)
    for name in sorted(around):
        module = root.get_submodule(name)
        yield module
        for key, child in module.named_children():
            if f"{name}.{key}".removeprefix(".") not in around and next(child.parameters(), None) is None:
                yield from child.modules()


def _is_large(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() > LARGEST
    return type(value) in _CONTAINERS and len(value) > LARGEST


def _copy(value: Any) -> Any:
    """What a step may change without putting another in its place."""
    if _is_large(value):
        return value
    if isinstance(value, Tensor):
        return value.detach().clone()
    return copy.copy(value) if type(value) in _CONTAINERS else value


class _Mark:
    """Differs where something else stands in a place, or something was written into it.

    Attributes:
        value: what stood there.
    """

    def __init__(self, value: Any, version: int) -> None:
        self.value = value
        self._version = version

    @classmethod
    def of(cls, value: Any) -> _Mark:
        """As it is now."""
        if isinstance(value, Tensor):
            return cls(value, 0 if value.is_inference() else value._version)
        return cls(value, len(value) if type(value) in _CONTAINERS else 0)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Mark) and self.value is other.value and self._version == other._version

    __hash__ = None  # type: ignore[assignment]
