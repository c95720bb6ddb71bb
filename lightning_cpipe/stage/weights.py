"""Takes the weights of other stages out of a module, and puts them back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cpipe.stage.absent import AbsentParameter
from lightning_cpipe.stage.cut import Cut


def keep_only(root: nn.Module, cut: Cut, stage: int) -> None:
    """Keep the weights of one stage; the others are absent from here on, and their memory is free."""
    for name, parameter in list(root.named_parameters()):
        if stage not in cut.homes[name] and name not in cut.stand_ins[stage]:
            replace(root, parameter, AbsentParameter.of(parameter, name, cut.homes[name][0], stage))
    freeze_stand_ins(root, cut, stage)


def freeze_stand_ins(root: nn.Module, cut: Cut, stage: int) -> None:
    """Let nothing be trained that stands on this stage for another's."""
    for name in cut.stand_ins[stage]:
        root.get_parameter(name).requires_grad_(False)


def needed_by(cut: Cut, stage: int) -> set[str]:
    """The parameters that a stage holds: its own, and those that stand in there."""
    return {name for name, homes in cut.homes.items() if stage in homes} | cut.stand_ins[stage]


def keep_true_alone(root: nn.Module, cut: Cut, stage: int) -> None:
    """Keep what has its true numbers on this stage, and no copies of what has them elsewhere."""
    for name, parameter in list(root.named_parameters()):
        home = cut.homes[name][0]
        if home != stage:
            replace(root, parameter, AbsentParameter.of(parameter, name, home, stage))


def unfreeze_stand_ins(root: nn.Module, cut: Cut, stage: int) -> None:
    """Let the stand-ins of a stage be trainable again, as the user had them."""
    for name in cut.stand_ins[stage]:
        root.get_parameter(name).requires_grad_(True)


def make_room(root: nn.Module) -> None:
    """Give every absent parameter memory again, on the CPU; the numbers are to be filled in."""
    for parameter in list(root.parameters()):
        if isinstance(parameter, AbsentParameter):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            replace(root, parameter, nn.Parameter(empty, requires_grad=parameter.requires_grad))


def fill(root: nn.Module, numbers: Mapping[str, Tensor]) -> None:
    """Write these parameters and buffers into the module."""
    own: dict[str, Tensor] = {**dict(root.named_parameters()), **dict(root.named_buffers())}
    with torch.no_grad():
        for name, tensor in numbers.items():
            own[name].copy_(tensor)


@contextmanager
def standing_in(root: nn.Module, numbers: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, these tensors hang in the module in place of its parameters and buffers of the same names."""
    own: dict[str, Tensor] = {**dict(root.named_parameters()), **dict(root.named_buffers())}
    instead = {id(own[name]): tensor for name, tensor in numbers.items() if name in own}
    replaced = [
        (module, holder, key, tensor)
        for module in root.modules()
        for holder in (module._parameters, module._buffers)
        for key, tensor in holder.items()
        if id(tensor) in instead
    ]
    for module, holder, key, tensor in replaced:
        _hang(module, holder, key, instead[id(tensor)])
    try:
        yield
    finally:
        for module, holder, key, tensor in replaced:
            _hang(module, holder, key, tensor)


def room_for_absent(root: nn.Module) -> dict[str, Tensor]:
    """What every absent parameter's numbers may be loaded into, and are lost in; by name."""
    return {
        name: torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        for name, parameter in root.named_parameters()
        if isinstance(parameter, AbsentParameter)
    }


def held_by(root: nn.Module, cut: Cut, stage: int) -> dict[str, Tensor]:
    """Copies on the CPU of what has its true numbers on this stage; of what lies on several, the first has them.

    Copies, because a parameter is a view into a buffer that holds all of them, and is pickled with the whole of it.
    """
    parameters = {name: p for name, p in root.named_parameters() if cut.homes[name][0] == stage}
    buffers = {name: b for name, b in root.named_buffers() if cut.buffer_homes.get(name) == stage}
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
