"""``cpipe fit|validate|test|predict``: LightningCLI with this package's strategy as the default."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

from lightning_cpipe import IdleMonitor, register


class PipelineCLI(LightningCLI):
    """LightningCLI; ``--trainer.strategy.num_stages=4`` works without naming the strategy's class."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({"trainer.strategy": {"class_path": "lightning_cpipe.ContinuousPipeStrategy"}})


class Places(Callback):
    """Says where everything lies after a fit.

    A callback, because it must run in the process of rank 0: one that has forked or spawned the ranks does not know.
    """

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit" or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        lines = [f"logs        {logger.log_dir or logger.save_dir}" for logger in trainer.loggers]
        checkpoint = trainer.checkpoint_callback
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.best_model_path:
            score = checkpoint.best_model_score
            how_good = "" if score is None else f" ({checkpoint.monitor} {score:.4f})"
            lines.append(f"checkpoint  {checkpoint.best_model_path}{how_good}")
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        lines += [f"picture     {each.path}" for each in callbacks if isinstance(each, IdleMonitor) and each.path]
        print("\n".join(["", *lines]), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; `arguments` is None for those of the process."""
    register()
    commands = ("fit", "validate", "test", "predict")
    usage = {name: {"usage": f"cpipe {name} --config recipe.yaml [--key.subkey=value ...]"} for name in commands}
    PipelineCLI(
        args=None if arguments is None else list(arguments),
        parser_kwargs={"prog": "cpipe", **usage},
        trainer_defaults={"callbacks": [Places()]},
        save_config_kwargs={"overwrite": True},
    )
