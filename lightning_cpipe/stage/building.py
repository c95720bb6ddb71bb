"""Builds a module of which only some parameters keep memory, with the numbers that they have in the whole module.

All of the module's own code runs, and every initialiser draws what it always draws. A parameter that is not kept
loses its memory soon after the code turns to the next one, and gets it back for as long as it is written to. So the
generators go the way that they go when the whole module is built, and what is kept gets the same numbers, to the bit;
the memory needed is that of what is kept, and of one parameter more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_parameter_registration_hook

from lightning_cpipe.errors import LostNumbersError
from lightning_cpipe.stage.pages import drop_numbers
from lightning_cpipe.torch_private import TorchDispatchMode, is_view, pytree, written_arguments


@dataclass
class Built:
    """The parameters that were built, in the order in which they were registered or copied: it is the same each time.

    Attributes:
        parameters: one that is registered under several names is here as often.
        copied_from: the place of the parameter that this one is a deep copy of.
    """

    parameters: list[nn.Parameter] = field(default_factory=list)
    copied_from: dict[int, int] = field(default_factory=dict)


@contextmanager
def building(keeps: Callable[[int], bool], device: torch.device) -> Iterator[Built]:
    """Modules are built inside. Afterwards, parameters that are not kept have a shape, and no memory; see `hollow`.

    Args:
        keeps: whether the parameter that comes in this place keeps its memory.
        device: where to build what the code would build on the meta device, to have it filled in later.

    Raises:
        LostNumbersError: if what a parameter held is needed after it lost its memory.
    """
    built, memory = Built(), _Memory(device)

    def register(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if keeps(len(built.parameters)):
            memory.keep(parameter)
        else:
            memory.let_go(parameter)
        built.parameters.append(parameter)

    def deepcopy(parameter: nn.Parameter, memo: dict[int, Any]) -> Any:
        """A deep copy of a module registers nothing."""
        if id(parameter) in memo:
            return memo[id(parameter)]
        place = len(built.parameters)
        sources = [i for i, each in enumerate(built.parameters) if each is parameter]
        if sources:
            built.copied_from[place] = sources[0]
        if keeps(place):
            copied = copy(parameter, memo)
            memory.keep(copied)
        else:
            copied = memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter), parameter.requires_grad)
            memory.let_go(copied)
        built.parameters.append(copied)
        return copied

    copy: Callable[..., Any] = nn.Parameter.__deepcopy__
    with ExitStack() as stack:
        stack.callback(memory.hollow_out)
        stack.callback(register_module_parameter_registration_hook(register).remove)
        nn.Parameter.__deepcopy__ = deepcopy  # type: ignore[method-assign, assignment]
        stack.callback(setattr, nn.Parameter, "__deepcopy__", copy)
        stack.enter_context(memory)
        yield built


def hollow(parameter: nn.Parameter) -> None:
    """Let a parameter have its shape, its class and its place in the module, and no memory: a single zero."""
    parameter.data = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)


class _Memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets the memory go of what is not kept, as soon as an operation is about another parameter."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._parameters: list[nn.Parameter] = []
        self._sizes: dict[torch.UntypedStorage, int] = {}
        self._present: dict[torch.UntypedStorage, int] = {}
        self._largest = 0
        self._made_here: set[Any] = set()
        self._too_many = 1000

    def keep(self, parameter: nn.Parameter) -> None:
        """This one is kept; it makes as much room as if it were not, so that what can be read does not depend on it."""
        storage = self._made_for(parameter)
        if storage is not None:
            self._largest = max(self._largest, storage.nbytes())

    def let_go(self, parameter: nn.Parameter) -> None:
        """This one is not kept."""
        self._parameters.append(parameter)
        storage = self._made_for(parameter)
        if storage is not None and storage not in self._sizes:
            self._sizes[storage] = storage.nbytes()
            self._largest = max(self._largest, storage.nbytes())
            self._make_present({storage})

    def hollow_out(self) -> None:
        """Everything is built."""
        for parameter in self._parameters:
            hollow(parameter)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == _META:
            kwargs["device"] = self._device
        given = set(map(_storage_of, pytree.tree_leaves((args, kwargs))))
        if (storages := self._sizes.keys() & given) and not is_view(func):
            written = set(map(_storage_of, pytree.tree_leaves(written_arguments(func, args, kwargs))))
            if not storages <= self._present.keys() | written and not _needs_no_numbers(func):
                raise LostNumbersError(
                    f"an initialiser reads, in {func}, the numbers of a parameter that is not built on this rank."
                )
            self._make_present(storages)
        made = func(*args, **kwargs)
        new = set(map(_storage_of, pytree.tree_leaves(made))) - given - {None}
        self._made_here.update(map(_reference, new))
        if len(self._made_here) > self._too_many:
            self._made_here = {each for each in self._made_here if not each.expired()}
            self._too_many = 1000 + 2 * len(self._made_here)
        return made

    def _made_for(self, parameter: nn.Parameter) -> torch.UntypedStorage | None:
        """The memory of a parameter, unless it was there before or came from a file: it may be somebody else's too."""
        storage = _storage_of(parameter)
        return storage if storage is not None and _reference(storage) in self._made_here else None

    def _make_present(self, storages: set[torch.UntypedStorage]) -> None:
        for storage in storages:
            # As the latest.
            self._present.pop(storage, None)
            self._present[storage] = self._sizes[storage]
        room = _ROOM * self._largest
        for storage in [each for each in self._present if each not in storages]:
            if sum(self._present.values()) <= room:
                break
            del self._present[storage]
            if storage.device.type == "cpu":
                drop_numbers(storage)
            else:
                storage.resize_(0)
        for storage in storages:
            if not storage.nbytes():
                storage.resize_(self._sizes[storage])


_ROOM = 1.25
"""Of the size of the largest parameter. A bias that is made after a weight need not cost its numbers."""

_reference: Any = StorageWeakRef

_META = torch.device("meta")


def _storage_of(leaf: Any) -> torch.UntypedStorage | None:
    return leaf.untyped_storage() if isinstance(leaf, Tensor) and leaf.layout is torch.strided else None


def _needs_no_numbers(func: Any) -> bool:
    """Whether it looks at shapes alone, as `empty_like` and `new_zeros` do."""
    name = str(func.overloadpacket).rpartition(".")[2]
    return name.endswith("_like") or name.startswith("new_")
