"""Measures how much a run gets done per second."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.throughput import Throughput, get_available_flops
from typing_extensions import override

from lightning_cpipe.callbacks.loggers import declare, log_numbers
from lightning_cpipe.strategy.data.samples import samples_in
from lightning_cpipe.strategy.strategy import ContinuousPipeStrategy
from lightning_cpipe.tree import tensors_in

_NAMES = {
    "device/batches_per_sec": "throughput/batches_per_s",
    "device/samples_per_sec": "throughput/samples_per_s",
    "device/items_per_sec": "throughput/tokens_per_s",
    "device/flops_per_sec": "throughput/flops_per_s",
    "device/mfu": "throughput/mfu",
}
"""Lightning's name for one device's rate -> ours. All pipelines together count as one device: the stages of one work on
the same mini-batches. Lightning's own callback, which multiplies by the number of ranks, would count each p times."""


class ThroughputMonitor(pl.Callback):
    """Logs how many mini-batches, samples, tokens and floating-point operations are trained per second.

    ``throughput/batches_per_s``; ``samples_per_s`` where the size of a batch can be told; ``tokens_per_s`` if the first
    batch has tokens (a tensor of int32 or int64 with at least two dimensions, the first of which is the batch's size);
    a sample of a later batch without any counts as one token. ``flops_per_s`` where the operations were counted at
    set-up, and ``mfu`` where the peak of the hardware is known. Rates are means over a rolling window and leave out the
    fill and evaluations. Pipelines side by side count together, each with as much as the first. Works with any
    strategy that runs on pipelines or on one device.

    Args:
        window_size: mini-batches in the window.
        every_n_steps: how often to log; None for the trainer's own ``log_every_n_steps``.
    """

    def __init__(self, window_size: int = 20, every_n_steps: int | None = None) -> None:
        self._window_size = window_size
        self._every_n_steps = every_n_steps
        self._throughput = Throughput(window_size=window_size)
        self._batches = self._samples = self._tokens = 0
        self._knows_samples = True
        self._counts_tokens = False
        self._start = self._paused_at = 0.0
        self._flops: int | None = None
        self._pipelines = 1

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._batches = self._samples = self._tokens = 0
        self._knows_samples = True
        self._start = time.perf_counter()
        strategy = trainer.strategy
        device = strategy.root_device
        devices = 1
        if isinstance(strategy, ContinuousPipeStrategy):
            self._pipelines = strategy.num_replicas
            devices = strategy.num_ranks * self._pipelines
            # A backward costs about twice a forward: the gradients of the input and of the weights.
            self._flops = 3 * strategy.forward_flops * self._pipelines or None
        peak = get_available_flops(device, _computes_in(trainer, pl_module)) if device.type == "cuda" else None
        self._throughput = Throughput(
            available_flops=None if peak is None else devices * peak, window_size=self._window_size
        )
        if trainer.is_global_zero:
            declare(trainer, _NAMES.values(), summary="mean")

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero:
            return
        self._batches += 1
        samples = samples_in(batch)
        tokens = None if samples is None else _tokens_in(batch, samples)
        if self._batches == 1:
            self._counts_tokens = tokens is not None
        self._knows_samples &= samples is not None
        # Lightning raises if there are fewer samples than batches, or fewer tokens than samples.
        counted = max(1, samples or 0)
        self._samples += counted
        self._tokens += max(counted, tokens or 0)
        self._throughput.update(
            time=time.perf_counter() - self._start,
            batches=self._batches * self._pipelines,
            samples=self._samples * self._pipelines,
            lengths=self._tokens * self._pipelines if self._counts_tokens else None,
            flops=self._flops,
        )
        every = self._every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and self._batches % every == 0:
            found = self._throughput.compute()
            if not self._knows_samples:
                found.pop("device/samples_per_sec", None)
            log_numbers(trainer, {ours: found[theirs] for theirs, ours in _NAMES.items() if theirs in found})

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._paused_at = time.perf_counter()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start += time.perf_counter() - self._paused_at


def _computes_in(trainer: pl.Trainer, module: pl.LightningModule) -> torch.dtype:
    """What matrices are multiplied in, whatever the weights are kept in."""
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(trainer.precision))
    return mixed or next((parameter.dtype for parameter in module.parameters()), torch.float32)


def _tokens_in(batch: Any, samples: int) -> int | None:
    """How many tokens a batch of so many samples holds; None if it has none.

    They are the elements of its first tensor of indices with a row for each sample: no list of labels, and no images or
    masks, which are bytes.
    """
    for tensor in tensors_in(batch):
        if tensor.dtype in (torch.int32, torch.int64) and tensor.ndim >= 2 and len(tensor) == samples:
            return tensor.numel()
    return None
