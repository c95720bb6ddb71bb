"""Sees which parameters code uses, with or without a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_cpipe.tree import tensors_in


class TouchedParameters(TorchFunctionMode):
    """Notes every parameter that is given to a torch function.

    Args:
        note: is told each of them.
    """

    def __init__(self, note: Callable[[nn.Parameter], object]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tensors_in((list(args), dict(kwargs or {}))):
            if isinstance(leaf, nn.Parameter):
                self._note(leaf)
        return func(*args, **(kwargs or {}))
