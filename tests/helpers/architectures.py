"""Modules that nobody here wrote for a pipeline: tiny ones of `transformers` with random weights, and two of other
shapes.

`transformers` is imported by the first that needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, Dataset

from tests.helpers.modules import make_optimizer

Batch = dict[str, Tensor]

WORDS = 96
WIDTH = 32
LENGTH = 12

SAMPLES = 29
BATCH_SIZE = 3
"""Ten mini-batches make an epoch, the last of which is shorter."""


@dataclass(frozen=True)
class Architecture:
    """A model and what it is trained on.

    Attributes:
        make: makes the model.
        data: makes `SAMPLES` samples.
        begins: names of the modules that begin a stage, by the number of stages; the blocks are balanced otherwise.
        drops: whether it draws random numbers.
    """

    make: Callable[[], nn.Module]
    data: Callable[[torch.Generator], Batch]
    begins: dict[int, list[str]] = field(default_factory=dict)
    drops: bool = False

    def split_points(self, p: int) -> Any:
        """For the strategy."""
        return [f"model.{name}" for name in self.begins.get(p, [])] or "auto"

    def module(self) -> pl.LightningModule:
        """The same each time."""
        torch.manual_seed(1)
        return Learner(self.make().train())

    def loader(self) -> DataLoader[Batch]:
        """The samples, shuffled."""
        return DataLoader(Samples(self.data(torch.Generator().manual_seed(5))), BATCH_SIZE, shuffle=True)


OPTIMIZER = make_optimizer("adamw", None)


class Learner(pl.LightningModule):
    """Trains a model that takes a batch's entries by their names and returns something with a `loss`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZER(list(self.parameters()))[0]


class Samples(Dataset[Batch]):
    """The rows of a batch."""

    def __init__(self, rows: Batch) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Batch:
        return {name: rows[index] for name, rows in self._rows.items()}


# ---- data ----


def words(generator: torch.Generator, length: int = LENGTH) -> Tensor:
    return torch.randint(3, WORDS, (SAMPLES, length), generator=generator)


def tokens(generator: torch.Generator) -> Batch:
    ids = words(generator)
    return {"input_ids": ids, "labels": ids.clone()}


def masked_tokens(generator: torch.Generator) -> Batch:
    """Some words are to be guessed; every other sequence is shorter."""
    ids = words(generator)
    mask = torch.ones_like(ids)
    mask[::2, LENGTH - 3 :] = 0
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.4, ids, -100)
    labels[:, 0] = ids[:, 0]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def images(generator: torch.Generator) -> Batch:
    return {
        "pixel_values": torch.randn(SAMPLES, 3, 32, 32, generator=generator),
        "labels": torch.randint(5, (SAMPLES,), generator=generator),
    }


def sentence_pairs(generator: torch.Generator) -> Batch:
    return {**masked_tokens(generator), "labels": words(generator, LENGTH - 2)}


def sounds(generator: torch.Generator) -> Batch:
    features = torch.randn(SAMPLES, 8, 2 * LENGTH, generator=generator)
    return {"input_features": features, "labels": words(generator, LENGTH - 2)}


def noisy_images(generator: torch.Generator) -> Batch:
    clean, noise = (torch.randn(SAMPLES, 3, 16, 16, generator=generator) for _ in range(2))
    return {"noisy": clean + noise, "clean": clean}


def users_and_items(generator: torch.Generator) -> Batch:
    return {"user": words(generator), "item": words(generator, LENGTH // 2)}


# ---- models of `transformers` ----


def gpt2(dropout: float = 0.1, tied: bool = True) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=WORDS, n_embd=WIDTH, n_layer=4, n_head=2, n_positions=LENGTH, bos_token_id=1, eos_token_id=2,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, attention_dropout=0.1,
        )
    )  # fmt: skip


def qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=64, use_sliding_window=True, sliding_window=4,
            max_window_layers=2,
        )
    )  # fmt: skip


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
        )
    )  # fmt: skip


def bert(tied: bool = True) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=64, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def modernbert(tied: bool = True) -> nn.Module:
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    return ModernBertForMaskedLM(
        ModernBertConfig(
            vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=64, local_attention=4, pad_token_id=0, cls_token_id=1, sep_token_id=2,
            bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            image_size=32, patch_size=8, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=4,
            num_attention_heads=4, hidden_dropout_prob=0.1, num_labels=5,
        )
    )  # fmt: skip


def convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return ConvNextForImageClassification(
        ConvNextConfig(
            hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 3, 1], patch_size=2, image_size=32, drop_path_rate=0.2,
            num_labels=5,
        )
    )  # fmt: skip


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], layer_type="basic", num_labels=5
        )
    )


def swin() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    return SwinForImageClassification(
        SwinConfig(
            image_size=32, patch_size=2, embed_dim=8, depths=[2, 2, 2], num_heads=[2, 2, 4], window_size=4,
            hidden_dropout_prob=0.1, num_labels=5,
        )
    )  # fmt: skip


def mamba(tied: bool = True) -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(
        MambaConfig(
            vocab_size=WORDS, hidden_size=WIDTH, state_size=4, num_hidden_layers=4, time_step_rank=4,
            tie_word_embeddings=tied,
        )
    )  # fmt: skip


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=WORDS, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=3, num_heads=4,
            decoder_start_token_id=0,
        )
    )  # fmt: skip


def whisper(tied: bool = True) -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=WORDS, d_model=WIDTH, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8,
            max_source_positions=LENGTH, max_target_positions=LENGTH, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1, dropout=0.1, tie_word_embeddings=tied,
        )
    )  # fmt: skip


# ---- others ----


@dataclass
class Output:
    """What a model gives."""

    loss: Tensor


class Convolutions(nn.Module):
    """(batch, inside, height, width) -> (batch, outside, height, width)."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(inside, outside, 3, padding=1), nn.GroupNorm(2, outside), nn.SiLU(), nn.Dropout2d(0.1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class UNet(nn.Module):
    """What each level down makes is used at the same level on the way up."""

    def __init__(self) -> None:
        super().__init__()
        widths = [8, 12, 16]
        self.down = nn.ModuleList([Convolutions(a, b) for a, b in zip([3, *widths], widths)])
        self.middle = Convolutions(16, 16)
        self.up = nn.ModuleList([Convolutions(2 * a, b) for a, b in zip(widths[::-1], [12, 8, 8])])
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, noisy: Tensor, clean: Tensor) -> Output:
        x, skips = noisy, []
        for level in self.down:
            x = level(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for level in self.up:
            x = F.interpolate(x, scale_factor=2)
            x = level(torch.cat([x, skips.pop()], dim=1))
        return Output(F.mse_loss(self.head(x), clean))


class Tower(nn.Module):
    """Words, (batch, length), to a direction, (batch, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        layer = [nn.TransformerEncoderLayer(WIDTH, 4, 48, dropout=0.1, batch_first=True) for _ in range(3)]
        self.layers = nn.ModuleList(layer)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return F.normalize(x.mean(dim=1), dim=-1)


class TwoTowers(nn.Module):
    """Each user is to be told from the other users by the item it chose."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = Tower(), Tower()
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, user: Tensor, item: Tensor) -> Output:
        likeness = self.user(user) @ self.item(item).T * self.temperature.exp()
        target = torch.arange(len(user))
        return Output(F.cross_entropy(likeness, target) + F.cross_entropy(likeness.T, target))


ARCHITECTURES = {
    "gpt2": Architecture(gpt2, tokens, drops=True),
    "llama": Architecture(llama, tokens, drops=True),
    "qwen3": Architecture(qwen3, tokens),
    "mixtral": Architecture(mixtral, tokens),
    "bert": Architecture(bert, masked_tokens, drops=True),
    "modernbert": Architecture(modernbert, masked_tokens),
    "vit": Architecture(vit, images, drops=True),
    "convnext": Architecture(convnext, images, drops=True),
    "resnet": Architecture(resnet, images),
    "swin": Architecture(swin, images, drops=True),
    "mamba": Architecture(mamba, tokens),
    "t5": Architecture(t5, sentence_pairs, {3: ["encoder.block.1", "decoder.block.1"]}, drops=True),
    "whisper": Architecture(whisper, sounds, {3: ["model.encoder.layers.1", "model.decoder.layers.1"]}, drops=True),
    "unet": Architecture(UNet, noisy_images, {3: ["down.2", "up.1"]}, drops=True),
    "two towers": Architecture(TwoTowers, users_and_items, {3: ["user.layers.1", "item.layers.1"]}, drops=True),
}
