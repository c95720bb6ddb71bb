"""No rank outlives the process that launched it."""

from __future__ import annotations

import pytest

from tests.failures.conftest import ENDS_WITHIN_S, Run

# Under popen, the first rank is the launcher.
LAUNCHERS = [
    ("fork", 3, 0),
    pytest.param("fork", 2, 1, marks=pytest.mark.full),
    pytest.param("torchrun", 2, 1, marks=pytest.mark.full),
    pytest.param("spawn", 2, 1, marks=pytest.mark.full),
    pytest.param("popen", 3, 2, marks=pytest.mark.full),
    pytest.param("torchrun", 3, 0, marks=pytest.mark.full),
]


@pytest.mark.parametrize(("launcher", "p", "killer"), LAUNCHERS)
def test_no_rank_outlives_its_launcher(run: Run, launcher: str, p: int, killer: int) -> None:
    ended = run(launcher, p, fault={"kind": "orphan", "rank": killer}, epochs=-1)
    assert ended.status == -9
    assert ended.seconds < ENDS_WITHIN_S
    story = "its process is gone (killed?)" if launcher == "popen" else "the process that launched it is gone"
    assert ended.causes
    assert all(story in cause for cause in ended.causes), ended.causes
    assert "Traceback" not in ended.err


@pytest.mark.full
@pytest.mark.parametrize(("launcher", "moment"), [("popen", "setup"), ("spawn", "setup"), ("torchrun", "setup")])
def test_no_rank_outlives_its_launcher_during_set_up(run: Run, launcher: str, moment: str) -> None:
    ended = run(launcher, 2, fault={"kind": "orphan", "rank": 1, "moment": moment}, epochs=-1)
    assert ended.status == -9
    assert ended.seconds < ENDS_WITHIN_S
