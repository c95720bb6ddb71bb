"""One optimizer's state out of the stages' parts, and each stage's part out of a whole one.

Lightning numbers what an optimizer keeps, by the order of the parameters in its groups. So that order is noted before
the module is cut, and parts are joined by the names of parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from itertools import compress
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer

from lightning_cpipe.tree import map_tensors

State = dict[str, Any]

IN_FLIGHT = "lightning_cpipe"
"""What a checkpoint calls all that it holds of what is in flight, see `exact_resume`."""

_GIVEN_NAMES = "param_names"
"""Where a group keeps the names of its parameters if the optimizer was given `named_parameters()`, since torch 2.6."""


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """All of an optimizer's parameters."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class GroupOrder:
    """The names of an optimizer's parameters, group by group, as the user's module gave them.

    Args:
        optimizer: with all parameters of the whole module.
        names: of the parameters, by their ids.
    """

    def __init__(self, optimizer: Optimizer, names: Mapping[int, str]) -> None:
        strangers = [each for each in parameters_of(optimizer) if id(each) not in names]
        if strangers:
            raise MisconfigurationException(
                f"{type(optimizer).__name__} has {len(strangers)} parameters that are not the module's, the first of"
                f" shape {tuple(strangers[0].shape)}: no stage would train them. Register them in the module, or leave"
                " them out of the optimizer."
            )
        self.groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
        self.given_names = [_given_names(group) for group in optimizer.param_groups]

    def restore(self, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put all parameters into the groups again, given by name."""
        for group, names, given_names in zip(optimizer.param_groups, self.groups, self.given_names):
            group.update(given_names)
            group["params"] = [parameters[name] for name in names]

    @property
    def numbers(self) -> dict[str, int]:
        """The number that Lightning's checkpoint gives to each parameter's state."""
        return {name: number for number, name in enumerate(name for group in self.groups for name in group)}


def keep_own_parameters(optimizer: Optimizer, own: Iterable[nn.Parameter]) -> None:
    """Leave in the optimizer what lives on this stage; groups stay, if need be empty."""
    ids = {id(parameter) for parameter in own}
    # Some optimizers, such as Adagrad, make it for all parameters at once.
    for parameter in [each for each in optimizer.state if id(each) not in ids]:
        del optimizer.state[parameter]
    for group in optimizer.param_groups:
        kept = [id(parameter) in ids for parameter in group["params"]]
        group.update(_given_names(group, kept))
        group["params"] = list(compress(group["params"], kept))


def state_by_name(optimizer: Optimizer, names: Mapping[int, str]) -> State:
    """What the optimizer keeps for this stage's parameters, by their names."""
    return on_cpu({names[id(parameter)]: state for parameter, state in optimizer.state.items()})


def numbered(everyones: Sequence[State], order: GroupOrder) -> dict[int, Any]:
    """The states of all stages' parameters by their numbers in the whole module's optimizer, from those by name."""
    numbers = order.numbers
    return dict(sorted((numbers[name], value) for part in everyones for name, value in part.items()))


def whole_optimizer_state(
    own: State, state: MutableMapping[Any, Any], order: GroupOrder, called: Mapping[str, Any]
) -> State:
    """That of the whole module's optimizer.

    Args:
        own: one stage's, whose groups have the options of all.
        state: of the parameters.
        order: of their names.
        called: what `state` calls them, by their names.
    """
    # A learning rate may be a tensor, which a scheduler writes into while the state is written to a file.
    options = on_cpu({"groups": own["param_groups"]})["groups"]
    groups = [
        {**group, **given_names, "params": [called[name] for name in names]}
        for group, given_names, names in zip(options, order.given_names, order.groups)
    ]
    return {"state": state, "param_groups": groups}


def own_optimizer_state(saved: State, optimizer: Optimizer, order: GroupOrder, names: Mapping[int, str]) -> State:
    """What `optimizer` loads on this stage, out of the state of the uncut module's optimizer.

    Raises:
        ValueError: if the groups are not those of the uncut module's optimizer; as `Optimizer.load_state_dict` has it.
    """
    _require_same_sizes([len(group["params"]) for group in saved["param_groups"]], list(map(len, order.groups)))
    state: dict[int, Any] = {}
    groups: list[dict[str, Any]] = []
    for group, saved_group, group_names in zip(optimizer.param_groups, saved["param_groups"], order.groups):
        own_names = {names[id(parameter)] for parameter in group["params"]}
        kept = [name in own_names for name in group_names]
        numbers: list[int] = []
        for number in compress(saved_group["params"], kept):
            own_number = sum(len(each["params"]) for each in groups) + len(numbers)
            if (found := saved["state"].get(number)) is not None:
                state[own_number] = found
            numbers.append(own_number)
        groups.append({**saved_group, **_given_names(saved_group, kept), "params": numbers})
    return {"state": state, "param_groups": groups}


def _given_names(group: State, kept: Sequence[bool] | None = None) -> State:
    """The names that a group was given for its parameters, for those that are `kept`; nothing if it was given none."""
    if _GIVEN_NAMES not in group:
        return {}
    return {_GIVEN_NAMES: list(group[_GIVEN_NAMES] if kept is None else compress(group[_GIVEN_NAMES], kept))}


def _require_same_sizes(saved: list[int], own: list[int]) -> None:
    if len(saved) != len(own):
        raise ValueError("loaded state dict has a different number of parameter groups")
    if saved != own:
        raise ValueError(
            "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
        )


def on_cpu(tree: State) -> State:
    """Copies on the CPU: training goes on while they are sent, and what they were read from may change."""
    copied: State = map_tensors(lambda tensor: tensor.detach().to("cpu", copy=True), tree)
    return copied
