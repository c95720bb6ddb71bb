"""How much longer a rehearsal takes than plain Lightning: all stages of a pipeline in one process, one thread.

`python -m benchmarks.rehearsal` trains the small GPT of the demos both ways, in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import lightning.pytorch as pl

from benchmarks.quiet import run_quietly
from lightning_cpipe import ContinuousPipeStrategy
from lightning_cpipe.demos.char_gpt import CharData, CharGPT

WARM_UP = 12
"""Mini-batches that are not counted: the pipeline of 8 stages is filled by then."""


class Clock(pl.Callback):
    """What this process had computed when each step ended; what others do on the machine does not count."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Note it."""
        self.ends.append(time.process_time())


def ms_per_step(strategy: Any, width: int, batch_size: int, steps: int) -> float:
    """The median step, in milliseconds of the one thread, once the pipeline is filled."""
    pl.seed_everything(0, verbose=False)
    clock = Clock()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        max_steps=WARM_UP + steps,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(CharGPT(width=width), datamodule=CharData(batch_size))
    steps_s = [b - a for a, b in zip(clock.ends[WARM_UP:], clock.ends[WARM_UP + 1 :])]
    return 1e3 * statistics.median(steps_s)


def main() -> None:
    """Print the ratios, of runs in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    run_quietly()
    contestants: dict[str, dict[str, Any]] = {
        "4 stages, versions='stash'": {"num_stages": 4},
        "4 stages, versions='latest'": {"num_stages": 4, "versions": "latest"},
        "8 stages, versions='stash'": {"num_stages": 8},
    }
    ratios: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(asked.rounds):
        plain = ms_per_step("auto", asked.width, asked.batch_size, asked.steps)
        print(f"round {number}: plain Lightning {plain:.1f} ms per step", flush=True)
        for name, options in contestants.items():
            mine = ms_per_step(ContinuousPipeStrategy(**options), asked.width, asked.batch_size, asked.steps)
            ratios[name].append(mine / plain)
            print(f"round {number}: {name} {mine:.1f} ms, {mine / plain:.3f} of plain", flush=True)
    for name, found in ratios.items():
        print(f"{name}: {statistics.median(found):.3f} of plain Lightning's step")


if __name__ == "__main__":
    main()
