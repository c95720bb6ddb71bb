"""What the loss of each micro-batch counts for in that of its mini-batch: its share of the samples, or what is said.

A mean over anything else than samples, such as tokens, is no mean of the slices' means by their samples, and a sum is
the sum of theirs. Only the module knows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

HOOK = "loss_weights"
"""The method of a LightningModule that says what each micro-batch counts for."""


def loss_weights(module: pl.LightningModule, slices: Sequence[Any], sizes: Sequence[int]) -> list[float]:
    """What each micro-batch counts for.

    Args:
        module: may have a `loss_weights`.
        slices: the micro-batches.
        sizes: the samples in each.

    Raises:
        MisconfigurationException: if `loss_weights` returns something else than a weight for each.
    """
    users_hook = getattr(module, HOOK, None)
    if users_hook is None:
        total = sum(sizes)
        return [size / total if total else 1 / len(slices) for size in sizes]
    returned = users_hook(list(slices))
    if not isinstance(returned, Iterable) or isinstance(returned, (str, bytes)):
        raise _wrong(f"{type(returned).__name__}", len(slices))
    try:
        # One copy from the device, where they lie there.
        weights = [float(each) for each in (returned.tolist() if isinstance(returned, Tensor) else returned)]
    except (TypeError, ValueError):
        raise _wrong(f"{returned!r}", len(slices)) from None
    if len(weights) != len(slices):
        raise _wrong(f"{len(weights)} numbers", len(slices))
    if not all(math.isfinite(each) and each >= 0 for each in weights):
        raise _wrong(f"{weights}", len(slices))
    return weights


def _wrong(found: str, count: int) -> MisconfigurationException:
    return MisconfigurationException(
        f"`{HOOK}` returned {found} for {count} micro-batches: return a list with a finite number for each, of 0 or"
        " more, which says what its loss counts for in that of the mini-batch."
    )
