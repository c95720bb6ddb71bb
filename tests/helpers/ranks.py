"""Runs a function in forked ranks; importing torch and Lightning in each would take longer than the run."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

LIMIT_S = 300


def run_ranks(function: Callable[[int], Any], ranks: int, threads: int = 1) -> list[Any]:
    """What `function(rank)` returns in each of `ranks` processes, with `threads` threads each.

    Raises:
        RuntimeError: if a rank fails, or all take longer than five minutes.
    """
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(ranks)]
    processes = [
        context.Process(target=_rank, args=(function, rank, ranks, threads, pipes[rank][1]), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    # Held here, as by the agent of torchrun: ranks that look for it before rank 0 has made it wait half a second. Made
    # after the last fork: it has a thread, which a forked process would lack with the locks that it holds.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results: list[Any] = []
    try:
        for channel, _ in pipes:
            channel.send(store.port)
        for rank, (channel, _) in enumerate(pipes):
            if not channel.poll(LIMIT_S):
                raise RuntimeError(f"rank {rank} took longer than {LIMIT_S} s")
            kind, content = pickle.loads(channel.recv_bytes())
            if kind == "error":
                raise RuntimeError(f"rank {rank} failed:\n{content}")
            results.append(content)
    finally:
        for process in processes:
            process.join(timeout=20)
            process.kill()
        # A traceback would keep it, and its thread.
        del store
    return results


def _rank(function: Callable[[int], Any], rank: int, ranks: int, threads: int, channel: Any) -> None:
    os.environ.update(
        {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(channel.recv()),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "GROUP_RANK": "0",
            "TORCHELASTIC_RUN_ID": "benchmark",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": str(threads),
        }
    )
    # Lightning takes the processes as torchrun's.
    torch.set_num_threads(threads)
    try:
        _send(channel, "result", function(rank))
    except BaseException:
        _send(channel, "error", traceback.format_exc())


def _send(channel: Any, kind: str, content: Any) -> None:
    # A pipe's own pickler would share the memory of tensors, which is gone when this process has ended.
    channel.send_bytes(pickle.dumps((kind, content)))
