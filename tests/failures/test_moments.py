"""A failure at any moment ends all ranks and is named: set-up, validation, data, drain, signals, and silence."""

from __future__ import annotations

import itertools
import re
import select
import signal
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.failures.conftest import ENDS_WITHIN_S, LAUNCHERS, Run, Start
from tests.helpers.scripts import AT, BATCHES, MESSAGE

RAISED = f"ValueError: {MESSAGE}"
KILLED = r"its process is gone \(killed\?\); it was at mini-batch"
SILENCE_S = 4
DIFFER_AT = 9
LAST = BATCHES - 1

full = pytest.mark.full


def fault(kind: str, rank: int, moment: str = "train_batch_start", batch: int = AT, **others: Any) -> dict[str, Any]:
    """Options of a run that only the fault ends."""
    return {"fault": {"kind": kind, "rank": rank, "moment": moment, "batch": batch}, "epochs": -1} | others


def cases(
    name: str, launcher: str, p: int, options: Callable[[int], dict[str, Any]], story: str, default: Sequence[int] = ()
) -> list[Any]:
    """A case for each rank; `default` are the ranks that are not left to the full run."""
    return [
        pytest.param(
            *(launcher, p, options(rank), rank, story),
            id=f"{name}-{launcher}-{p}-{rank}",
            marks=() if rank in default else full,
        )
        for rank in range(p)
    ]


def on(kind: str, moment: str = "train_batch_start", batch: int = AT, **others: Any) -> Callable[[int], dict[str, Any]]:
    return lambda rank: fault(kind, rank, moment, batch, **others)


CASES = [
    *cases("set-up", "fork", 2, on("raise", "setup"), f"during set-up: {RAISED}", default=[1]),
    *cases("set-up, killed", "fork", 2, on("kill", "setup"), f"{KILLED} 0", default=[0]),
    *cases("set-up", "popen", 2, on("raise", "setup"), f"during set-up: {RAISED}"),
    *cases("set-up, killed", "popen", 3, on("kill", "setup"), f"{KILLED} 0"),
    *cases("step", "fork", 3, on("raise", "training_step"), rf"at mini-batch {AT}, in \dF{AT}: {RAISED}", default=[1]),
    *cases(
        "validation", "fork", 2, on("raise", "validation_batch_start"), rf"at mini-batch \d+: {RAISED}", default=[1]
    ),
    *cases("validation, killed", "fork", 2, on("kill", "validation_batch_start"), rf"{KILLED} \d+"),
    *cases("data", "fork", 3, on("raise", "data"), rf"at mini-batch \d+: {RAISED}"),
    *cases(
        "data of a worker",
        *("fork", 2, on("raise", "data", workers=1)),
        rf"at mini-batch \d+: ValueError: Caught ValueError in DataLoader worker process 0\. {RAISED}",
        default=[1],
    ),
    *cases(
        "killed worker",
        *("fork", 2, on("kill", "data", workers=1)),
        # A signal tells of it, at whatever the rank is just then.
        r"at mini-batch \d+(, in \w+)?: RuntimeError: DataLoader worker \(pid.* \d+\) .*",
    ),
    *cases("rank with a worker", "fork", 2, on("kill", workers=1), f"{KILLED} {AT}"),
    *cases("drain", "fork", 3, on("raise", batch=LAST, epochs=1), f"at mini-batch {LAST}: {RAISED}"),
    *cases("drain, killed", "fork", 3, on("kill", batch=LAST, epochs=1), f"{KILLED} {LAST}", default=[2]),
    *cases("end", "fork", 3, on("raise", "train_end", epochs=1), f"at mini-batch {LAST}: {RAISED}"),
    *cases("silence", "fork", 2, on("stop", timeout=SILENCE_S), f"it was silent for {SILENCE_S} s", default=[0]),
    *cases("silence", "popen", 2, on("stop", timeout=SILENCE_S), f"it was silent for {SILENCE_S} s"),
    *cases("silence", "spawn", 2, on("stop", timeout=SILENCE_S), f"it was silent for {SILENCE_S} s"),
    *cases("silence", "torchrun", 2, on("stop", timeout=SILENCE_S), f"it was silent for {SILENCE_S} s"),
]


@pytest.mark.parametrize(("launcher", "p", "options", "rank", "story"), CASES)
def test_a_failure_at_any_moment_ends_all_and_is_named_last(
    run: Run, launcher: str, p: int, options: dict[str, Any], rank: int, story: str
) -> None:
    ended = run(launcher, p, **options)
    assert ended.status != 0
    assert ended.seconds < ENDS_WITHIN_S
    assert re.fullmatch(rf"stage {p - 1 - rank} \(rank {rank}\) failed: {story}", ended.cause), ended.cause
    assert set(ended.causes) == {ended.cause}


@pytest.mark.parametrize("launcher", ["fork", pytest.param("popen", marks=full)])
def test_a_refused_module_is_shown_once(run: Run, launcher: str) -> None:
    ended = run(launcher, 2, layers=1)
    assert ended.status != 0
    assert ended.cause.startswith("stage 1 (rank 0) failed: during set-up: CutError: 2 stages need as many blocks")
    assert ended.err.count("lightning_cpipe.errors.CutError: ") == 1
    assert len(ended.causes) == 1


@pytest.mark.parametrize("launcher", ["fork", pytest.param("popen", marks=full)])
@pytest.mark.parametrize("differs_at", [0, DIFFER_AT])
def test_ranks_that_draw_different_data_stop(run: Run, launcher: str, differs_at: int) -> None:
    ended = run(launcher, 3, differs_at=differs_at)
    assert ended.status != 0
    stage, rank = map(int, re.match(r"stage (\d) \(rank (\d)\)", ended.cause).groups())  # type: ignore[union-attr]
    assert stage == 2 - rank
    if differs_at == 0:
        told = "during set-up: DataMismatchError: the training loaders differ: rank 0 and rank 1 drew different first"
    else:
        told = (
            f"at mini-batch {DIFFER_AT}, in {stage}RECV_F{DIFFER_AT}: DataMismatchError: stage {stage} and stage"
            f" {stage - 1} drew different mini-batches in training_step: number {DIFFER_AT} with fingerprint"
        )
    assert ended.cause.startswith(f"stage {stage} (rank {rank}) failed: {told}")


@pytest.mark.parametrize(
    ("launcher", "rank"),
    [("fork", 0), *(pytest.param(*case, marks=full) for case in (("fork", 1), ("popen", 0), ("popen", 1)))],
)
def test_an_interrupt_from_the_keyboard_ends_all(run: Run, launcher: str, rank: int) -> None:
    ended = run(launcher, 2, **fault("interrupt", rank))
    assert ended.status != 0
    assert ended.seconds < ENDS_WITHIN_S
    assert "Detected KeyboardInterrupt, attempting graceful shutdown" in ended.err
    assert "Traceback" not in ended.err
    if launcher == "popen":
        # All ranks ended after the same step, so that none of them failed.
        assert ended.status == 1
        assert not ended.causes


@pytest.mark.parametrize(
    ("launcher", "rank"),
    [
        ("fork", 0),
        pytest.param("fork", 1, marks=full),
        *(pytest.param(launcher, rank, marks=full) for launcher in ("popen", "torchrun") for rank in range(2)),
    ],
)
def test_a_sigterm_to_one_rank_stops_all(run: Run, launcher: str, rank: int) -> None:
    ended = run(launcher, 2, **fault("terminate", rank))
    assert ended.seconds < ENDS_WITHIN_S
    assert "fitted" not in ended.out
    if launcher == "fork":
        assert re.fullmatch(r"stage \d \(rank \d\) failed: at mini-batch \d+.*: SIGTERMException", ended.cause)
    else:
        # As in Lightning, whose exception for it is one of `sys.exit()`.
        assert ended.status == 0
        assert not ended.causes


BEFORE = list(itertools.product(LAUNCHERS, range(2), ("raise", "kill")))
BEFORE_BY_DEFAULT = [("popen", 0, "raise"), ("fork", 1, "kill")]


@pytest.mark.parametrize(
    ("launcher", "rank", "kind"),
    [pytest.param(*case, marks=() if case in BEFORE_BY_DEFAULT else full) for case in BEFORE],
)
def test_a_rank_that_is_lost_before_the_ranks_meet_ends_all(run: Run, launcher: str, rank: int, kind: str) -> None:
    ended = run(launcher, 2, **fault(kind, rank, "before_they_meet"))
    # Where the fault is in the first process, the others only begin to import when it strikes.
    assert ended.status != 0
    assert (RAISED in ended.err) == (kind == "raise")
    if launcher == "torchrun":
        assert f"rank      : {rank} (local_rank: {rank})" in ended.last_words
        return
    stage_and_rank = f"stage {1 - rank} (rank {rank}) failed: "
    if launcher != "popen":
        how = "see its error above" if kind == "raise" else "its process is gone"
        assert ended.cause == f"{stage_and_rank}{how}, before it began"
    elif rank == 1:
        assert ended.cause == f"{stage_and_rank}its process ended with status {1 if kind == 'raise' else -9}"
    elif kind == "raise":
        assert ended.cause == f"{stage_and_rank}before it began: {RAISED}"
    else:
        assert ended.cause == "stage 0 (rank 1) failed: the process that launched it is gone"


@full
@pytest.mark.parametrize("launcher", ["fork", "torchrun"])
def test_a_pipeline_that_was_suspended_as_a_whole_goes_on(start: Start, launcher: str) -> None:
    session = start(launcher, 2, fault={"kind": "tell", "rank": 1}, timeout=SILENCE_S)
    session.wait_until_told()
    session.signal(signal.SIGSTOP)
    # Nothing happens for longer than a rank may be silent.
    select.select([], [], [], 1.5 * SILENCE_S)
    session.signal(signal.SIGCONT)
    ended = session.end()
    assert ended.status == 0, ended.err
    assert "fitted" in ended.out
    assert not ended.causes
    session.require_nothing_left()


def test_what_a_rank_does_after_the_run_ends_that_rank_alone(run: Run) -> None:
    """It once ended rank 0 too, which still had to evaluate, export and draw."""
    ended = run("popen", 2, goes_on={"fits_again": False})
    assert (ended.status, ended.out.split()) == (0, ["gone:", "1", "fitted"])
    assert MESSAGE in ended.err


@pytest.mark.full
def test_no_further_run_begins_without_a_rank(run: Run) -> None:
    ended = run("popen", 2, goes_on={"fits_again": True})
    assert ended.status == 1
    assert "stage 0 (rank 1) failed: its process ended with status 1 after an earlier run" in ended.err
