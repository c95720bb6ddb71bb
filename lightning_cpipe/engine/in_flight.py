"""What a stage keeps of a mini-batch between its forward and its backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_cpipe.engine.mini_batch import MiniBatch


@dataclass
class InFlight:
    """A mini-batch that was forwarded and not yet backwarded.

    Attributes:
        mini_batch: which.
        received: what came from the stage before; leaves, those with a gradient collect it.
        sent: what went to the stage after, attached to the graph.
        returned: what the step returned, on the last stage.
    """

    mini_batch: MiniBatch
    received: list[Tensor]
    sent: list[Tensor]
    returned: Any
