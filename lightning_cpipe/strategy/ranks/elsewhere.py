"""Runs a step on rank 0 as it would run on another rank, where nothing is logged, printed or written.

Rank 0 holds the last stage, and only what that one logs counts. Where it holds further stages, it runs the same step
for them as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_cpipe.strategy.lightning_private import instead_of


@contextmanager
def on_another_rank(module: pl.LightningModule, rank: int) -> Iterator[None]:
    """Inside, this is rank `rank`: for loggers, for what runs on rank 0 alone, and for code that asks."""
    environment = module.trainer.strategy.cluster_environment  # type: ignore[attr-defined]
    with ExitStack() as undo:
        undo.callback(instead_of(module, "log", lambda *_, **__: None))
        undo.callback(instead_of(environment, "global_rank", lambda: rank))
        for each in (rank_zero_only, fabric_rank_zero_only):
            undo.callback(setattr, each, "rank", each.rank)  # type: ignore[attr-defined]
            each.rank = rank  # type: ignore[attr-defined]
        yield
