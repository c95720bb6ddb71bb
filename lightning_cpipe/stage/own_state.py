"""What a step writes on the module, outside of blocks, is each stage's own, where one process runs several stages.

`training_step` runs once for each stage. With a process each, a counter on the module counts the mini-batches on every
stage's module; on one module it would count each as often as there are stages. So the attributes and buffers of what is
neither a block nor part of one hang in the module for the last stage, and every other stage has its own, which hang
there while it runs, and in its backward. Where a hook changes one, all stages go on from what it wrote.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any

from torch import Tensor, nn

from lightning_cpipe.errors import CutError
from lightning_cpipe.stage.cut import Cut

LARGEST = 2**20
"""Elements. What has more is taken for data, which stages share; to write into it is an error."""

BOOKKEEPING = vars(nn.Module()).keys() - {"training"}
"""What torch keeps in every module: hooks, and the dicts of parameters, buffers and children."""

_CONTAINERS = (list, dict, set, deque)

_Place = tuple[int, str]
"""A holder of attributes or buffers, and a name in it."""

_State = list[dict[str, Any]]
"""What each holder holds."""

_NOTHING = object()


class OwnState:
    """The state of all stages of a process.

    Args:
        root: the whole module.
        cut: how it is cut.
        stages: of the process; the last one's state is what everybody sees.
    """

    def __init__(self, root: nn.Module, cut: Cut, stages: Sequence[int]) -> None:
        modules = list(between_blocks(root, cut))
        self._holders: _State = [each for m in modules for each in (vars(m), m._buffers)]
        self._last = stages[-1]
        self._own: dict[int, _State] = {stage: [{} for _ in self._holders] for stage in stages[:-1]}
        self._seen: _State = [{} for _ in self._holders]
        """What everybody sees, as the steps left it; what differs was changed by a hook."""
        self._marks: dict[_Place, _Mark] = {}
        """On what of that can be written into."""

    @property
    def is_of_one(self) -> bool:
        """Whether there is but one stage, whose state always hangs there."""
        return not self._own

    @contextmanager
    def of(self, stage: int) -> Iterator[None]:
        """A stage's step, or the backward of one, runs inside.

        Raises:
            CutError: if it writes into something large.
        """
        if self.is_of_one:
            yield
            return
        for number, name in self._changed():
            for own in self._own.values():
                if name in self._seen[number]:
                    own[number][name] = _copy(self._seen[number][name])
                else:
                    own[number].pop(name, None)
        if stage == self._last:
            yield
            self._changed()
            return
        self._hang(self._seen, self._own[stage])
        try:
            yield
        finally:
            self._own[stage] = self._read()
            self._hang(self._own[stage], self._seen)
        for (_, name), mark in self._marks.items():
            if mark.is_large and mark.is_old:
                raise CutError(
                    f"the step writes into {name!r}, which has more than {LARGEST} elements. With several stages on"
                    " a device, each would need one of its own. Take as many devices as stages, or write into a copy."
                )

    def _changed(self) -> list[_Place]:
        """Where something else stands than when this was asked last, or something was written into what stands."""
        before, self._seen = self._seen, self._read()
        changed = [place for place, mark in self._marks.items() if mark.is_old]
        for number, (old, new) in enumerate(zip(before, self._seen)):
            if list(old) == list(new) and all(map(is_, old.values(), new.values())):
                continue
            changed += [(number, name) for name, value in new.items() if value is not old.get(name, _NOTHING)]
            changed += [(number, name) for name in old.keys() - new.keys()]
        for number, name in changed:
            self._marks.pop((number, name), None)
            if isinstance(value := self._seen[number].get(name), (Tensor, *_CONTAINERS)):
                self._marks[number, name] = _Mark(value)
        return changed

    def _read(self) -> _State:
        return [{k: value for k, value in each.items() if k not in BOOKKEEPING} for each in self._holders]

    def _hang(self, before: _State, after: _State) -> None:
        """Put this in place of what hangs there."""
        for holder, old, new in zip(self._holders, before, after):
            for name in old.keys() - new.keys():
                del holder[name]
            holder.update(new)


def between_blocks(root: nn.Module, cut: Cut) -> Iterator[nn.Module]:
    """The modules whose code runs on several stages: those around blocks, and beside them what has no weights.

    What writes buffers, and is a stub on later stages, runs on one stage alone.
    """
    stubs = {f"{stub}." for step in cut.steps.values() for passage in step.passages for stub in passage.stubs}
    around = {""}
    for start in cut.starts:
        while "." in start:
            start = start.rpartition(".")[0]
            around.add(start)
    for name in sorted(around):
        module = root.get_submodule(name)
        yield module
        for key, child in module.named_children():
            path = f"{name}.{key}".removeprefix(".")
            if path not in around and next(child.parameters(), None) is None:
                inside = child.named_modules(prefix=path)
                yield from (each for at, each in inside if not f"{at}.".startswith(tuple(stubs)))


def _is_large(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() > LARGEST
    return isinstance(value, _CONTAINERS) and len(value) > LARGEST


def _copy(value: Any) -> Any:
    """What a step may change without putting another in its place."""
    if _is_large(value):
        return value
    if isinstance(value, Tensor):
        return value.detach().clone()
    return copy.copy(value) if isinstance(value, _CONTAINERS) else value


class _Mark:
    """Tells later whether something was written into a tensor or a container."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self.is_large = _is_large(value)
        self._writes, self._items = self._inside()

    @property
    def is_old(self) -> bool:
        """Whether something was."""
        writes, items = self._inside()
        return writes != self._writes or not all(map(is_, items, self._items))

    def _inside(self) -> tuple[int, tuple[Any, ...]]:
        """A number and objects, of which at least one is another one after a write."""
        value = self._value
        if isinstance(value, Tensor):
            return 0 if value.is_inference() else value._version, ()
        if self.is_large:
            return len(value), ()
        return len(value), (*value, *value.values()) if isinstance(value, dict) else tuple(value)
