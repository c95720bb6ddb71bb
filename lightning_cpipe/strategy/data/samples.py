"""How many samples a batch holds."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def samples_in(batch: Any) -> int | None:
    """How many samples a batch holds; None if Lightning can't tell."""
    try:
        return extract_batch_size(batch)
    except MisconfigurationException:
        return None
