"""``cpipe plan``: says what ``cpipe fit`` would do on so many devices, and trains nothing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_cpipe import register
from lightning_cpipe.balance.memory import bytes_of
from lightning_cpipe.cli.lightning import PipelineCLI
from lightning_cpipe.cli.printout import Printout
from lightning_cpipe.errors import CPipeError, CutError
from lightning_cpipe.strategy.planning import Planning

_USAGE = "cpipe plan --config recipe.yaml [--devices P] [--memory-limit 16GB] [--key.subkey=value ...]"

_NOTHING_WRITTEN: dict[str, Any] = {
    "logger": False,
    "callbacks": None,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "profiler": None,
}
"""The trainer's arguments without whatever writes files, or to the screen."""


class _PlanCLI(PipelineCLI):
    """``cpipe fit`` with one process, and a strategy that ends it when the module has been looked at."""

    def __init__(self, asked: argparse.Namespace, words: Sequence[str]) -> None:
        self._asked = asked
        super().__init__(
            args=["fit", *words],
            parser_kwargs={"prog": "cpipe plan", "fit": {"usage": _USAGE}},
            save_config_callback=None,
        )

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        # Lightning would advise against giving arguments beside those of the process.
        self.config = parser.parse_args(args)

    @override
    def before_instantiate_classes(self) -> None:
        trainer: Any = self.config.fit.trainer
        configured = trainer.strategy
        options: dict[str, Any] = {}
        # What another strategy was given says nothing about this one.
        if isinstance(configured, Namespace) and configured.class_path.endswith(".ContinuousPipeStrategy"):
            options |= vars(configured.get("init_args", {}))
        options["num_stages"] = self._asked.devices or _stages(options.get("num_stages"), trainer)
        if self._asked.memory_limit is not None:
            options["memory_limit"] = self._asked.memory_limit
        planning = f"{Planning.__module__}.{Planning.__qualname__}"
        trainer.strategy = Namespace({"class_path": planning, "init_args": options})  # type: ignore[no-untyped-call]
        vars(trainer).update(devices=1, num_nodes=1, **_NOTHING_WRITTEN)

    @override
    def instantiate_classes(self) -> None:
        # What the user's own code prints must not come between what is printed here.
        with redirect_stdout(sys.stderr):
            super().instantiate_classes()

    def fit(self, *args: Any, **kwargs: Any) -> None:
        """Runs instead of ``trainer.fit``."""
        with redirect_stdout(sys.stderr):
            self.trainer.fit(*args, **kwargs)


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        SystemExit: with status 2 if the arguments can't be understood, with status 1 if the module can't be cut.
    """
    parser = _parser()
    asked, words = parser.parse_known_args(arguments)
    if asked.devices is not None and asked.devices < 1:
        parser.error(f"--devices must be at least 1, not {asked.devices}.")
    if asked.memory_limit is not None:
        try:
            bytes_of(asked.memory_limit)
        except ValueError as error:
            parser.error(f"--memory-limit: {error}.")
    register()
    try:
        printout = _printout(_PlanCLI(asked, words).trainer)
    except (CPipeError, MisconfigurationException) as error:
        print(f"cpipe plan: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    print(printout.json() if asked.format == "json" else printout.text())


def _printout(trainer: pl.Trainer) -> Printout:
    """What the strategy found.

    Raises:
        CutError: if the stages begin where costs can't be told.
    """
    strategy = trainer.strategy
    assert isinstance(strategy, Planning)
    if strategy.forecast is None:
        raise CutError(f"{type(trainer.lightning_module).__name__} has no blocks to plan with.")
    about = {
        "module": type(trainer.lightning_module).__name__,
        "device": str(strategy.root_device),
        "precision": str(trainer.precision),
    }
    return Printout(strategy.forecast, about, strategy.inside)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cpipe plan",
        usage=_USAGE,
        description="Measure the blocks of a module on its first batch, and print where `cpipe fit` would cut it and"
        " what to expect: time, memory, traffic, delay, throughput. Nothing is trained, and nothing is written but"
        " the cache of measured costs. All options of `cpipe fit` are understood.",
        allow_abbrev=False,
    )
    parser.add_argument("--devices", type=int, metavar="P", help="stages, one per device; default: the config's")
    parser.add_argument("--memory-limit", metavar="SIZE", help="of each stage, such as 16GB; default: the config's")
    parser.add_argument("--format", choices=["text", "json"], default="text", help="default: text")
    return parser


def _stages(num_stages: Any, trainer: Namespace) -> int:
    """How many stages a config asks for.

    Raises:
        MisconfigurationException: if it leaves that to the machine.
    """
    devices = trainer.devices
    for asked in (num_stages, len(devices) if isinstance(devices, list) else devices):
        if str(asked).isdecimal() and int(asked) > 0:
            return int(asked)
    raise MisconfigurationException(f"the config has devices={devices!r}; say for how many with `--devices`.")
