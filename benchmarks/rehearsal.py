"""How much longer a rehearsal takes than plain Lightning: all stages of a pipeline in one process, one thread.

`python -m benchmarks.rehearsal` trains the small GPT of the demos in all these ways at once, each in its own process.
They take turns, one step each, so that whatever slows the machine for a while slows all of them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import lightning.pytorch as pl

from benchmarks.quiet import run_quietly
from lightning_cpipe import ContinuousPipeStrategy
from lightning_cpipe.demos.char_gpt import CharData, CharGPT

WARM_UP = 12
"""Mini-batches that are not counted: the pipeline of 8 stages is filled by then."""

PLAIN = "plain Lightning"

CONTESTANTS: dict[str, Mapping[str, Any] | None] = {
    PLAIN: None,
    "4 stages, versions='stash'": {"num_stages": 4},
    "4 stages, versions='latest'": {"num_stages": 4, "versions": "latest"},
    "8 stages, versions='stash'": {"num_stages": 8},
}


class InTurn(pl.Callback):
    """Makes a step when it is this process's turn, and tells the time that the step computed."""

    def __init__(self, turns: Connection) -> None:
        self._turns = turns
        self._begun = 0.0

    def on_train_start(self, *_: Any) -> None:
        """Wait for the first turn."""
        self._wait()

    def on_train_batch_end(self, *_: Any) -> None:
        """From one end to the next: whatever a step does for others than its own mini-batch counts, too."""
        self._turns.send(time.process_time() - self._begun)
        self._wait()

    def _wait(self) -> None:
        self._turns.recv()
        self._begun = time.process_time()


def train(options: Mapping[str, Any] | None, width: int, batch_size: int, steps: int, turns: Connection) -> None:
    """One contestant, in a process of its own."""
    run_quietly()
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy="auto" if options is None else ContinuousPipeStrategy(**options),
        max_steps=WARM_UP + steps,
        callbacks=[InTurn(turns)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(CharGPT(width=width), datamodule=CharData(batch_size))


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    asked = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    turns, processes = {}, []
    for name, options in CONTESTANTS.items():
        turns[name], theirs = context.Pipe()
        arguments = (options, asked.width, asked.batch_size, asked.steps, theirs)
        processes.append(context.Process(target=train, args=arguments, daemon=True))
        processes[-1].start()
        theirs.close()
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for number in range(WARM_UP + asked.steps):
        for name, turn in turns.items():
            turn.send(None)
            took = turn.recv()
            if number >= WARM_UP:
                seconds[name].append(took)
    for turn in turns.values():
        turn.send(None)
    for process in processes:
        process.join()
    plain = seconds[PLAIN]
    print(f"{PLAIN}: {1e3 * statistics.median(plain):.1f} ms per step, median of {asked.steps}")
    for name in list(CONTESTANTS)[1:]:
        ratios = [mine / its for mine, its in zip(seconds[name], plain)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name}: {middle:.3f} of it by pairs of steps next to each other; half of them {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()
