"""What every test starts from, and what none may leave behind."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

# One thread per stage: LayerNorm and convolutions give other bits with two. Read when torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"
# torch's store asks for the name of whoever calls; a name server that answers late would hold up all ranks.
os.environ["RES_OPTIONS"] = "attempts:0"
# Models are made from their configurations, with random weights.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import torch.distributed as dist

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def all_temporary() -> Iterator[Path]:
    """Holds what libraries keep there from one test to the next, such as the media of W&B."""
    with tempfile.TemporaryDirectory(prefix="cpipe_") as folder:
        yield Path(folder)


@pytest.fixture
def temporary(all_temporary: Path) -> Path:
    """A folder of the test's own: another run of the tests may be under way on this machine.

    Its path is short, which `tmp_path` is not: workers of a loader hand over tensors through a socket in it, and a
    socket's path may have 107 characters. With a longer one nothing arrives, and the loader waits for ever.
    """
    return Path(tempfile.mkdtemp(dir=all_temporary))


@pytest.fixture(autouse=True)
def nothing_is_left(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No process, thread, process group, environment variable or temporary file outlives a test."""
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    # What the probe measures is kept for the next run, but not for the next test.
    monkeypatch.setenv("XDG_CACHE_HOME", str(temporary / "cache"))
    monkeypatch.delenv("LIGHTNING_CPIPE_CACHE", raising=False)
    environment = dict(os.environ)
    yield
    assert not multiprocessing.active_children(), "a process was left running"
    assert not [each.name for each in threading.enumerate() if each.name.startswith("lightning_cpipe")]
    assert not dist.is_initialized(), "a process group was left"
    changed = {key for key in environment.keys() | os.environ.keys() if environment.get(key) != os.environ.get(key)}
    changed -= {"PYTEST_CURRENT_TEST"}
    for key in changed:
        os.environ.pop(key, None)
    os.environ.update(environment)
    assert not changed, f"environment variables were changed: {sorted(changed)}"
    assert not list(temporary.glob("lightning_cpipe_*")), "files of last words were left"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loggers and checkpoints write into the test's own folder."""
    monkeypatch.chdir(tmp_path)
