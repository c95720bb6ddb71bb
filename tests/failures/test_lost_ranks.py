"""When one rank fails, every rank ends within seconds, the first cause is said last, and nothing is left.

For each launcher, number of ranks, rank, and for an exception as for a killed process.
"""

from __future__ import annotations

import itertools

import pytest

from tests.failures.conftest import ENDS_WITHIN_S, LAUNCHERS, Run
from tests.helpers.scripts import AT, MESSAGE

TOLD = {
    "kill": f"its process is gone (killed?); it was at mini-batch {AT}",
    "raise": f"at mini-batch {AT}: ValueError: {MESSAGE}",
}

TRACEBACKS = {"popen": 0, "spawn": 2, "fork": 2, "torchrun": 1}
"""Of the launcher's own: torch's and ours, or the agent's."""

ECHOES = ("the connection to rank", "a rank is gone", "this rank ended because another one failed")

EVERY = [
    (launcher, p, rank, kind) for launcher, p, kind in itertools.product(LAUNCHERS, (2, 3), TOLD) for rank in range(p)
]
PAIRWISE = [
    ("popen", 2, 1, "raise"),
    ("spawn", 2, 1, "kill"),
    ("torchrun", 2, 0, "raise"),
    ("fork", 3, 0, "raise"),
    ("fork", 3, 1, "kill"),
]


@pytest.mark.parametrize(
    ("launcher", "p", "rank", "kind"),
    [*PAIRWISE, *(pytest.param(*case, marks=pytest.mark.full) for case in EVERY if case not in PAIRWISE)],
)
def test_a_lost_rank_ends_all_and_is_named_last(run: Run, launcher: str, p: int, rank: int, kind: str) -> None:
    ended = run(launcher, p, fault={"kind": kind, "rank": rank}, epochs=-1)
    assert ended.status != 0
    assert ended.seconds < ENDS_WITHIN_S
    assert ended.cause == f"stage {p - 1 - rank} (rank {rank}) failed: {TOLD[kind]}"
    assert set(ended.causes) == {ended.cause}
    assert ended.err.count("Traceback") == TRACEBACKS[launcher] + (kind == "raise")
    assert not [echo for echo in ECHOES if echo in ended.err]


@pytest.mark.full
@pytest.mark.parametrize(
    ("launcher", "rank", "kind"), [("fork", 3, "kill"), ("popen", 2, "raise"), ("torchrun", 1, "kill")]
)
def test_a_lost_rank_of_one_pipeline_ends_those_beside_it(run: Run, launcher: str, rank: int, kind: str) -> None:
    ended = run(launcher, 4, fault={"kind": kind, "rank": rank}, epochs=-1, pipelines=2)
    assert ended.status != 0
    assert ended.seconds < ENDS_WITHIN_S
    assert ended.cause == f"stage {1 - rank % 2} of pipeline {rank // 2} (rank {rank}) failed: {TOLD[kind]}"
    assert set(ended.causes) == {ended.cause}
