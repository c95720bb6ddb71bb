"""Adapters around a frozen model, as ``peft`` makes them, and weights that are loaded before or in `setup`."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.helpers.fits import require_plain_results

CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    tie_word_embeddings=False,
)


def base() -> Any:
    torch.manual_seed(2)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIG))


def token_loader() -> DataLoader[Tensor]:
    ids = torch.randint(32, (14, 8), generator=torch.Generator().manual_seed(3))
    return DataLoader(ids, batch_size=3)  # type: ignore[arg-type]


class Adapted(pl.LightningModule):
    """Trains adapters in the attention, the base frozen.

    Args:
        saved: a folder that holds the base; None for a new one.
        checkpointing: whether each layer is computed again in the backward.
        options: of the adapters.
    """

    def __init__(self, saved: str | None = None, checkpointing: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(4)
        made = base() if saved is None else AutoModelForCausalLM.from_pretrained(saved).train()
        if checkpointing:
            made.gradient_checkpointing_enable({"use_reentrant": False})
            made.enable_input_require_grads()
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
        self.model = get_peft_model(made, config)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.model(input_ids=batch, labels=batch, use_cache=False).loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([each for each in self.parameters() if each.requires_grad], 0.01)


class AllParameters(Adapted):
    """Gives the frozen ones to the optimizer, too."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.01)


def trained_in(weights: dict[str, Tensor]) -> set[str]:
    return {name for name in weights if "lora_" in name}


def moved(weights: dict[str, Tensor], module: pl.LightningModule) -> set[str]:
    return {name for name, start in module.named_parameters() if not torch.equal(weights[name], start)}


FULL = pytest.mark.full


@pytest.mark.parametrize(
    ("p", "module"), [(3, Adapted), *(pytest.param(*each, marks=FULL) for each in ((2, Adapted), (3, AllParameters)))]
)
def test_adapters_are_trained_and_the_base_stays(p: int, module: type[Adapted]) -> None:
    # By default, half of their weights begin with zero, and the other half's first gradients are zero for it.
    seen = require_plain_results(p, partial(module, init_lora_weights=False), token_loader, val=token_loader)
    assert len(trained_in(seen.weights)) == 3 * 2 * 2
    assert moved(seen.weights, module(init_lora_weights=False)) == trained_in(seen.weights)


@FULL
@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"layers_to_transform": [2]},
        {"layers_to_transform": [0]},
        {"checkpointing": True},
    ],
    ids=str,
)
def test_other_adapters(options: dict[str, Any]) -> None:
    """Among them some that leave a stage without anything to train."""
    seen = require_plain_results(2, partial(Adapted, **options), token_loader)
    assert moved(seen.weights, Adapted(**options))


@FULL
def test_saved_adapters_are_trained_further_and_saved_again(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    Adapted(str(tmp_path / "base"), init_lora_weights=False).model.save_pretrained(tmp_path / "adapters")

    class Further(Adapted):
        def __init__(self) -> None:
            super().__init__()
            saved = AutoModelForCausalLM.from_pretrained(tmp_path / "base").train()
            self.model = PeftModel.from_pretrained(saved, tmp_path / "adapters", is_trainable=True)

    def look(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            module.model.save_pretrained(tmp_path / "further")  # type: ignore[operator, union-attr]

    seen = require_plain_results(2, Further, token_loader, look=look)
    again = PeftModel.from_pretrained(base(), tmp_path / "further")
    for name, weight in again.named_parameters():
        assert torch.equal(weight, seen.weights[f"model.{name}"])


class LoadsInSetup(Adapted):
    """Has the weights of a file from `setup` on."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def setup(self, stage: str) -> None:
        self.load_state_dict(torch.load(self.path))


class MakesInSetup(LoadsInSetup):
    """Has no model before."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        del self.model

    def setup(self, stage: str) -> None:
        self.model = Adapted().model
        super().setup(stage)


@pytest.mark.parametrize("module", [LoadsInSetup, pytest.param(MakesInSetup, marks=FULL)])
def test_weights_loaded_in_setup(tmp_path: Path, module: type[LoadsInSetup]) -> None:
    saved = {name: torch.randn_like(weight) for name, weight in Adapted().state_dict().items()}
    torch.save(saved, tmp_path / "saved.pt")
    seen = require_plain_results(2, partial(module, tmp_path / "saved.pt"), token_loader)
    moved = {name for name, weight in seen.weights.items() if not torch.equal(weight, saved[name])}
    assert moved == trained_in(seen.weights)
