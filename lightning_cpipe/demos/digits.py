"""Classify handwritten digits: 1,797 real images of 8 x 8 pixels that ship with scikit-learn (BSD-3-Clause)."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

CLASSES = 10
PIXELS = 64


class ResidualBlock(nn.Module):
    """Two linear layers beside a skip connection; shapes (batch, width) -> (batch, width)."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """One step further."""
        further: Tensor = x + self.inner(self.norm(x))
        return further


class DigitsClassifier(pl.LightningModule):
    """A residual MLP.

    Args:
        depth: residual blocks.
        width: features between them.
        dropout: inside them.
        learning_rate: at the start; it falls to zero along a cosine.
    """

    def __init__(self, depth: int = 8, width: int = 128, dropout: float = 0.1, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.model = nn.Sequential(
            nn.Linear(PIXELS, width),
            *(ResidualBlock(width, dropout) for _ in range(depth)),
            nn.LayerNorm(width),
            nn.Linear(width, CLASSES),
        )
        self.val_accuracy = MulticlassAccuracy(CLASSES, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, 10) of images (batch, 64)."""
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy."""
        images, labels = batch
        logits = self(images)
        self.val_accuracy(logits, labels)
        self.log("val_loss", F.cross_entropy(logits, labels), prog_bar=True)
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy."""
        images, labels = batch
        self.log("test_accuracy", (self(images).argmax(-1) == labels).float().mean())

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The most likely digit of each image."""
        digits: Tensor = self(batch[0]).argmax(-1)
        return digits

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with a cosine."""
        optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class DigitsData(pl.LightningDataModule):
    """80 % of the digits to train on, 20 % to validate on.

    Args:
        batch_size: images in a mini-batch.
        seed: of the split and the shuffles.
    """

    def __init__(self, batch_size: int = 32, seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Load and split."""
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        images = torch.tensor(pixels, dtype=torch.float32) / 16
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))
        held_out = len(order) // 5
        train, val = order[:-held_out], order[-held_out:]
        targets = torch.tensor(labels, dtype=torch.int64)
        self.train = TensorDataset(images[train], targets[train])
        self.val = TensorDataset(images[val], targets[val])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled."""
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """In order."""
        return DataLoader(self.val, batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The same images as for validation: there are too few for a third set."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """In order."""
        return self.val_dataloader()
