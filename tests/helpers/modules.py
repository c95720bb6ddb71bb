"""Small LightningModules, and data for them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

WIDTH = 8


class Block(nn.Module):
    """LayerNorm and a linear layer beside a skip connection; (batch, 8) -> (batch, 8)."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(torch.tanh(self.linear(self.norm(x))))


class Codebook(nn.Module):
    """A codebook without parameters: its buffers follow what they see. (batch, width) -> (batch, width)."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(5, width))

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x, self.codes).argmin(-1)
        found = self.codes[nearest]
        if self.training:
            self.codes.index_add_(0, nearest, 0.1 * (x - found).detach())
        return x + (found - x).detach()


class Scale(nn.Module):
    """A buffer that nobody writes, and no weights. (batch, width) -> (batch, width)."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((width,), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Chain(pl.LightningModule):
    """A chain of blocks that learns to map noise to noise.

    Args:
        depth: blocks.
        dropout: in each.
        optimizer: ``sgd`` (with momentum), ``plain_sgd`` (without), ``adam`` or ``adamw``.
        schedule: ``step`` or ``epoch``: how often a StepLR steps; None for no scheduler.
        noise: whether `training_step` adds noise of its own.
    """

    def __init__(
        self,
        depth: int = 4,
        dropout: float = 0.0,
        optimizer: str = "sgd",
        schedule: str | None = None,
        noise: bool = False,
    ) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(*(Block(dropout) for _ in range(depth)))
        self.optimizer = optimizer
        self.schedule = schedule
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        if self.noise:
            x = x + 0.1 * torch.randn_like(x)
        return nn.functional.mse_loss(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = make_optimizer(self.optimizer, self.schedule)(list(self.parameters()))
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.schedule}}


class Tied(Chain):
    """The first layer's weight is the last one's, too; both lie outside the blocks."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__(optimizer=optimizer)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)
        self.head.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(self.first(x)))


class TiedThrice(Tied):
    """And a bias in the middle that is the last one's, and a weight in the middle that is the first one's.

    With three stages, each pair of them is tied.
    """

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__(optimizer)
        self.net[1].linear.bias = self.head.bias
        self.net[1].linear.weight = self.first.weight


class make_optimizer:  # noqa: N801
    """Makes an optimizer and its scheduler for some parameters; the oracle uses it too."""

    def __init__(self, optimizer: str, schedule: str | None) -> None:
        self._optimizer = optimizer
        self._schedule = schedule

    def __call__(self, parameters: list[nn.Parameter]) -> tuple[torch.optim.Optimizer, Any]:
        if self._optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, 0.05, momentum=0.9)
        elif self._optimizer == "plain_sgd":
            optimizer = torch.optim.SGD(parameters, 0.05)
        elif self._optimizer == "adam":
            optimizer = torch.optim.Adam(parameters, 0.01)
        else:
            optimizer = torch.optim.AdamW(parameters, 0.01)
        if self._schedule is None:
            return optimizer, None
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.7)


def noise_loader(
    samples: int = 22, batch_size: int = 3, shuffle: bool = False, seed: int = 5
) -> DataLoader[tuple[Tensor, ...]]:
    """Pairs of noise, (batch, 8) each; the last batch is shorter if `batch_size` does not divide `samples`."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(samples, WIDTH, generator=generator) for _ in range(2))
    return DataLoader(TensorDataset(x, y), batch_size, shuffle=shuffle)
