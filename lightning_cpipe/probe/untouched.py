"""Runs a module's step for a look at it, and leaves the module as it was.

Put back afterwards: buffers, attributes (tensors, lists, dicts, sets and deques in them included), the mode of every
module, gradients and every random generator. An object of any other class that a step changes from inside stays
changed. Weights are not copied; a step that writes one in place is refused, unless it hides it from autograd
(`weight.data.clamp_()`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cpipe.equality import same_leaf
from lightning_cpipe.errors import CutError
from lightning_cpipe.stage.randomness import unchanged

_NOT_STATE = frozenset({"_parameters", "_buffers", "_modules"})

Place = tuple[str, str]
"""A module's name and the name of an attribute or buffer of it."""


class Snapshot:
    """The state of a module at one moment, weights excepted."""

    def __init__(self, root: nn.Module) -> None:
        self._modules = dict(root.named_modules())
        self._weights = [(name, p, p.data, p._version, p.requires_grad, p.grad) for name, p in root.named_parameters()]
        self._saved = {
            name: {key: _Kept(value) for key, value in _state_of(module).items()}
            for name, module in self._modules.items()
        }

    def changes(self) -> dict[Place, Any]:
        """What differs now: where, and what stands there now (copies; None where it is gone)."""
        found: dict[Place, Any] = {}
        for name, module in self._modules.items():
            before, now = self._saved[name], _state_of(module)
            for key in before.keys() | now.keys():
                if key not in before or key not in now or not before[key].equals(now[key]):
                    found[name, key] = _copied(now.get(key))
        return dict(sorted(found.items()))

    def restore(self) -> None:
        """Put everything back.

        Raises:
            CutError: if a weight was written in place, or got other memory.
        """
        for name, module in self._modules.items():
            saved = self._saved[name]
            for key in _state_of(module).keys() - saved.keys():
                (module._buffers if key in module._buffers else module.__dict__).pop(key)
            for key, kept in saved.items():
                holder = module._buffers if key in module._buffers else module.__dict__
                holder[key] = kept.put_back()
        written = []
        for name, parameter, data, version, requires_grad, grad in self._weights:
            moved = parameter.data_ptr() != data.data_ptr()
            if moved or parameter._version != version:
                written.append(name)
            if moved:
                parameter.data = data
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        if written:
            raise CutError(
                f"the step writes the parameter {written[0]!r} in place. In a pipeline its other copies and the older"
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
        key: value
        for key, value in module.__dict__.items()
        if key not in _NOT_STATE and not key.endswith("_hooks") and not key.endswith("_hooks_with_kwargs")
    }
    return attributes | dict(module._buffers)


class _Kept:
    """A value, and what it held.

    Two things may happen to an attribute: it is written into, or it is bound to something else. Only the value of
    before is put back, and what it held; the something else (a batch, say) is not to be written into.
    """

    def __init__(self, value: Any) -> None:
        self._value = value
        self._held: Any = None
        if isinstance(value, Tensor):
            self._held = value.detach().clone()
        elif type(value) in (list, tuple, deque):
            self._held = [_Kept(item) for item in value]
        elif type(value) is dict:
            self._held = {key: _Kept(item) for key, item in value.items()}
        elif type(value) is set:
            self._held = set(value)

    def equals(self, now: Any) -> bool:
        """Whether `now` holds what the value held."""
        if isinstance(self._value, Tensor) and isinstance(now, Tensor):
            return same_leaf(self._held, now)
        if type(self._value) is not type(now):
            return False
        if isinstance(self._held, list):
            return len(self._held) == len(now) and all(kept.equals(item) for kept, item in zip(self._held, now))
        if isinstance(self._held, dict):
            return self._held.keys() == now.keys() and all(kept.equals(now[key]) for key, kept in self._held.items())
        if isinstance(self._held, set):
            return bool(self._held == now)
        return self._value is now or (isinstance(now, (int, float, str)) and self._value == now)

    def put_back(self) -> Any:
        """The value, with what it held."""
        value = self._value
        if isinstance(value, Tensor):
            if value.shape != self._held.shape or value.dtype != self._held.dtype:
                value.data = self._held
            elif not same_leaf(self._held, value):
                with torch.no_grad():
                    value.copy_(self._held)
        elif isinstance(self._held, list):
            items = [kept.put_back() for kept in self._held]
            if not isinstance(value, tuple):
                value.clear()
                value.extend(items)
        elif isinstance(self._held, dict):
            value.clear()
            value.update({key: kept.put_back() for key, kept in self._held.items()})
        elif isinstance(self._held, set):
            value.clear()
            value.update(self._held)
        return value


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (list, tuple, set, deque):
        return type(value)(_copied(item) for item in value)
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    return value
