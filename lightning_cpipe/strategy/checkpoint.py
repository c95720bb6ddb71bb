"""One plain checkpoint out of the stages' parts, and each stage's part out of a plain checkpoint.

The file is what Lightning would have written for the uncut module, so it loads there, and a file of Lightning's loads
here. Parts are joined by the names of parameters; an optimizer's state, which Lightning numbers, by the order that
the parameters had in its groups before the module was cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer

from lightning_cpipe.stage.cut import Cut
from lightning_cpipe.tree import map_tensors

State = dict[str, Any]


class Part(NamedTuple):
    """What one stage adds to a checkpoint.

    Attributes:
        state_dict: the entries whose true values are on the stage.
        optimizers: for each optimizer, the state of the stage's parameters by name.
    """

    state_dict: State
    optimizers: list[State]


class GroupOrder:
    """The names of an optimizer's parameters, group by group, as the user's module gave them.

    Args:
        optimizer: with all parameters of the whole module.
        names: of the parameters, by their ids.
    """

    def __init__(self, optimizer: Optimizer, names: Mapping[int, str]) -> None:
        strangers = [each for group in optimizer.param_groups for each in group["params"] if id(each) not in names]
        if strangers:
            raise MisconfigurationException(
                f"{type(optimizer).__name__} has {len(strangers)} parameters that are not the module's, the first of"
                f" shape {tuple(strangers[0].shape)}: no stage would train them. Register them in the module, or leave"
                " them out of the optimizer."
            )
        self.groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]

    @property
    def numbers(self) -> dict[str, int]:
        """The number that Lightning's checkpoint gives to each parameter's state."""
        return {name: number for number, name in enumerate(name for group in self.groups for name in group)}


def keep_own_parameters(optimizer: Optimizer, own: Iterable[nn.Parameter]) -> None:
    """Leave in the optimizer's groups what lives on this stage; groups stay, if need be empty."""
    ids = {id(parameter) for parameter in own}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) in ids]


def part_of(
    state_dict: State,
    optimizers: Sequence[Optimizer],
    names: Mapping[int, str],
    cut: Cut,
    stage: int,
) -> Part:
    """This stage's part.

    Args:
        state_dict: of the module on this rank, with absent entries.
        optimizers: on this rank.
        names: of all parameters, by their ids.
        cut: how the module is cut.
        stage: this one.
    """
    mine = {key: value for key, value in state_dict.items() if _home(key, cut) == stage}
    states = [{names[id(p)]: state for p, state in optimizer.state.items()} for optimizer in optimizers]
    return Part(_on_cpu(mine), [_on_cpu(each) for each in states])


def joined(checkpoint: State, parts: Sequence[Part], orders: Sequence[GroupOrder]) -> State:
    """The checkpoint of the whole module, out of rank 0's and everyone's parts."""
    everything = {key: value for part in parts for key, value in part.state_dict.items()}
    whole = {**checkpoint, "state_dict": {key: everything[key] for key in checkpoint["state_dict"]}}
    if "optimizer_states" in checkpoint:
        whole["optimizer_states"] = [
            _joined_optimizer(saved, [part.optimizers[i] for part in parts], order)
            for i, (saved, order) in enumerate(zip(checkpoint["optimizer_states"], orders))
        ]
    return whole


def own_state_dict(state_dict: State, module: nn.Module, cut: Cut, stage: int, strict: bool) -> State:
    """The entries of a whole state dict that this stage loads.

    Raises:
        RuntimeError: if `strict`, and the keys are not the whole module's; as `load_state_dict` has it.
    """
    expected = module.state_dict().keys()
    missing, unexpected = sorted(expected - state_dict.keys()), sorted(state_dict.keys() - expected)
    if strict and (missing or unexpected):
        raise RuntimeError(
            f"Error(s) in loading state_dict for {type(module).__name__}: missing keys: {missing}; unexpected keys:"
            f" {unexpected}."
        )
    return {
        key: value for key, value in state_dict.items() if key in expected and stage in cut.homes.get(key, (stage,))
    }


def own_optimizer_state(saved: State, optimizer: Optimizer, order: GroupOrder, names: Mapping[int, str]) -> State:
    """What `optimizer` loads on this stage, out of the state of the uncut module's optimizer.

    Raises:
        ValueError: if the groups are not those of the uncut module's optimizer; as `Optimizer.load_state_dict` has it.
    """
    _require_same_sizes([len(group["params"]) for group in saved["param_groups"]], list(map(len, order.groups)))
    state: dict[int, Any] = {}
    groups: list[dict[str, Any]] = []
    for group, saved_group, group_names in zip(optimizer.param_groups, saved["param_groups"], order.groups):
        number_of = dict(zip(group_names, saved_group["params"]))
        numbers: list[int] = []
        for parameter in group["params"]:
            own_number = sum(len(each["params"]) for each in groups) + len(numbers)
            if (found := saved["state"].get(number_of[names[id(parameter)]])) is not None:
                state[own_number] = found
            numbers.append(own_number)
        groups.append({**saved_group, "params": numbers})
    return {"state": state, "param_groups": groups}


def _require_same_sizes(saved: list[int], own: list[int]) -> None:
    if len(saved) != len(own):
        raise ValueError("loaded state dict has a different number of parameter groups")
    if saved != own:
        raise ValueError(
            "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
        )


def _joined_optimizer(saved: State, states: Sequence[State], order: GroupOrder) -> State:
    numbers = order.numbers
    state = {numbers[name]: value for part in states for name, value in part.items()}
    groups = [
        {**group, "params": [numbers[name] for name in names]}
        for group, names in zip(saved["param_groups"], order.groups)
    ]
    return {"state": dict(sorted(state.items())), "param_groups": groups}


def _home(key: str, cut: Cut) -> int:
    """The stage whose value of a state dict's entry counts; the last stage's for what is neither weight nor buffer."""
    if key in cut.homes:
        return cut.homes[key][0]
    return cut.buffer_homes.get(key, cut.num_stages - 1)


def _on_cpu(tree: State) -> State:
    """Copies on the CPU: training goes on while they are sent."""
    copied: State = map_tensors(lambda tensor: tensor.detach().to("cpu", copy=True), tree)
    return copied
