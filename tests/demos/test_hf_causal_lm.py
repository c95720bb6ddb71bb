"""The wrapper around models of ``transformers``: any architecture, new or saved, and the loss that is its own."""

from __future__ import annotations

import importlib
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_cpipe.demos.hf_causal_lm as demo
from lightning_cpipe.demos.hf_causal_lm import HFCausalLM, Perplexity
from tests.helpers.fits import quiet_trainer, require_plain_results

VOCABULARY = 32
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}


def tiny_llama(**options: Any) -> HFCausalLM:
    return HFCausalLM("llama", config=TINY, **options)


def tokens(rows: int = 4, length: int = 8) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))


def loader() -> DataLoader[Tensor]:
    return DataLoader(tokens(rows=14), batch_size=3)  # type: ignore[arg-type]


def by_hand(module: HFCausalLM, ids: Tensor, shown: Tensor | None = None) -> Tensor:
    """Cross-entropy of each token after the first, those that are not `shown` left out."""
    logits = module.model(input_ids=ids, attention_mask=shown).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.mean() if shown is None else losses[shown[:, 1:].flatten() == 1].mean()


def test_the_loss_is_about_the_next_token() -> None:
    module = tiny_llama()
    assert module(tokens()).loss.item() == pytest.approx(by_hand(module, tokens()).item(), rel=1e-5)
    assert module(tokens()).loss.item() == pytest.approx(math.log(VOCABULARY), abs=0.5)


def test_hidden_tokens_are_no_labels() -> None:
    module, shown = tiny_llama(), torch.ones(4, 8, dtype=torch.int64)
    shown[:, 5:] = 0
    expected = by_hand(module, tokens(), shown)
    assert module({"input_ids": tokens(), "attention_mask": shown}).loss.item() == pytest.approx(expected.item())


def test_labels_of_a_batch_are_taken_as_they_are() -> None:
    module, labels = tiny_llama(), tokens()
    labels[:, :-1] = -100
    logits = module.model(input_ids=tokens()).logits[:, -2]
    expected = F.cross_entropy(logits, tokens()[:, -1])
    assert module({"input_ids": tokens(), "labels": labels}).loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("gpt2", {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8}),
        ("qwen3", {**TINY, "head_dim": 8}),
    ],
)
def test_of_another_type(model_type: str, config: dict[str, Any]) -> None:
    module = HFCausalLM(model_type, config=config)
    assert module.model.config.model_type == model_type
    assert math.isfinite(module(tokens()).loss.item())


def test_a_saved_model_is_loaded_to_be_trained(tmp_path: Path) -> None:
    """In the precision that the Trainer will decide on, whatever that of the file."""
    saved = tiny_llama().model.bfloat16()
    saved.save_pretrained(tmp_path)
    module = HFCausalLM(pretrained=str(tmp_path), config={"attention_dropout": 0.5})
    assert module.model.config.attention_dropout == 0.5
    assert all(each.training for each in module.modules())
    for name, weight in module.model.named_parameters():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, saved.get_parameter(name).float())


@pytest.mark.parametrize("given", [{}, {"model_type": "llama", "pretrained": "somewhere"}])
def test_either_new_or_saved(given: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="give one of them"):
        HFCausalLM(**given)


def test_matrices_decay_and_the_rest_does_not() -> None:
    module = tiny_llama(weight_decay=0.5)
    module.model.model.layers[0].requires_grad_(False)
    configured: Any = module.configure_optimizers()
    of = {id(parameter): name for name, parameter in module.named_parameters()}
    decaying, others = configured["optimizer"].param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.5, 0)
    assert [of[id(each)] for each in others["params"]] == [
        "model.model.layers.1.input_layernorm.weight",
        "model.model.layers.1.post_attention_layernorm.weight",
        "model.model.norm.weight",
    ]
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert {of[id(each)] for each in decaying["params"] + others["params"]} == trained


def test_perplexity_is_that_of_the_mean_loss() -> None:
    perplexity = Perplexity()
    perplexity(torch.tensor(1.0), 3)
    perplexity(torch.tensor(2.0), 1)
    assert perplexity.compute().item() == pytest.approx(math.exp(5 / 4))


def test_in_a_pipeline_it_is_what_it_is_in_plain_lightning() -> None:
    seen = require_plain_results(2, tiny_llama, loader, val=loader)
    assert seen.metrics.keys() == {"train_loss", "val_loss", "val_perplexity"}
    assert seen.metrics["val_perplexity"] == pytest.approx(math.exp(seen.metrics["val_loss"]), rel=1e-5)


@pytest.mark.full
def test_a_saved_model_in_a_pipeline(tmp_path: Path) -> None:
    """Read in `__init__` by every rank."""
    tiny_llama().model.save_pretrained(tmp_path)
    require_plain_results(2, partial(HFCausalLM, pretrained=str(tmp_path)), loader)


def test_it_learns_and_its_checkpoint_makes_it_again() -> None:
    module = tiny_llama(learning_rate=1e-2, warmup_steps=5)
    trainer = quiet_trainer(devices=1, max_epochs=20)
    before = module(tokens(rows=14)).loss
    trainer.fit(module, loader())
    assert module(tokens(rows=14)).loss < before / 2
    trainer.save_checkpoint("saved.ckpt")
    again = HFCausalLM.load_from_checkpoint("saved.ckpt")
    assert torch.equal(again(tokens()).loss, module(tokens()).loss)


def test_without_transformers_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, demo.__name__)
    with pytest.raises(ImportError) as raised:
        importlib.import_module(demo.__name__)
    assert str(raised.value) == "HFCausalLM needs transformers: `pip install 'lightning-cpipe[hf]'`."
