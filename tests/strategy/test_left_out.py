"""A mini-batch for which `training_step` returns None gives no gradient on any stage, as in plain Lightning."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from torch import Tensor

from tests.helpers.comparing import require_equal_to_reference
from tests.helpers.modules import Chain, Tied, make_optimizer, noise_loader


class Leaves(Chain):
    """Has no loss for some mini-batches: it sees so before or after it ran its blocks."""

    at_once = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        out = bool(batch[0].sum() > 2)
        if out and self.at_once:
            return None
        loss = super().training_step(batch, batch_idx)
        return None if out else loss


class LeavesAtOnce(Leaves):
    at_once = True


class TiedLeaves(Tied, Leaves):
    """And ties weights."""


@pytest.mark.parametrize(
    ("module", "p", "options"),
    [
        (Leaves, 3, {}),
        # A stage in between looked at the step before it ran it, and took it for one that never comes to the cut.
        (LeavesAtOnce, 4, {"accumulate": 3}),
        *(
            pytest.param(module, p, options, marks=pytest.mark.full)
            for module in (Leaves, LeavesAtOnce, TiedLeaves)
            for p in (2, 4)
            for options in ({"accumulate": 2}, {"early_input_gradient": True}, {"devices": 1}, {"versions": "latest"})
        ),
    ],
)
def test_equals_the_reference(module: Any, p: int, options: dict[str, Any]) -> None:
    seen = require_equal_to_reference(
        p,
        partial(module, optimizer="adamw"),
        noise_loader,
        make_optimizer("adamw", None),
        epochs=3,
        **options,
    )[0]
    assert (len(seen.losses), len(seen.batches)) == (18, 24)
