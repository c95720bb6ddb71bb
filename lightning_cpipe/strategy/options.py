"""What a user asks of the strategy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_cpipe.probe.probe import Check
from lightning_cpipe.schedules.schedule import Schedule

Clip = Literal["stage", "suffix", "lagged"]
"""By which norm the continuous schedule clips the gradient of a stage; see `ContinuousPipeStrategy`."""

LoadOn = Literal["all", "ends"]
StartMethod = Literal["popen", "spawn", "fork", "forkserver"]


@dataclass(frozen=True)
class Options:
    """The strategy's own arguments, as `ContinuousPipeStrategy` documents them; nothing is checked yet."""

    num_stages: int | Literal["auto"] = "auto"
    data_parallel_size: int = 1
    schedule: str | Schedule = "continuous"
    num_microbatches: int = 1
    split_points: list[str] | str = "auto"
    memory_limit: str | int | None = None
    versions: str = "stash"
    remedy: str | None = None
    extra_in_flight: int = 0
    early_input_gradient: bool = False
    clip: Clip = "lagged"
    cross_epoch: bool = True
    exact_resume: bool = False
    check: Check = "auto"
    looks: bool = True
    load_on: LoadOn = "all"
    async_save: bool = False
    save_distributed_checkpoint: bool = False
    timeout: float = 60.0
    process_group_backend: str | None = None
    start_method: StartMethod = "popen"
