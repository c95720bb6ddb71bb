"""Pipeline parallelism for Lightning that is never flushed.

Importing this package registers ``strategy="continuous_pipe"`` (and ``_spawn``, ``_fork``, ``_notebook``):

    import lightning.pytorch as pl
    import lightning_cpipe

    trainer = pl.Trainer(strategy="continuous_pipe", devices=4)
"""

from __future__ import annotations

import importlib
import sys
from itertools import dropwhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_cpipe.callbacks import IdleMonitor, ThroughputMonitor
    from lightning_cpipe.strategy import ContinuousPipeStrategy
    from lightning_cpipe.strategy.setup.parity import assert_pipeline_parity

__version__ = "0.1.0"

__all__ = [
    "ContinuousPipeStrategy",
    "IdleMonitor",
    "ThroughputMonitor",
    "__version__",
    "assert_pipeline_parity",
    "register",
]

_HOME = {
    "ContinuousPipeStrategy": "lightning_cpipe.strategy",
    "IdleMonitor": "lightning_cpipe.callbacks",
    "ThroughputMonitor": "lightning_cpipe.callbacks",
    "assert_pipeline_parity": "lightning_cpipe.strategy.setup.parity",
}


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def register() -> None:
    """Register the strategy with Lightning under its names; does nothing where that is done."""
    from lightning.pytorch.strategies import StrategyRegistry

    from lightning_cpipe.strategy import ContinuousPipeStrategy

    ContinuousPipeStrategy.register_strategies(StrategyRegistry)


def _is_own_command() -> bool:
    """Whether this process was started as ``cpipe`` or ``python -m lightning_cpipe``.

    The command registers the strategy itself, where it needs it; ``cpipe schedule`` and the like are spared the
    seconds that importing Lightning takes.
    """
    # Python's own options come first; what follows the script is the script's.
    arguments = list(dropwhile(lambda each: each.startswith("-") and each != "-m", sys.orig_argv[1:]))
    return arguments[:2] == ["-m", __name__] or Path(sys.argv[0]).name == "cpipe"


if not _is_own_command():
    register()
