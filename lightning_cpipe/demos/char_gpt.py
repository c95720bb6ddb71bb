"""Predict the next character of English text, with a small GPT.

The text is the reference documentation that ships with every Python (the module ``pydoc_data.topics``, PSF licence):
about half a million characters of prose, without a download. It differs a little from one version of Python to the
next; `text_fingerprint` says which one it was.
"""

from __future__ import annotations

import hashlib

import lightning.pytorch as pl
import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_cpipe.demos.warm_up import warmed_up_adamw

VOCABULARY = 128
"""Characters beyond ASCII are read as a question mark."""


def read_text() -> str:
    """The whole documentation as one string."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def text_fingerprint(text: str) -> str:
    """Tells two versions of the text apart."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Block(nn.Module):
    """Causal self-attention and an MLP; shapes (batch, length, width) -> (batch, length, width)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """One layer further."""
        batch, length, width = x.shape
        heads = (batch, length, self.heads, width // self.heads)
        query, key, value = (part.view(heads).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).reshape(batch, length, width)))
        further: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return further


class CharGPT(pl.LightningModule):
    """A GPT on characters.

    Args:
        layers: blocks.
        width: features of a character.
        heads: of the attention.
        length: characters that it sees at once.
        dropout: in the blocks and after the embedding.
        learning_rate: after the warm-up.
        warmup_steps: until it is reached.
    """

    def __init__(
        self,
        layers: int = 8,
        width: int = 128,
        heads: int = 4,
        length: int = 128,
        dropout: float = 0.1,
        learning_rate: float = 1e-3,
        warmup_steps: int = 20,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.characters = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, text: Tensor) -> Tensor:
        """Logits (batch, length, 128) for the character after each of `text` (batch, length)."""
        x = self.dropout(self.characters(text) + self.positions[: text.shape[1]])
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def _loss(self, batch: Tensor) -> Tensor:
        logits = self(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Nats per character."""
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Nats per character."""
        self.log("val_loss", self._loss(batch), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with a linear warm-up."""
        return warmed_up_adamw(self.parameters(), self.learning_rate, self.warmup_steps)


class TextWindows(Dataset[Tensor]):
    """Windows of a text, one after the other.

    Args:
        codes: the text as integers, (characters,).
        length: of a window; one more character is given, to predict.
    """

    def __init__(self, codes: Tensor, length: int) -> None:
        self.codes = codes
        self.length = length

    def __len__(self) -> int:
        """How many there are."""
        return (len(self.codes) - 1) // self.length

    def __getitem__(self, index: int) -> Tensor:
        """Window number `index`, (length + 1,)."""
        return self.codes[index * self.length : (index + 1) * self.length + 1]


class CharData(pl.LightningDataModule):
    """Nine tenths of the text to train on, the last tenth to validate on.

    Args:
        batch_size: windows in a mini-batch.
        length: characters in a window.
    """

    def __init__(self, batch_size: int = 16, length: int = 128) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.length = length

    def setup(self, stage: str) -> None:
        """Read the text and split it."""
        text = read_text()
        self.fingerprint = text_fingerprint(text)
        codes = torch.tensor(list(text.encode("ascii", "replace")), dtype=torch.int64)
        split = len(codes) * 9 // 10
        self.train = TextWindows(codes[:split], self.length)
        self.val = TextWindows(codes[split:], self.length)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Shuffled."""
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """In order."""
        return DataLoader(self.val, batch_size=self.batch_size)
