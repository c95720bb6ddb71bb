"""Costs are measured once for each module, batch, hardware and precision, and kept."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_cpipe.balance import measure as measuring
from lightning_cpipe.balance.cache import CACHE, CostCache, hardware
from lightning_cpipe.balance.costs import CLEAR_S, Costs
from lightning_cpipe.balance.measure import measure
from lightning_cpipe.probe.step import Step
from lightning_cpipe.probe.survey import Survey, survey
from tests.helpers.probing import CPU, step_of

WIDTH = 4


class Wide(nn.Module):
    def __init__(self, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, inner), nn.Linear(inner, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self, inner: Sequence[int] = (8, 8, 800)) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*map(Wide, inner))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).sum()


def looked_at(net: nn.Module, rows: int = 3) -> tuple[Step, Survey]:
    step = step_of(net, (torch.ones(rows, WIDTH),))
    return step, survey(net, step.run)


def costs_of(net: nn.Module, **options: Any) -> Costs:
    step, seen = looked_at(net)
    return measure(net, step, seen, seen.blocks, CPU, **options)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that blocks were timed."""
    times: list[int] = []

    def count(root: nn.Module, step: Step, blocks: Sequence[str], *_: Any) -> tuple[list[float], list[float]]:
        times.append(len(blocks))
        return [0.5 + len(times)] * len(blocks), [1.0] * len(blocks)

    monkeypatch.setattr(measuring, "time_blocks", count)
    return times


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, value)
        yield


def files() -> list[Path]:
    return sorted(Path(os.environ["XDG_CACHE_HOME"]).glob("**/*"))


def test_quick_blocks_are_told_apart_by_what_they_compute() -> None:
    costs = costs_of(Net())
    assert costs.timed
    small, other, large = costs.to_balance if not costs.by_time else [block.operations for block in costs.blocks]
    assert small == other == 3 * 2 * 2 * WIDTH * 8 + 2 * WIDTH * 8 + 8 + WIDTH
    assert large / small == pytest.approx(100, rel=0.1)


def test_what_was_measured_is_kept(counted: list[int]) -> None:
    first = costs_of(Net())
    again = costs_of(Net())
    assert counted == [3]
    assert again == first
    assert [block.forward_s for block in first.blocks] == [1.5] * 3
    assert first.by_time
    assert [block.output for block in first.blocks] == [3 * WIDTH * 4] * 3


def test_it_is_kept_in_one_small_file(counted: list[int]) -> None:
    costs_of(Net())
    (folder, file) = files()
    assert folder.name == "lightning_cpipe"
    assert [block["name"] for block in json.loads(file.read_text())] == ["blocks.0", "blocks.1", "blocks.2"]


def test_another_module_batch_precision_or_machine_is_measured_anew(
    counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = Net()
    frozen.blocks[0].requires_grad_(False)
    for net in (Net(), Net([8, 8, 9]), Net().double().float().to(torch.float64), frozen):
        step = step_of(net, (torch.ones(3, WIDTH, dtype=next(net.parameters()).dtype),))
        seen = survey(net, step.run)
        measure(net, step, seen, seen.blocks, CPU)
    net = Net()
    step, seen = looked_at(net, rows=5)
    measure(net, step, seen, seen.blocks, CPU)
    step, seen = looked_at(net)
    measure(net, replace(step, precision="bf16-mixed"), seen, seen.blocks, CPU)
    measure(net, step, seen, seen.blocks[:2], CPU)
    assert len(counted) == 7
    monkeypatch.setattr("lightning_cpipe.balance.cache.hardware", lambda device: ("another machine",))
    measure(net, step, seen, seen.blocks, CPU)
    assert len(counted) == 8
    measure(net, step, seen, seen.blocks, CPU)
    assert len(counted) == 8


def test_hardware_is_processor_threads_and_torch() -> None:
    kind, processor, threads, version, _ = hardware(CPU)
    assert (kind, threads, version) == ("cpu", torch.get_num_threads(), torch.__version__)
    assert processor


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "[1]", '[{"name": "blocks.0"}]', '[{"wrong": 1}]', "null"])
def test_what_can_not_be_read_is_measured_again_with_a_warning(counted: list[int], text: str) -> None:
    expected = [block.name for block in costs_of(Net()).blocks]
    (_, file) = files()
    file.write_text(text)
    with pytest.warns(UserWarning, match=r"costs-\w+\.json can't be read .*measured again"):
        found = costs_of(Net())
    assert [block.name for block in found.blocks] == expected
    assert len(counted) == 2
    costs_of(Net())
    assert len(counted) == 2, "the file was not replaced"


def test_a_folder_that_can_not_be_written_is_said(counted: list[int]) -> None:
    Path("file").touch()
    with environment(CACHE, str(Path("file").resolve() / "folder")), pytest.warns(UserWarning, match="can't be kept"):
        costs_of(Net())
    assert counted == [3]


def test_the_cache_is_where_it_is_told_to_be(counted: list[int], tmp_path: Path) -> None:
    with environment(CACHE, str(tmp_path / "mine")):
        costs_of(Net())
    assert len(list((tmp_path / "mine").iterdir())) == 1
    assert not files()


def test_the_cache_can_be_turned_off(counted: list[int]) -> None:
    with environment(CACHE, "off"):
        costs_of(Net())
        costs_of(Net())
    assert len(counted) == 2
    assert not files()


def test_by_default_it_is_in_the_home_folder(tmp_path: Path) -> None:
    net = Net()
    step, seen = looked_at(net)
    with environment("XDG_CACHE_HOME", ""), environment("HOME", str(tmp_path)):
        path = CostCache(net, step, seen, seen.blocks, CPU).path
    assert path is not None
    assert path.parent == tmp_path / ".cache" / "lightning_cpipe"


def test_on_the_meta_device_there_are_bytes_and_no_times(counted: list[int]) -> None:
    with torch.device("meta"):
        net = Net()
        step, seen = looked_at(net)
    costs = measure(net, step, seen, seen.blocks, torch.device("meta"))
    assert not counted
    assert not costs.timed
    assert costs.to_balance == [block.operations for block in costs.blocks]
    assert costs.held(0, 1).trained == 4 * (2 * WIDTH * 8 + 8 + WIDTH)
    assert not files()


def test_a_step_that_does_not_fit_at_once_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(*_: Any) -> None:
        raise torch.OutOfMemoryError("there are 80 GB")

    monkeypatch.setattr(measuring, "time_blocks", too_much)
    with pytest.warns(UserWarning, match="does not fit into the memory of cpu.*80 GB.*floating-point operations"):
        costs = costs_of(Net())
    assert not costs.timed
    assert costs.held(0, 3).trained


def test_measuring_changes_nothing() -> None:
    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = torch.get_rng_state()
    costs_of(net)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_blocks_of_one_structure_cost_the_same_but_for_what_surrounds_them() -> None:
    costs = costs_of(Net([8] * 6))
    assert len({(block.forward_s, block.backward_s) for block in costs.blocks[1:-1]}) == 1


def test_another_clock_is_not_kept(counted: list[int]) -> None:
    class Clock:
        def now(self) -> float:
            return 0.0

        def read(self, moments: Sequence[float]) -> list[float]:
            return list(moments)

    assert costs_of(Net(), clock=Clock()).blocks[0].forward_s > CLEAR_S
    assert not files()
