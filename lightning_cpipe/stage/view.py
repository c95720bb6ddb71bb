"""What modules show of their parameters: all of them, or those whose weights are here.

A hook that goes over `parameters()`, to clamp weights or to average them, means those that have numbers, and on a stage
these are its own. Who cuts the module, counts its parameters or saves it means all of them. So `named_parameters`, on
which `parameters` relies, leaves out the absent ones for a while: of every module, since users make copies and wrap
them. A module that was not cut has no absent ones, so it shows what it always did. All else finds the absent ones as
ever, and they raise when they are used; so do other threads, which the hook knows nothing of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import local
from typing import Any

from torch import nn

from lightning_cpipe.stage.absent import AbsentParameter


class _Looking(local):
    """Each thread looks for itself.

    Attributes:
        by: who looks inside `View.of_own`, or an empty string; None where all is shown.
    """

    by: str | None = None


class View:
    """What is shown.

    Args:
        tell: is told, once for each name, who went over parameters when some were left out.
    """

    def __init__(self, tell: Callable[[str], None] = lambda by: None) -> None:
        self._tell = tell
        self._told: set[str] = set()
        self._looking = _Looking()

    @contextmanager
    def of_own(self, by: str = "") -> Iterator[None]:
        """Inside, what is here is shown. `by` is whom to tell of; nobody if it is empty."""
        with self._for(by):
            yield

    @contextmanager
    def of_all(self) -> Iterator[None]:
        """Inside, everything is shown."""
        with self._for(None):
            yield

    @contextmanager
    def _for(self, by: str | None) -> Iterator[None]:
        before, self._looking.by = self._looking.by, by
        try:
            yield
        finally:
            self._looking.by = before

    def open(self) -> Callable[[], None]:
        """Let modules show what this view says, until the returned function is called."""
        torchs, is_open = nn.Module.named_parameters, True

        def named_parameters(module: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
            for name, parameter in torchs(module, *args, **kwargs):
                by = self._looking.by if is_open else None
                if by is None or not isinstance(parameter, AbsentParameter):
                    yield name, parameter
                elif by and by not in self._told:
                    self._told.add(by)
                    self._tell(by)

        def close() -> None:
            nonlocal is_open
            is_open = False
            # What somebody else put in its place meanwhile, and may go through it, stays.
            if nn.Module.named_parameters is named_parameters:
                nn.Module.named_parameters = torchs  # type: ignore[method-assign]

        nn.Module.named_parameters = named_parameters  # type: ignore[method-assign, assignment]
        return close
