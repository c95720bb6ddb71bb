"""What is trained in the benchmarks: real transformer blocks, and stages that only sleep."""

from __future__ import annotations

import time
from collections.abc import Iterator

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class TransformerBlock(nn.Module):
    """A pre-norm transformer layer; shapes (batch, length, width) -> (batch, length, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            width, max(1, width // 64), 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )

    def forward(self, x: Tensor) -> Tensor:
        """One layer further."""
        # A view can't be the output of a stage in torch's zero-bubble schedules.
        return self.layer(x) + 0.0


class SleepingBlock(nn.Module):
    """A stage that takes a given time per sample and uses no core, so that 8 of them fit on 2 cores.

    Half of the backward is for the input's gradient and half for the weight's, so that schedules which split the two
    find something to split.

    Args:
        forward_s: seconds of a forward, per sample.
        backward_s: seconds of a backward, per sample.
    """

    def __init__(self, forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.forward_s = forward_s
        self.backward_s = backward_s

    def forward(self, x: Tensor) -> Tensor:
        """Sleep for as long as the samples in `x` take."""
        samples = x.shape[0]
        _busy(samples * self.forward_s)
        # The first stage's input needs no gradient; all stages take the same time all the same.
        for_input = samples * self.backward_s / 2 if x.requires_grad else 0.0
        beside = samples * self.backward_s - for_input
        return _slow_in_backward(x, for_input) + _slow_in_backward(self.weight, beside)


def _slow_in_backward(x: Tensor, seconds: float) -> Tensor:
    """`x`, whose gradient takes so long. A hook, since a graph with functions written in Python is not split."""
    same = x + 0.0
    if same.requires_grad:
        same.register_hook(lambda _: _busy(seconds))
    return same


def _busy(seconds: float) -> None:
    """Sleep, and spin for the last 0.4 ms: waking up is not that exact."""
    end = time.perf_counter() + seconds
    if seconds > 4e-4:
        time.sleep(seconds - 4e-4)
    while time.perf_counter() < end:
        pass


class Regression(pl.LightningModule):
    """Trains a chain of blocks on random data, with SGD."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.net = nn.Sequential(*blocks)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean squared error."""
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), 1e-3)


class _Repeated(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, x: Tensor, y: Tensor, batches: int) -> None:
        self.x, self.y, self.batches = x, y, batches

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x, self.y


def loader(shape: tuple[int, ...], batches: int) -> DataLoader[tuple[Tensor, Tensor]]:
    """The same mini-batch, again and again."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape, generator=generator) for _ in range(2))
    return DataLoader(_Repeated(x, y, batches), batch_size=None)


def repeated(shape: tuple[int, ...], batches: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same, without a loader."""
    return iter(loader(shape, batches))
