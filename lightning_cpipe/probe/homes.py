"""Where each weight and buffer of the module lives, once it is cut."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from lightning_cpipe.errors import CutError


class Homes:
    """Fills up while the probe walks through the stages.

    A parameter that gets a gradient lives on the stage that gives it. If several do it is *tied*: the last of them owns
    it, the others hold copies. Parameters without a gradient live wherever a module that holds them is called; one that
    nobody calls lives on the last stage, so that the module can be made whole again.

    Args:
        root: the whole module.
        num_stages: p.
        called_on: for each watched module, the stages where it is called.
        trains: whether anything is trained; if not, weights never change and may lie on several stages.
    """

    def __init__(self, root: nn.Module, num_stages: int, called_on: dict[str, tuple[int, ...]], trains: bool) -> None:
        self._root = root
        self._called_on = called_on
        self._last = num_stages - 1
        self._changing = {name for name, parameter in root.named_parameters() if trains and parameter.requires_grad}
        self._touched: list[set[int]] = [set() for _ in range(num_stages)]
        self.trained_on: dict[str, tuple[int, ...]] = {}

    def note_trained(self, stage: int, names: Iterable[str]) -> None:
        """Note that these parameters get a gradient on `stage`."""
        for name in names:
            self.trained_on[name] = tuple(sorted({*self.trained_on.get(name, ()), stage}))

    def require_few_ties(self) -> None:
        """Tied parameters are an exception: each costs memory on all its stages, and traffic at every update.

        Raises:
            CutError: if a stage has nothing but ties; then something takes all parameters at once.
        """
        for stage in range(self._last):
            trained = [name for name, stages in self.trained_on.items() if stage in stages]
            if len(trained) > 1 and all(len(self.trained_on[name]) > 1 for name in trained):
                on = ", ".join(map(str, self.trained_on[trained[0]]))
                raise CutError(
                    f"each of the {len(trained)} parameters that get a gradient on stage {stage} gets one on another"
                    f" stage, too; {trained[0]!r} on the stages {on}. The last of these would have to hold them all."
                    " Take a penalty over all parameters out of the loss and into the optimizer (`weight_decay`), or"
                    " move the cut with `split_points` so that modules which share their weights lie on one stage."
                )

    def note_touched(self, stage: int, parameters: Iterable[int]) -> None:
        """Note that code on `stage` touches these parameters, given by their ids."""
        self._touched[stage].update(parameters)

    def stages_of(self, name: str) -> tuple[int, ...]:
        """The stages that hold a parameter's weights, the one with the true numbers first."""
        if name in self.trained_on:
            *users, owner = self.trained_on[name]
            return (owner, *users)
        called = self._where_called(name)
        if name in self._changing:
            return called[:1]
        parameter = self._root.get_parameter(name)
        touched = {stage for stage, ids in enumerate(self._touched) if id(parameter) in ids}
        return tuple(sorted({*called, *touched}))

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """The stages that hold each parameter's weights, by all its names: within a stage, it may be tied."""
        first: dict[nn.Parameter, str] = {}
        named = self._root.named_parameters(remove_duplicate=False)
        return {name: self.stages_of(first.setdefault(parameter, name)) for name, parameter in named}

    def buffers(self) -> dict[str, int]:
        """The stage whose copy of each buffer is the true one: the first that calls a module which holds it."""
        named = list(self._root.named_buffers(remove_duplicate=False))
        first: dict[Tensor, int] = {}
        for name, buffer in named:
            first[buffer] = min(first.get(buffer, self._last), self._where_called(name)[0])
        return {name: first[buffer] for name, buffer in named}

    def stand_ins(self, stage: int) -> frozenset[str]:
        """The parameters trained elsewhere that code on `stage` touches without giving them a gradient."""
        return frozenset(
            name
            for name, parameter in self._root.named_parameters()
            if id(parameter) in self._touched[stage] and stage not in self.stages_of(name)
        )

    def _where_called(self, name: str) -> tuple[int, ...]:
        """The stages that call the innermost watched module around a tensor."""
        holder = name
        while "." in holder:
            holder = holder.rpartition(".")[0]
            if holder in self._called_on:
                return self._called_on[holder]
        return (self._last,)
