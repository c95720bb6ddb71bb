"""Whether the losses of micro-batches make up that of their mini-batch, asked at set-up of the first one.

Where they do not, the gradients are not those of the whole mini-batch, and nothing else would show it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_cpipe.probe.untouched import untouched
from lightning_cpipe.stage.randomness import get_state, same_state, seeded, unchanged
from lightning_cpipe.strategy.data.drawn import Drawn
from lightning_cpipe.strategy.data.loss_weights import HOOK
from lightning_cpipe.strategy.data.micro_batches import micro_batches
from lightning_cpipe.strategy.lightning_private import prepare_batch, training_arguments
from lightning_cpipe.strategy.ranks.ending import in_words
from lightning_cpipe.strategy.setup.probing import not_compiled, observe

_SLACK = 1e-3
"""Relative. Rounding makes less of a difference in 32 bits; with fewer, nothing is compared."""


def warn_of_other_loss(
    module: pl.LightningModule, drawn: Drawn, device: torch.device, seed: int, num_microbatches: int
) -> None:
    """Warn if the loss of a mini-batch is not what those of its micro-batches make together.

    Where the step draws random numbers or takes statistics of its batch they differ anyway, and nothing is said; nor
    where it can't run on a whole mini-batch.
    """
    if str(module.trainer.precision) not in ("32-true", "64-true"):
        return
    if StochasticWeightAveraging.pl_module_contains_batch_norm(module):
        return
    with unchanged():
        batch = prepare_batch(module, drawn.batch, device)
        slices = [each for each in micro_batches(drawn, batch, module, num_microbatches) if each.weight]
    try:
        losses = _losses(module, [batch, *(each.batch for each in slices)], drawn.index, seed)
    except Exception as error:
        # A batch that is made to be sliced need not be one for the step, nor fit into memory. What else fails, fails
        # again on the micro-batch that is probed.
        rank_zero_info(
            "The loss of the first mini-batch is not compared with those of its micro-batches, since `training_step`"
            f" does not run on all of it: {in_words(error)}."
        )
        return
    if not losses or not math.isfinite(losses[0]):
        return
    whole, *parts = losses
    together = sum(each.weight * part for each, part in zip(slices, parts))
    if abs(whole - together) <= _SLACK * abs(whole):
        return
    says = f"`{HOOK}` says" if hasattr(module, HOOK) else "its share of the samples says"
    rank_zero_warn(
        f"`training_step` gives a loss of {whole:.6g} for the first mini-batch, and its {len(slices)} micro-batches"
        f" give {together:.6g} together, the loss of each counted for what {says}. So the gradients are not those of"
        f" the whole mini-batch. A method of the LightningModule, `{HOOK}(self, micro_batches)`, returns what each"
        " counts for: for a mean over tokens its share of the tokens, for a sum 1.0. It can't help where a loss"
        " compares samples of a batch with each other; set num_microbatches=1 there."
    )


def _losses(module: pl.LightningModule, batches: Sequence[Any], index: int, seed: int) -> list[float]:
    """The loss for each batch.

    None if the step draws random numbers, writes buffers, leaves out a batch, or makes losses of few bits.
    """
    losses: list[Tensor] = []
    with untouched(module) as before, not_compiled(), seeded(seed), torch.no_grad():
        state = get_state()
        for batch in batches:
            loss = observe(module, "training_step", training_arguments(module.trainer, batch, index)).loss
            if loss is None:
                return []
            losses.append(loss)
        writes = any(key in module.get_submodule(name)._buffers for name, key in before.changes())
        if writes or not same_state(state, get_state()):
            return []
    return [float(loss) for loss in losses] if all(torch.finfo(loss.dtype).bits >= 32 for loss in losses) else []
