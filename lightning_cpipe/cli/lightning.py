"""``cpipe fit|validate|test|predict``: LightningCLI with this package's strategy as the default."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

from lightning_cpipe import IdleMonitor, register


class PipelineCLI(LightningCLI):
    """LightningCLI; ``--trainer.strategy.num_stages=4`` works without naming the strategy's class."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({"trainer.strategy": {"class_path": "lightning_cpipe.ContinuousPipeStrategy"}})

    def after_fit(self) -> None:
        """Say where everything lies."""
        if not self.trainer.is_global_zero or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        lines = [f"logs        {logger.log_dir or logger.save_dir}" for logger in self.trainer.loggers]
        checkpoint = self.trainer.checkpoint_callback
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.best_model_path:
            score = checkpoint.best_model_score
            how_good = "" if score is None else f" ({checkpoint.monitor} {score:.4f})"
            lines.append(f"checkpoint  {checkpoint.best_model_path}{how_good}")
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        lines += [f"picture     {each.path}" for each in callbacks if isinstance(each, IdleMonitor) and each.path]
        print("\n".join(["", *lines]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; `arguments` is None for those of the process."""
    register()
    commands = ("fit", "validate", "test", "predict")
    usage = {name: {"usage": f"cpipe {name} --config recipe.yaml [--key.subkey=value ...]"} for name in commands}
    PipelineCLI(
        args=None if arguments is None else list(arguments),
        parser_kwargs={"prog": "cpipe", **usage},
        save_config_kwargs={"overwrite": True},
    )
