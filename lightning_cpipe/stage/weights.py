"""Takes the weights of other stages out of a module, and puts them back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cpipe.stage.absent import AbsentParameter
from lightning_cpipe.stage.cut import Cut


def keep_only(root: nn.Module, cut: Cut, *stages: int) -> None:
    """Keep the weights of some stages; the others are absent from here on, and their memory is free."""
    needed = needed_by(cut, *stages)
    for name, parameter in list(root.named_parameters()):
        if name not in needed:
            replace(root, parameter, AbsentParameter.of(parameter, name, cut.homes[name][0], stages[-1]))
    freeze_stand_ins(root, cut, *stages)


def freeze_stand_ins(root: nn.Module, cut: Cut, *stages: int) -> None:
    """Let nothing be trained that stands on these stages for another's."""
    for name in _stand_ins(cut, stages):
        root.get_parameter(name).requires_grad_(False)


def needed_by(cut: Cut, *stages: int) -> set[str]:
    """The parameters that some stages hold: their own, and those that stand in there."""
    return {name for name, homes in cut.homes.items() if not set(stages).isdisjoint(homes)} | _stand_ins(cut, stages)


def _stand_ins(cut: Cut, stages: Sequence[int]) -> set[str]:
    """Where one of the stages holds the true numbers, nothing needs to stand in on another of them."""
    standing = set().union(*(cut.stand_ins[stage] for stage in stages))
    return {name for name in standing if set(stages).isdisjoint(cut.homes[name])}


def keep_true_alone(root: nn.Module, cut: Cut, *stages: int) -> None:
    """Keep what has its true numbers on these stages, and no copies of what has them elsewhere."""
    for name, parameter in list(root.named_parameters()):
        home = cut.homes[name][0]
        if home not in stages:
            replace(root, parameter, AbsentParameter.of(parameter, name, home, stages[-1]))


def unfreeze_stand_ins(root: nn.Module, cut: Cut, *stages: int) -> None:
    """Let the stand-ins of these stages be trainable again, as the user had them."""
    for name in _stand_ins(cut, stages):
        root.get_parameter(name).requires_grad_(True)


def named_numbers(root: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, by name."""
    return {**dict(root.named_parameters()), **dict(root.named_buffers())}


def make_room(root: nn.Module) -> None:
    """Give every absent parameter memory again, on the CPU; the numbers are to be filled in."""
    for parameter in list(root.parameters()):
        if isinstance(parameter, AbsentParameter):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            replace(root, parameter, nn.Parameter(empty, requires_grad=parameter.requires_grad))


def fill(root: nn.Module, numbers: Mapping[str, Tensor]) -> None:
    """Write these parameters and buffers into the module."""
    own = named_numbers(root)
    with torch.no_grad():
        for name, tensor in numbers.items():
            own[name].copy_(tensor)


class Substitutes:
    """Tensors that hang in a module, now and then, in place of its own.

    Args:
        root: the module.
        numbers: the tensors, by the names of its parameters and buffers.
    """

    def __init__(self, root: nn.Module, numbers: Mapping[str, Tensor]) -> None:
        own = named_numbers(root)
        instead = {id(own[name]): tensor for name, tensor in numbers.items() if name in own}
        self._places = [
            (module, holder, key, tensor, instead[id(tensor)])
            for module in root.modules()
            for holder in (module._parameters, module._buffers)
            for key, tensor in holder.items()
            if tensor is not None and id(tensor) in instead
        ]

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Inside, they hang there."""
        for module, holder, key, _, substitute in self._places:
            _hang(module, holder, key, substitute)
        try:
            yield
        finally:
            for module, holder, key, tensor, _ in self._places:
                _hang(module, holder, key, tensor)

    def follow(self) -> None:
        """Take over the numbers of the tensors in whose place they hang."""
        with torch.no_grad():
            for *_, tensor, substitute in self._places:
                substitute.copy_(tensor)


def standing_in(root: nn.Module, numbers: Mapping[str, Tensor]) -> AbstractContextManager[None]:
    """Inside, these tensors hang in the module in place of its parameters and buffers of the same names."""
    return Substitutes(root, numbers).hanging()


def copies_for(root: nn.Module, cut: Cut, stage: int, stages: Sequence[int]) -> dict[str, nn.Parameter]:
    """A stage's own copies of what it trains and a later stage of the same process trains, too, by name.

    Args:
        root: the module; its own parameters are for the last stage that trains them.
        cut: how it is cut.
        stage: which.
        stages: of the process.
    """
    return {
        name: nn.Parameter(parameter.detach().clone())
        for name, parameter in root.named_parameters()
        if stage in (trained_on := cut.trained_on.get(name, ())) and any(s in trained_on for s in stages if s > stage)
    }


@contextmanager
def room_for_all(root: nn.Module) -> Iterator[None]:
    """Inside, numbers of the whole module can be loaded into it; those of absent parameters are lost."""
    room = {
        name: torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        for name, parameter in root.named_parameters()
        if isinstance(parameter, AbsentParameter)
    }
    with standing_in(root, room), warnings.catch_warnings():
        # So it is meant.
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
        yield


def held_by(root: nn.Module, cut: Cut, *stages: int) -> dict[str, Tensor]:
    """Copies on the CPU of what has its true numbers on these stages; of what lies on several, the first has them.

    Copies, because a parameter is a view into a buffer that holds all of them, and is pickled with the whole of it.
    """
    parameters = {name: p for name, p in root.named_parameters() if cut.homes[name][0] in stages}
    buffers = {name: b for name, b in root.named_buffers() if cut.buffer_homes.get(name) in stages}
    return {name: t.detach().to("cpu", copy=True) for name, t in {**parameters, **buffers}.items()}


def replace(root: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put `new` wherever `old` hangs, with the attributes that users' code gave it; it may have several names."""
    vars(new).update({key: value for key, value in vars(old).items() if key not in AbsentParameter.__annotations__})
    for module in root.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is old:
                _hang(module, module._parameters, key, new)


def _hang(module: nn.Module, holder: dict[str, Any], key: str, tensor: Tensor | None) -> None:
    if isinstance(tensor, nn.Parameter):
        # Some modules keep a list of their own: `nn.LSTM` does.
        setattr(module, key, tensor)
    else:
        holder[key] = tensor
