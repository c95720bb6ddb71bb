"""Runs a module's step for a look at it, and leaves the module as it was.

Put back afterwards: buffers, attributes and all that hangs on them (see `contents`), hooks, the mode of every module,
gradients and the global random generators. Weights are not copied; a step that writes one in place is refused, unless
it hides it from autograd (`weight.data.clamp_()`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_cpipe.errors import CutError
from lightning_cpipe.probe.contents import Contents, same_contents
from lightning_cpipe.stage.own_state import BOOKKEEPING
from lightning_cpipe.stage.randomness import unchanged

_HOOKS = tuple(key for key in vars(nn.Module()) if "_hooks" in key)
"""The dicts of hooks among them."""

Place = tuple[str, str]
"""A module's name and the name of an attribute or buffer of it."""


class Snapshot:
    """The state of a module at one moment, weights excepted."""

    def __init__(self, root: nn.Module) -> None:
        self._modules = dict(root.named_modules())
        self._weights = [(name, p, p.data, p._version, p.requires_grad, p.grad) for name, p in root.named_parameters()]
        hooks = (vars(module).get(key) for module in self._modules.values() for key in _HOOKS)
        self._hooks = [(each, dict(each)) for each in hooks if each is not None]
        self._saved = {name: _state_of(module) for name, module in self._modules.items()}
        self._contents, self._read = self._read_all()

    def changes(self) -> dict[Place, list[Any]]:
        """What differs now: where, and what stands there now, as `Contents.read` has it; nothing where it is gone."""
        before, (_, now) = self._read, self._read_all()
        places = sorted(before.keys() | now.keys())
        return {
            place: now.get(place, [])
            for place in places
            if place not in before or place not in now or not same_contents(before[place], now[place])
        }

    def restore(self) -> None:
        """Put everything back.

        Raises:
            CutError: if a weight was written in place, or got other memory.
        """
        for name, module in self._modules.items():
            saved = self._saved[name]
            for key in _state_of(module).keys() - saved.keys():
                (module._buffers if key in module._buffers else module.__dict__).pop(key)
            for key, value in saved.items():
                (module._buffers if key in module._buffers else module.__dict__)[key] = value
        for hooks, before in self._hooks:
            # The step may have registered some, and noted on an attribute that it need not do so again.
            if hooks.keys() != before.keys():
                hooks.clear()
                hooks.update(before)
        # Only what hung there before: what took its place meanwhile, such as the batch, is not to be written into.
        self._contents.put_back()
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

    def _read_all(self) -> tuple[Contents, dict[Place, list[Any]]]:
        """What hangs on the modules now."""
        contents = Contents(apart=self._modules.values())
        states = ((name, _state_of(module)) for name, module in self._modules.items())
        return contents, {(name, key): contents.read(value) for name, state in states for key, value in state.items()}


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
    attributes = {key: value for key, value in module.__dict__.items() if key not in BOOKKEEPING}
    return attributes | dict(module._buffers)
