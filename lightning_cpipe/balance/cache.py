"""Keeps measured costs between runs, so that the next run on the same hardware cuts in the same places.

One small JSON file for each module, batch, hardware and precision, in ``$XDG_CACHE_HOME/lightning_cpipe`` (usually
``~/.cache/lightning_cpipe``). ``LIGHTNING_CPIPE_CACHE`` in the environment names another folder, or is ``off``.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from lightning_cpipe.balance.costs import BlockCost, Costs
from lightning_cpipe.probe.step import Step
from lightning_cpipe.probe.survey import Survey

CACHE = "LIGHTNING_CPIPE_CACHE"
"""The environment variable with the folder of the cache, or ``off``."""

_FORMAT = 1
"""Grows when what is measured, or how it is written, changes."""


class CostCache:
    """The kept costs of one module's step.

    Args:
        root: the whole module.
        step: its step.
        survey: of it.
        blocks: whose costs.
        device: where it runs.
    """

    def __init__(
        self, root: nn.Module, step: Step, survey: Survey, blocks: Sequence[str], device: torch.device
    ) -> None:
        parameters = [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in root.named_parameters()]
        what = (_FORMAT, repr(root), parameters, tuple(blocks), sorted(survey.begun.items()), survey.forward_flops)
        how = (step.name, step.signature, step.precision, *hardware(device))
        name = hashlib.blake2b(repr((what, how)).encode(), digest_size=16).hexdigest()
        self._blocks = list(blocks)
        folder = _folder()
        self.path = None if folder is None else folder / f"costs-{name}.json"
        """The file; None if nothing is kept."""

    def load(self) -> Costs | None:
        """What was kept; None if there is nothing, or (with a warning) if it can't be read."""
        if self.path is None or not self.path.exists():
            return None
        try:
            costs = Costs(tuple(BlockCost(**block) for block in json.loads(self.path.read_text())))
            if [block.name for block in costs.blocks] != self._blocks or not sum(costs.to_balance) >= 0:
                raise ValueError("it is about other blocks")
            costs.held(0, len(self._blocks))
        except (OSError, ValueError, TypeError, AttributeError, IndexError) as error:
            warnings.warn(f"{self.path} can't be read ({error}); the blocks are measured again.", stacklevel=2)
            return None
        return costs

    def save(self, costs: Costs) -> None:
        """Keep the costs for the next run. A reader sees the whole file or none."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
                json.dump([asdict(block) for block in costs.blocks], file)
            os.replace(file.name, self.path)
        except OSError as error:
            warnings.warn(f"what the blocks cost can't be kept in {self.path} ({error}).", stacklevel=2)


def hardware(device: torch.device) -> tuple[object, ...]:
    """What times depend on besides the module."""
    if device.type == "cuda":
        of_device: tuple[object, ...] = (torch.cuda.get_device_name(device), torch.version.cuda)
    else:
        of_device = (device.type, _processor(), torch.get_num_threads())
    return (*of_device, torch.__version__, torch.get_float32_matmul_precision())


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _folder() -> Path | None:
    chosen = os.environ.get(CACHE)
    if chosen == "off":
        return None
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_cpipe"
