"""A parameter whose weights live on another stage.

It keeps its name, shape and dtype, so that the module tree, summaries and the groups of optimizers read as in the
whole module, and takes no memory. Any computation with it, and any attempt to save it, is an error that says which
weight was used and where it lives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lightning_cpipe.errors import AbsentWeightError
from lightning_cpipe.torch_private import instance_of_subclass, no_torch_function, pytree


class AbsentParameter(nn.Parameter):
    """Stands in the module for a parameter of another stage.

    Attributes:
        full_name: the parameter's name in the whole module.
        home: the stage that holds its weights.
        here: the stage that was asked for them.
    """

    full_name: str
    home: int
    here: int

    # Shape, dtype and the like never reach torch's dispatcher; what reaches it would compute.
    __torch_function__ = no_torch_function

    @classmethod
    def of(cls, parameter: Tensor, name: str, home: int, here: int) -> AbsentParameter:
        """What stands for `parameter`."""
        return _absent(tuple(parameter.shape), parameter.dtype, parameter.requires_grad, name, home, here)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Refuse what computes, by name. What would only move or convert the weights finds none to move."""
        if func in _MOVES:
            # A new one: autograd takes what comes back for the result of a computation.
            moved = args[0]
            dtype = (kwargs or {}).get("dtype") or moved.dtype
            return _absent(tuple(moved.shape), dtype, False, moved.full_name, moved.home, moved.here)
        absent = next(_absent_in((args, kwargs)))
        raise AbsentWeightError(
            f"stage {absent.here} used the parameter {absent.full_name!r} (in {func}), whose weights live on stage"
            f" {absent.home}. Code that runs outside the step, or between modules on every stage, sees only the"
            " weights of its own stage: use the parameter inside the module that owns it, and call that module in the"
            " step. After a run, a module that was too big to be built as a whole stays in parts."
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Says where the weights are."""
        return f"AbsentParameter({self.full_name!r}, shape={tuple(self.shape)}, weights on stage {self.home})"

    def __deepcopy__(self, memo: dict[int, Any]) -> AbsentParameter:
        """One of its own; there is nothing to copy."""
        return type(self).of(self, self.full_name, self.home, self.here)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse to be pickled, by name: in a file, the weights would be missing and nobody would know."""
        raise AbsentWeightError(
            f"stage {self.here} was asked to save the parameter {self.full_name!r}, whose weights live on stage"
            f" {self.home}. While a pipeline runs, save with `trainer.save_checkpoint(path)`, called on every rank;"
            " `on_save_checkpoint` gets the whole state dict. Or save when the run is over: the module is whole"
            " then, unless it was too big to be built as a whole. (If it is among the hyperparameters:"
            " `self.save_hyperparameters(ignore=...)`.)"
        )


def _metadata(absent: AbsentParameter) -> tuple[Callable[..., AbsentParameter], tuple[Any, ...]]:
    shape = tuple(absent.shape)
    return _absent, (shape, absent.dtype, absent.requires_grad, absent.full_name, absent.home, absent.here)


def _absent(
    shape: tuple[int, ...], dtype: torch.dtype, requires_grad: bool, name: str, home: int, here: int
) -> AbsentParameter:
    empty = torch.empty(shape, dtype=dtype, device="meta")
    absent = instance_of_subclass(AbsentParameter, empty, requires_grad)
    absent.full_name, absent.home, absent.here = name, home, here
    return absent


def _absent_in(tree: Any) -> Iterator[AbsentParameter]:
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, AbsentParameter))


_MOVES = frozenset({torch.ops.aten.detach.default, torch.ops.aten._to_copy.default})

# To another process it goes as what it is: a data loader's worker may be sent a module along with its dataset.
ForkingPickler.register(AbsentParameter, _metadata)
