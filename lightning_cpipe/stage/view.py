"""What modules show of their parameters: all of them, or those whose weights are here.

A hook that goes over `parameters()`, to clamp weights or to average them, means those that have numbers, and on a stage
these are its own. Who cuts the module, counts its parameters or saves it means all of them. So `named_parameters`, on
which `parameters` relies, leaves out the absent ones for a while: of every module, since users make copies and wrap
them. All else finds the absent ones as ever, and they raise when they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_cpipe.stage.absent import AbsentParameter


class View:
    """What is shown.

    Args:
        tell: is told, once for each name, who went over parameters when some were left out.
    """

    def __init__(self, tell: Callable[[str], None] = lambda by: None) -> None:
        self._tell = tell
        self._told: set[str] = set()
        self._by: str | None = None
        """Who looks inside `of_own`, or an empty string; None where all is shown."""

    @contextmanager
    def of_own(self, by: str = "") -> Iterator[None]:
        """Inside, what is here is shown. `by` is whom to tell of; nobody if it is empty."""
        before, self._by = self._by, by
        try:
            yield
        finally:
            self._by = before

    @contextmanager
    def of_all(self) -> Iterator[None]:
        """Inside, everything is shown."""
        before, self._by = self._by, None
        try:
            yield
        finally:
            self._by = before

    def open(self) -> Callable[[], None]:
        """Let modules show what this view says, until the returned function is called."""
        torchs = nn.Module.named_parameters

        def named_parameters(module: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
            for name, parameter in torchs(module, *args, **kwargs):
                if self._by is None or not isinstance(parameter, AbsentParameter):
                    yield name, parameter
                elif self._by and self._by not in self._told:
                    self._told.add(self._by)
                    self._tell(self._by)

        def close() -> None:
            nn.Module.named_parameters = torchs  # type: ignore[method-assign]

        nn.Module.named_parameters = named_parameters  # type: ignore[method-assign, assignment]
        return close
