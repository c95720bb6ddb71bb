"""Train any causal language model of ``transformers``, a new one or one that was saved.

The module knows neither its architecture nor its text: batches are token ids, and the loss is the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric
from typing_extensions import override

from lightning_cpipe.demos.warm_up import decay_groups, warmed_up_adamw

try:
    from transformers import AutoConfig, AutoModelForCausalLM
except ImportError as error:
    raise ImportError("HFCausalLM needs transformers: `pip install 'lightning-cpipe[hf]'`.") from error

_IGNORED = -100
"""The label of a token that is not to be predicted, in all of transformers."""


class Perplexity(MeanMetric):
    """The exponential of the mean loss."""

    @override
    def compute(self) -> Tensor:
        return super().compute().exp()


class HFCausalLM(pl.LightningModule):
    """A causal language model of ``transformers``.

    Batches are token ids (batch, length), or what tokenizers and collators make: a mapping with ``input_ids`` and
    whatever else the model takes. Without ``labels``, every token that the ``attention_mask`` does not hide is one.

    Example:
        >>> config = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4,
        ...           "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False}
        >>> module = HFCausalLM(model_type="llama", config=config)  # doctest: +SKIP

    Args:
        model_type: of a new model, as ``transformers`` calls it: ``llama``, ``gpt2``, ``qwen3``, …
        pretrained: instead of it, the weights to begin with: a folder that `save_pretrained` wrote, or a name on the
            Hugging Face hub.
        config: what differs from the type's or the saved model's own configuration.
        learning_rate: after the warm-up.
        weight_decay: of matrices; biases and the weights of norms do not decay.
        warmup_steps: until the learning rate is reached.

    Raises:
        ValueError: unless one of `model_type` and `pretrained` is given.
    """

    def __init__(
        self,
        model_type: str | None = None,
        pretrained: str | None = None,
        config: dict[str, Any] | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 20,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.model = _made(model_type, pretrained, config or {})
        self.val_perplexity = Perplexity()

    def forward(self, batch: Tensor | Mapping[str, Tensor]) -> Any:
        """What the model makes of a batch: its loss in nats per token, its logits and more."""
        inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
        if "labels" not in inputs:
            inputs["labels"] = inputs["input_ids"]
            if "attention_mask" in inputs:
                inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"] == 0, _IGNORED)
        return self.model(**inputs, use_cache=False)

    def training_step(self, batch: Tensor | Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Nats per token."""
        loss: Tensor = self(batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor | Mapping[str, Tensor], batch_idx: int) -> None:
        """Nats per token, and the perplexity that they make."""
        loss, rows = self(batch).loss, len(batch if isinstance(batch, Tensor) else batch["input_ids"])
        self.val_perplexity(loss, rows)
        self.log("val_loss", loss, prog_bar=True, batch_size=rows)
        self.log("val_perplexity", self.val_perplexity, batch_size=rows)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with a linear warm-up."""
        return warmed_up_adamw(decay_groups(self, self.weight_decay), self.learning_rate, self.warmup_steps)


def _made(model_type: str | None, pretrained: str | None, config: dict[str, Any]) -> Any:
    if (model_type is None) == (pretrained is None):
        raise ValueError(
            f"model_type={model_type!r} and pretrained={pretrained!r}: give one of them, `model_type` for a new model"
            " or `pretrained` for one that was saved."
        )
    # Half of its methods have no annotations.
    auto: Any = AutoModelForCausalLM
    if model_type is not None:
        return auto.from_config(AutoConfig.for_model(model_type, **config))
    # What is loaded has the file's precision, where the Trainer's is to decide, and is set to evaluation.
    return auto.from_pretrained(pretrained, **config).float().train()
