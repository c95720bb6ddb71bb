"""Lightning's profilers write a file for each rank, about its own stages."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler

from tests.helpers.fits import fit_in_pipeline
from tests.helpers.modules import Chain, noise_loader

P = 2
CYCLES = 2


def profile(profiler: Profiler) -> None:
    validation = partial(noise_loader, samples=9)
    fit_in_pipeline(P, Chain, noise_loader, validation, max_epochs=2, num_sanity_val_steps=0, profiler=profiler)


@pytest.mark.parametrize("kind", [SimpleProfiler, pytest.param(AdvancedProfiler, marks=pytest.mark.full)])
def test_each_rank_writes_its_own_file(tmp_path: Path, kind: type[Profiler]) -> None:
    profile(kind(".", "times"))
    for rank in range(P):
        assert "[Strategy]ContinuousPipeStrategy.training_step" in (tmp_path / f"fit-times-{rank}.txt").read_text()


def traces(rank: int) -> list[list[dict[str, Any]]]:
    """The events of each trace of a rank that have a length, in order of time."""
    files = sorted(Path().glob(f"fit-trace-{rank}-*.json"), key=lambda path: path.name.split(".")[-4])
    contents = [json.loads(path.read_text())["traceEvents"] for path in files]
    return [sorted((each for each in events if "dur" in each), key=lambda each: each["ts"]) for events in contents]


def named(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [each for each in events if each["name"].endswith(name)]


def test_torchs_profiler_sees_the_stages_of_its_rank_cycle_by_cycle() -> None:
    """Receives that were posted in one cycle ended in another, and the profiler wrote into memory that was gone."""
    schedule = torch.profiler.schedule(wait=2, warmup=1, active=2, repeat=CYCLES)
    profile(PyTorchProfiler(".", "trace", schedule=schedule))
    for rank in range(P):
        assert Path(f"fit-trace-{rank}.txt").exists()
        of_training = [each for each in traces(rank) if named(each, "Strategy.training_step")]
        assert len(traces(rank)) >= CYCLES
        assert of_training
        for events in of_training:
            assert bool(named(events, "Block: net.3")) == (rank == 0)
            whole = named(events, "Sequential: net")
            steps = named(events, "Strategy.training_step")
            assert whole
            # On the first stage the step is left inside of it.
            for each in whole:
                end = each["ts"] + each["dur"]
                assert any(step["ts"] <= each["ts"] and end <= step["ts"] + step["dur"] for step in steps)
