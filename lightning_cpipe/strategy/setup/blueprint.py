"""A module that `configure_model` built without its weights, and that can be built again with some of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_cpipe.errors import CutError
from lightning_cpipe.stage.building import Built, building
from lightning_cpipe.stage.randomness import derived_seed, get_state, same_state, set_state, unchanged
from lightning_cpipe.stage.weights import replace


class Blueprint:
    """Builds a module several times, from the same generator states, as if it had been built once.

    Args:
        module: what is to be built; some of it may be there already.
        build: builds the rest: registers parameters in `module`.
        device: where.
    """

    def __init__(self, module: nn.Module, build: Callable[[], None], device: torch.device) -> None:
        self._module = module
        self._build = build
        self._device = device
        self._frame = _Frame(module)
        self._begin = self._end = get_state()
        self._names: list[str | None] = []
        self._built = Built()

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """The module is built inside; afterwards its weights are on the meta device, and all else is there."""
        try:
            with building(lambda place: False, self._device) as self._built:
                yield
        finally:
            self._frame.note_changes()
        names = {id(parameter): name for name, parameter in self._module.named_parameters()}
        # What is in no place of the finished module served to make something that is.
        self._names = [names.get(id(parameter)) for parameter in self._built.parameters]
        self._end = get_state()
        self._move_to_meta(self.hollow)

    @property
    def hollow(self) -> set[str]:
        """The names of the parameters that were built without numbers."""
        return {name for name in self._names if name is not None}

    @property
    def fingerprint(self) -> int:
        """Follows from what was built, and from what was drawn for it."""
        (of_torch, _), _, _ = self._end
        return derived_seed(self._names, _described(self._built), of_torch.numpy().tobytes())

    def build(self, wanted: Collection[str]) -> None:
        """Build again, with the numbers of these parameters; the others are on the meta device afterwards.

        Raises:
            LostNumbersError: if one of them is made from one that is not wanted.
            CutError: if the code built something else than before.
        """
        keeps = self._kept(wanted)
        with unchanged():
            self._start_again()
            with building(keeps.__contains__, self._device) as built:
                self._build()
            same = same_state(get_state(), self._end)
        if not same or _described(built) != _described(self._built):
            raise CutError(
                f"`configure_model` of {type(self._module).__name__} built something else the second time, or drew"
                " other random numbers. In a pipeline it is called twice, from the same generator states and with the"
                " module as it was: first to see what there is, then for each rank's own weights. Let it follow from"
                " the module's attributes alone, and draw from the global generators only."
            )
        self._move_to_meta(self.hollow - set(wanted))

    def build_whole(self) -> None:
        """Build again, as if there had been no first time."""
        self._start_again()
        self._build()

    def _move_to_meta(self, names: Collection[str]) -> None:
        for name, parameter in list(self._module.named_parameters()):
            if name in names:
                moved = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
                replace(self._module, parameter, moved)

    def _start_again(self) -> None:
        self._frame.put_back()
        set_state(self._begin)

    def _kept(self, wanted: Collection[str]) -> set[int]:
        kept = {place for place, name in enumerate(self._names) if name is None or name in wanted}
        for place in sorted(kept, reverse=True):
            while (source := self._built.copied_from.get(place)) is not None:
                kept.add(place := source)
        return kept


def _described(built: Built) -> list[Any]:
    return [(each.shape, each.dtype) for each in built.parameters]


class _Frame:
    """What hangs on a module and its children."""

    def __init__(self, root: nn.Module) -> None:
        self._saved = [(vars(module), _held_by(vars(module))) for module in root.modules()]
        self._new: list[tuple[dict[str, Any], str]] = []

    def note_changes(self) -> None:
        """Only what has changed by now will be put back; what others change later stays."""
        self._new = [(attributes, key) for attributes, saved in self._saved for key in attributes.keys() - saved.keys()]
        self._saved = [
            (attributes, {key: was for key, was in saved.items() if not was.is_still(attributes.get(key, self))})
            for attributes, saved in self._saved
        ]

    def put_back(self) -> None:
        """Let the module be what it was."""
        for attributes, key in self._new:
            attributes.pop(key, None)
        for attributes, saved in self._saved:
            attributes.update({key: was.put_back() for key, was in saved.items()})


class _Held:
    """A value and, if it is a plain container, what it held."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self._items: Any = value.copy() if isinstance(value, _CONTAINERS) else None

    def is_still(self, now: Any) -> bool:
        return now is self._value and (self._items is None or _identities(now) == _identities(self._items))

    def put_back(self) -> Any:
        if self._items is not None:
            self._value.clear()
            (self._value.extend if isinstance(self._value, list) else self._value.update)(self._items)
        return self._value


_CONTAINERS = (list, dict, set)


def _held_by(attributes: dict[str, Any]) -> dict[str, _Held]:
    return {key: _Held(value) for key, value in attributes.items()}


def _identities(container: Any) -> list[int]:
    if isinstance(container, dict):
        return [id(each) for pair in container.items() for each in pair]
    return [*map(id, container)] if isinstance(container, list) else sorted(map(id, container))
