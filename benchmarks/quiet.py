"""One thread, and nothing on the terminal but the benchmark's own lines."""

from __future__ import annotations

import logging
import os
import warnings

import torch


def run_quietly() -> None:
    """From here on: one thread of torch's in this process, no warnings, and no advice of Lightning's."""
    torch.set_num_threads(1)
    # Where it is not set, Lightning gives a process that it launches as many threads as there are cores.
    os.environ["OMP_NUM_THREADS"] = "1"
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
