"""Runs a module's step for a look at it, and leaves the module as it was.

Put back afterwards: buffers, attributes (tensors, lists, dicts, sets and deques in them included), the mode of every
module, gradients and every random generator. An object of any other class that a step changes from inside stays
changed. Weights are not copied; a step that writes one in place is refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cpipe.errors import CutError
from lightning_cpipe.stage.randomness import unchanged

_NOT_STATE = frozenset({"_parameters", "_buffers", "_modules", "_trainer", "_fabric"})

Place = tuple[str, str]
"""A module's name and the name of an attribute or buffer of it."""


class Snapshot:
    """The state of a module at one moment, weights excepted."""

    def __init__(self, root: nn.Module) -> None:
        self._modules = dict(root.named_modules())
        self._weights = [
            (name, parameter, parameter._version, parameter.grad) for name, parameter in root.named_parameters()
        ]
        self._saved = {name: _state_of(module) for name, module in self._modules.items()}

    def changes(self) -> dict[Place, Any]:
        """What differs now: where, and what stands there now (copies; None where it is gone)."""
        found: dict[Place, Any] = {}
        for name, module in self._modules.items():
            before, now = self._saved[name], _state_of(module)
            for key in before.keys() | now.keys():
                if not _equal(before.get(key), now.get(key)):
                    found[name, key] = now.get(key)
        return dict(sorted(found.items()))

    def restore(self) -> None:
        """Put everything back.

        Raises:
            CutError: if a weight was written in place.
        """
        for name, module in self._modules.items():
            saved = self._saved[name]
            for key in _state_of(module).keys() - saved.keys():
                (module._buffers if key in module._buffers else module.__dict__).pop(key)
            for key, value in saved.items():
                holder = module._buffers if key in module._buffers else module.__dict__
                holder[key] = _put_back(holder.get(key), value)
        for name, parameter, version, grad in self._weights:
            parameter.grad = grad
            if parameter._version != version:
                raise CutError(
                    f"the step writes the parameter {name!r} in place. In a pipeline its other copies and the older"
                    " versions in flight would not follow. Change weights in the optimizer, or keep what the step"
                    " writes in a buffer."
                )


@contextmanager
def untouched(root: nn.Module) -> Iterator[Snapshot]:
    """Whatever runs inside, `root` and the random generators are afterwards as they were before."""
    with unchanged():
        snapshot = Snapshot(root)
        try:
            yield snapshot
        finally:
            snapshot.restore()


def _state_of(module: nn.Module) -> dict[str, Any]:
    attributes = {
        key: _copied(value)
        for key, value in module.__dict__.items()
        if key not in _NOT_STATE and not key.endswith("_hooks") and not key.endswith("_hooks_with_kwargs")
    }
    return attributes | {key: _copied(value) for key, value in module._buffers.items()}


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (list, tuple, set, deque):
        return type(value)(_copied(item) for item in value)
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    return value


def _put_back(now: Any, saved: Any) -> Any:
    """`saved`, in the object that stands there now where that is possible, since others may hold it too."""
    if isinstance(saved, Tensor) and isinstance(now, Tensor) and now.shape == saved.shape and now.dtype == saved.dtype:
        if not _equal(now, saved):
            with torch.no_grad():
                now.copy_(saved)
        return now
    if type(saved) is list and type(now) is list:
        now[:] = _copied(saved)
        return now
    if type(saved) in (dict, set) and type(now) is type(saved):
        now.clear()
        now.update(_copied(saved))
        return now
    return _copied(saved)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a != a) & (b != b)).all())
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return a is b or (isinstance(a, (int, float, str, bool, set)) and a == b)
