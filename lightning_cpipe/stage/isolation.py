"""Random numbers of their own for modules that may lie on another stage.

If a block with dropout is a stub on one stage and real on another, the generator stands elsewhere after it, and the
noise that `training_step` draws next would differ between the two. So such a module draws from a state of its own,
and the outer state goes on as if the module had drawn nothing. Only a module that is called more than once in a step
takes a single number from the outer state, stub or not, so that its calls differ; an activation checkpoint, which
puts the outer state back, repeats it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_cpipe.stage.randomness import (
    TorchState,
    derived_seed,
    get_torch_state,
    next_number,
    seed_torch,
    set_torch_state,
)


class Isolation:
    """Hooks around the modules that draw.

    They act only inside `of`, in a forward as in a backward: activation checkpointing runs a forward again there,
    and it must draw the same numbers.

    Args:
        root: the whole module.
        names: of the modules.
        repeated: those of them that are called more than once in a step.
    """

    def __init__(self, root: nn.Module, names: Iterable[str], repeated: Collection[str] = ()) -> None:
        self._repeated = repeated
        self._seed: int | None = None
        self._entered: list[TorchState | None] = []
        self._handles: list[RemovableHandle] = []
        for name in names:
            self._around(root.get_submodule(name), name)

    @contextmanager
    def of(self, seed: int) -> Iterator[None]:
        """Inside, each module draws from `seed` and its own name."""
        outer, self._seed = self._seed, seed
        depth = len(self._entered)
        try:
            yield
        finally:
            # A stage that ends inside a module leaves it without its hook; the caller puts the generators back.
            del self._entered[depth:]
            self._seed = outer

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _around(self, module: nn.Module, name: str) -> None:
        def before(*_: Any) -> None:
            if self._seed is None:
                self._entered.append(None)
            else:
                parts = (name, next_number()) if name in self._repeated else (name,)
                self._entered.append(get_torch_state())
                seed_torch(derived_seed(self._seed, *parts))

        def after(*_: Any) -> None:
            state = self._entered.pop()
            if state is not None:
                set_torch_state(state)

        self._handles.append(module.register_forward_pre_hook(before, prepend=True))
        self._handles.append(module.register_forward_hook(after, always_call=True))
