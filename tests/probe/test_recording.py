"""A recording tells which modules were called when, what they gave, and what was done to it afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_cpipe.errors import CutError
from lightning_cpipe.probe.recording import Recording, record
from lightning_cpipe.stage.cut import Value


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor | int]]:
        return x + 1, {"twice": 2 * x, "number": 3}


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
        self.pair = Pair()
        self.middle, self.last = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x, more = self.pair(self.inner(x))
        more["twice"] += 1
        x, _ = self.pair(self.middle(x))
        return self.last(x)


WATCHED = ["inner", "inner.0", "inner.1", "pair", "middle", "last"]


def recording(watched: list[str] = WATCHED) -> Recording:
    root = Root()
    found, result = record(root, lambda: root(torch.ones(3, 2)), watched)
    assert result.shape == (3, 2)
    return found


def test_calls_are_told_in_order_with_their_begin_and_end() -> None:
    calls = [(call.module, call.number, call.enter, call.exit) for call in recording().calls]
    assert calls == [
        ("inner", 0, 1, 6),
        ("inner.0", 0, 2, 3),
        ("inner.1", 0, 4, 5),
        ("pair", 0, 7, 8),
        ("middle", 0, 9, 10),
        ("pair", 1, 11, 12),
        ("last", 0, 13, 14),
    ]


def test_a_call_surrounds_those_made_inside() -> None:
    inner, linear, dropout, *_, last = recording().calls
    assert inner.surrounds(inner)
    assert inner.surrounds(linear)
    assert inner.surrounds(dropout)
    assert not linear.surrounds(inner)
    assert not inner.surrounds(last)


def test_only_what_draws_itself_draws() -> None:
    """A module around one that draws does not, once that one has numbers of its own; without, it does."""
    assert [call.module for call in recording().calls if call.drew] == ["inner", "inner.1"]


def test_tensors_are_told_as_they_were_when_the_module_returned() -> None:
    values = recording().values({"pair": None, "last": None})
    assert list(values) == [*(Value("pair", call, leaf) for call in (0, 1) for leaf in (0, 1)), Value("last", 0, 0)]
    first, twice = values[Value("pair", 0, 0)], values[Value("pair", 0, 1)]
    assert torch.allclose(twice, 2 * (first - 1), atol=1e-6)
    assert first.requires_grad
    assert first.is_leaf


def test_what_is_written_afterwards_is_noticed() -> None:
    found = recording()
    assert found.rewritten(Value("pair", 0, 1))
    assert not found.rewritten(Value("pair", 0, 0))
    assert not found.rewritten(Value("last", 0, 0))


@pytest.mark.parametrize(
    ("write", "noticed"),
    [
        (lambda x: x.add_(1), True),
        (lambda x: x[0].zero_(), True),
        (lambda x: x.view(-1).relu_(), True),
        (lambda x: nn.functional.relu(x, inplace=True), True),
        (lambda x: x + 1, False),
        (lambda x: x.t(), False),
    ],
    ids=["in place", "a part", "a view", "by an activation", "out of place", "only viewed"],
)
def test_ways_to_write(write: Callable[[Tensor], Tensor], noticed: bool) -> None:
    root = nn.Sequential(nn.Linear(2, 2))
    found, _ = record(root, lambda: write(root(torch.ones(3, 2))), ["0"])
    assert found.rewritten(Value("0", 0, 0)) is noticed


def test_outputs_are_told_before_the_user_s_hooks_change_them() -> None:
    root = nn.Sequential(nn.Identity())
    root[0].register_forward_hook(lambda module, args, output: output + 1)
    found, result = record(root, lambda: root(torch.zeros(2)), ["0"])
    assert found.values({"0": None})[Value("0", 0, 0)].tolist() == [0, 0]
    assert result.tolist() == [1, 1]


def test_a_stage_begins_where_the_step_passes_once() -> None:
    found = recording()
    assert found.beginning("last") == 13
    with pytest.raises(CutError, match="'pair': the module is called 2 times"):
        found.beginning("pair")
    with pytest.raises(CutError, match="'never': the module is not called"):
        found.beginning("never")


@pytest.mark.parametrize(
    ("moment", "finished"),
    [(1, ()), (4, ("inner.0",)), (7, ("inner",)), (13, ("inner", "pair", "middle"))],
)
def test_modules_that_are_finished_are_told_by_the_outermost(moment: int, finished: tuple[str, ...]) -> None:
    assert recording().called_before(moment, WATCHED, (), ()) == dict.fromkeys(finished)


def test_a_module_called_on_both_sides_of_a_cut_is_told_with_the_calls_before_it_unless_nothing_in_it_changes() -> None:
    found = recording()
    assert found.called_before(9, ["inner", "pair"], (), ()) == {"inner": None, "pair": 1}
    assert found.called_before(9, ["inner", "pair"], {"pair"}, ()) == {"inner": None}
    assert list(found.values({"pair": 1})) == [Value("pair", 0, 0), Value("pair", 0, 1)]


def test_a_writer_of_buffers_on_both_sides_of_a_cut_is_refused() -> None:
    with pytest.raises(CutError, match=r"'pair' is called on both sides of a cut and writes buffers.*`split_points`"):
        recording().called_before(9, ["inner", "pair"], (), {"pair"})


def test_a_cut_inside_a_later_call_is_refused() -> None:
    found = recording()
    inside = found.of("pair")[1].enter + 0.5
    with pytest.raises(CutError, match=r"inside call 2 of 'pair'.*`split_points`"):
        found.called_before(inside, ["inner", "pair"], (), ())  # type: ignore[arg-type]


def test_no_hook_is_left_after_an_error() -> None:
    root = Root()

    def fail() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        record(root, fail, WATCHED)
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in root.modules())
