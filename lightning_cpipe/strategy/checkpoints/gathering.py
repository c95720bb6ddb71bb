"""The numbers of a module, or of a copy of one, from all ranks on rank 0, which does not wait for them."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from lightning_cpipe.stage.cut import Cut
from lightning_cpipe.stage.weights import held_by, named_numbers
from lightning_cpipe.strategy.checkpoints.promised import Promised
from lightning_cpipe.transport.parcels import Parcels


def gather_numbers(
    parcels: Parcels, topic: str, root: nn.Module, cut: Cut, stages: Sequence[int]
) -> dict[str, Promised]:
    """Bring copies of the weights and buffers of all stages to rank 0; all ranks must call it.

    Args:
        parcels: this rank's end.
        topic: what `root` is.
        root: the module, or one of its structure.
        cut: how it is cut.
        stages: of this rank.

    Returns:
        On rank 0, what stands for them, by name; elsewhere nothing.
    """
    everyones = parcels.give(topic, lambda: held_by(root, cut, *stages))
    if not parcels.gathers:
        return {}

    def number(name: str) -> Tensor:
        numbers: Mapping[str, Tensor] = ChainMap(*everyones.result())
        return numbers[name]

    with_home = homes(cut)
    return {name: Promised.of(partial(number, name)) for name in named_numbers(root) if name in with_home}


def homes(cut: Cut) -> dict[str, int]:
    """The stage where each parameter and buffer has its true numbers, by name."""
    return {**{name: stages[0] for name, stages in cut.homes.items()}, **cut.buffer_homes}
