"""Looks what each block of a step keeps in memory: weights, and what is saved for the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_cpipe.probe.step import Step
from lightning_cpipe.probe.touched import TouchedParameters
from lightning_cpipe.probe.untouched import untouched
from lightning_cpipe.torch_private import storage_id
from lightning_cpipe.tree import TensorSpec, tensors_in


@dataclass
class Holdings:
    """What one block keeps, up to where the next one begins; see `BlockCost`.

    Attributes:
        trained: bytes of each parameter that is trained, by name.
        frozen: bytes of each other parameter and buffer, by name.
        saved: bytes of each tensor that is kept for the backward, by a number.
        output: bytes of what the block returns.
        returns: shapes and dtypes of that, and what needs a gradient.
    """

    trained: dict[str, int] = field(default_factory=dict)
    frozen: dict[str, int] = field(default_factory=dict)
    saved: dict[str, int] = field(default_factory=dict)
    output: int = 0
    returns: str = ""


def find_holdings(root: nn.Module, step: Step, blocks: Sequence[str]) -> list[Holdings]:
    """Run the step's forward once and look.

    A parameter is kept by every block that uses it; one that no torch function was given, by the block around it, and
    outside of all blocks by the last one. A tensor that is saved counts with all the memory that it keeps alive; so
    does one that a block is given and that needs a gradient, since activation checkpoints keep it. What an operation
    keeps other than by saving it is not seen.

    Args:
        root: the whole module.
        step: its step.
        blocks: in the order of their calls; each is called once.
    """
    look = _Look(root, blocks)
    with untouched(root), look.at_blocks(), TouchedParameters(look.note_use), look.at_what_is_saved():
        step.run()
    return look.finish()


class _Look:
    def __init__(self, root: nn.Module, blocks: Sequence[str]) -> None:
        self._root = root
        self._blocks = blocks
        self._found = [Holdings() for _ in blocks]
        self._entered = 0
        self._names = {id(parameter): name for name, parameter in root.named_parameters()}
        self._unused = dict(root.named_parameters())
        # Kept alive: another tensor must not get the same place.
        self._own = [_memory(tensor) for tensor in (*root.parameters(), *root.buffers())]
        self._memories: dict[int, tuple[str, Any]] = {id_: ("", memory) for id_, _, memory in self._own}

    @property
    def _here(self) -> Holdings:
        """The block at hand."""
        return self._found[max(0, self._entered - 1)]

    @contextmanager
    def at_blocks(self) -> Iterator[None]:
        """Know which block is at hand."""

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._entered += 1
            for tensor in tensors_in((args, kwargs)):
                if tensor.requires_grad:
                    self._note_saved(tensor)

        def leave(holdings: Holdings) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                returned = tensors_in(output)
                holdings.returns = str([(TensorSpec.of(tensor), tensor.requires_grad) for tensor in returned])
                holdings.output = sum(TensorSpec.of(tensor).num_bytes for tensor in returned)

            return hook

        with ExitStack() as hooks:
            for name, holdings in zip(self._blocks, self._found):
                module = self._root.get_submodule(name)
                hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(leave(holdings)).remove)
            yield

    def at_what_is_saved(self) -> saved_tensors_hooks:
        """Note every tensor that autograd saves."""

        def pack(tensor: Tensor) -> Tensor:
            self._note_saved(tensor)
            # The tensor itself could lead back to the operation that saves it, and never be freed.
            return tensor.detach()

        return saved_tensors_hooks(pack, lambda tensor: tensor)

    def note_use(self, parameter: nn.Parameter) -> None:
        """The block at hand uses a parameter."""
        name = self._names.get(id(parameter))
        if name is not None:
            self._unused.pop(name, None)
            self._keep(self._here, name, parameter)

    def finish(self) -> list[Holdings]:
        """What was found, with what was not used."""
        for name, tensor in (*self._unused.items(), *self._root.named_buffers()):
            around = (own for block, own in zip(self._blocks, self._found) if name.startswith(f"{block}."))
            self._keep(next(around, self._found[-1]), name, tensor)
        return self._found

    def _keep(self, holdings: Holdings, name: str, tensor: Tensor) -> None:
        (holdings.trained if tensor.requires_grad else holdings.frozen)[name] = TensorSpec.of(tensor).num_bytes

    def _note_saved(self, tensor: Tensor) -> None:
        place, size, memory = _memory(tensor)
        number, _ = self._memories.setdefault(place, (str(len(self._memories)), memory))
        if number:
            self._here.saved[number] = size


def _memory(tensor: Tensor) -> tuple[int, int, Any]:
    """The place of a tensor's memory, its bytes, and what keeps it."""
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        # A sparse tensor, or one made of others.
        return id(tensor), TensorSpec.of(tensor).num_bytes, tensor
    return storage_id(storage), storage.nbytes(), storage
