"""One stage of an unchanged step: stubs return what was received, and the step is left where the next stage begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_cpipe.errors import CutError, DataMismatchError
from lightning_cpipe.stage.cut import Crossing, Passage, Value
from lightning_cpipe.stage.replay import Replay
from lightning_cpipe.torch_private import has_gradient_hooks
from lightning_cpipe.tree import Template

CPU = torch.device("cpu")
X = torch.full((2, 3), 2.0)


class Times(nn.Module):
    """Multiplies by its weight, and counts how often it did."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(float(factor)))
        self.runs = 0

    def forward(self, x: Tensor) -> dict[str, Any]:
        self.runs += 1
        return {"out": x * self.weight, "side": x + 1, "number": 5}


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = Times(2), Times(3), Times(5)

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.one, self.two, self.three):
            made = block(x)
            x = made["out"] * made["number"] / 5
        return x


def crossing(module: str, leaf: int = 0, *, gradient: bool = True, rewritten: bool = False, call: int = 0) -> Crossing:
    return Crossing(Value(module, call, leaf), gradient, rewritten)


FIRST = Passage(0, "two", sends=(crossing("one"), crossing("one", 1, gradient=False)))
MIDDLE = Passage(1, "three", {"one": None}, (crossing("one"),), (crossing("one"), crossing("two")))
LAST = Passage(2, None, {"one": None, "two": None}, (crossing("two"),))
TABLE = {(name, 0): Template.of(Times(1)(X)) for name in ("one", "two", "three")}


def run(passage: Passage, received: tuple[Tensor, ...] = (), step: Any = None, **options: Any) -> tuple[Root, Any]:
    root = Root()
    replay = Replay(root, {"step": passage}, CPU, options.pop("stubbed_later", ()))
    made = replay.run("step", (lambda: step(root)) if step else lambda: root(X), received, TABLE, **options)
    replay.remove()
    return root, made


def test_the_first_stage_ends_where_the_next_begins() -> None:
    root, made = run(FIRST)
    assert (root.one.runs, root.two.runs, root.three.runs) == (1, 0, 0)
    assert made.returned is None
    assert [sent.tolist() for sent in made.sent] == [(X * 2).tolist(), (X + 1).tolist()]
    assert [sent.requires_grad for sent in made.sent] == [True, False]


def test_a_stage_in_the_middle_begins_with_what_it_received() -> None:
    leaf = torch.full((2, 3), 7.0, requires_grad=True)
    root, made = run(MIDDLE, (leaf,))
    assert (root.one.runs, root.two.runs, root.three.runs) == (0, 1, 0)
    assert made.sent[0] is leaf
    assert made.sent[1].tolist() == (leaf * 3).tolist()
    made.sent[1].sum().backward()
    assert leaf.grad.tolist() == [[3.0] * 3] * 2
    assert root.one.weight.grad is None
    assert root.two.weight.grad == 42


def test_the_last_stage_runs_through() -> None:
    root, made = run(LAST, (torch.full((2, 3), 7.0),))
    assert (root.one.runs, root.two.runs, root.three.runs) == (0, 0, 1)
    assert made.returned.tolist() == [[35.0] * 3] * 2
    assert made.sent == []


def test_stubs_return_what_is_not_a_tensor_as_it_was_and_zeros_for_what_nobody_needs() -> None:
    seen = []

    def step(root: Root) -> Tensor:
        seen.append(root.one(X))
        seen.append(root.two(X))
        return root.three(X)["out"]

    run(LAST, (X,), step)
    assert seen[0]["out"].tolist() == seen[0]["side"].tolist() == [[0.0] * 3] * 2
    assert seen[1]["out"] is X
    assert (seen[0]["number"], seen[0].keys()) == (5, {"out", "side", "number"})


def test_what_a_step_does_to_a_filler_is_not_there_in_the_next() -> None:
    fillers = []

    def step() -> None:
        fillers.append(root.one(X)["out"])
        assert not fillers[-1].requires_grad
        fillers[-1].requires_grad_()

    root = Root()
    replay = Replay(root, {"step": LAST}, CPU)
    for _ in range(2):
        replay.run("step", step, (X,), TABLE)
    assert fillers[0].data_ptr() == fillers[1].data_ptr()


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (lambda filler: None, True),
        (lambda filler: filler.add_(1), False),
        (lambda filler: filler.detach_(), False),
        (lambda filler: filler.unsqueeze_(0), False),
        (lambda filler: filler.register_hook(lambda gradient: gradient), False),
    ],
    ids=["nothing", "write", "detach", "reshape", "hook"],
)
def test_a_guarded_filler_is_used_again_unless_a_step_changed_it(
    change: Callable[[Tensor], object], again: bool
) -> None:
    root, fillers = Root(), []

    def step() -> None:
        fillers.append(filler := root.one(X)["out"])
        assert (filler.shape, filler.requires_grad, has_gradient_hooks(filler)) == (X.shape, True, False)
        if len(fillers) == 1:
            change(filler)

    replay = Replay(root, {"step": replace(LAST, guarded=frozenset({Value("one", 0, 0)}))}, CPU)
    for _ in range(3):
        replay.run("step", step, (X,), TABLE)
    assert (fillers[1] is fillers[0]) is again
    assert fillers[2] is fillers[1]


def test_a_gradient_that_reaches_what_was_not_received_is_an_error() -> None:
    """A step may write into such zeros, and lead a gradient past them."""
    passage = replace(LAST, guarded=frozenset({Value("one", 0, 0)}))

    def step(root: Root) -> Tensor:
        early = root.one(X)["out"]
        early += 1
        made = root.three(root.two(X)["out"])["out"]
        return made + early if used else made

    used = False
    run(passage, (X,), step)[1].returned.sum().backward()
    used = True
    with pytest.raises(CutError, match=r"the output of 'one' gets a gradient on a later stage.*weight that is 0"):
        run(passage, (X,), step)[1].returned.sum().backward()


def test_what_was_received_is_copied_where_code_writes_into_it() -> None:
    """A leaf that needs a gradient may not be written, and what is handed on stays as it came."""
    passage = Passage(1, "three", {"one": None}, (crossing("one", rewritten=True),), (crossing("one", rewritten=True),))
    leaf = torch.ones(2, 3, requires_grad=True)

    def step(root: Root) -> None:
        root.one(X)["out"].add_(1)
        root.three(X)

    _, made = run(passage, (leaf,), step)
    assert made.sent[0] is leaf
    assert leaf.tolist() == [[1.0] * 3] * 2


def test_what_is_sent_is_copied_where_code_writes_into_it() -> None:
    passage = Passage(0, "two", sends=(crossing("one", rewritten=True),))

    def step(root: Root) -> None:
        made = root.one(X)["out"]
        made += 100
        root.two(made)

    root, made = run(passage, step=step)
    assert made.sent[0].tolist() == (X * 2).tolist()
    made.sent[0].sum().backward()
    assert root.one.weight.grad == 12


@pytest.mark.parametrize(
    ("passage", "received", "step", "error", "words"),
    [
        (FIRST, (), lambda root: root.one(X), CutError, "ran step to its end and never reached 'two'"),
        (FIRST, (), lambda root: root.two(X), CutError, "without having made the output of 'one'"),
        (LAST, (X,), lambda root: [root.one(X), root.one(X)], CutError, "'one' was called 2 times on stage 2"),
        (
            FIRST,
            (),
            lambda root: [root.one(X)["out"].add_(1), root.two(X)],
            DataMismatchError,
            "the output of 'one' was written in place between the module and the cut at 'two'.*out of place",
        ),
    ],
    ids=["not reached", "not made", "too often", "written"],
)
def test_a_step_that_passes_otherwise_than_in_the_probe_fails(
    passage: Passage, received: tuple[Tensor, ...], step: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        run(passage, received, step)


@pytest.mark.parametrize(
    ("made", "news"),
    [
        ({"out": X, "side": X, "number": 6}, "6 in place of 5"),
        ({"out": X, "side": X, "number": 5.0}, "5.0 in place of 5"),
        ({"out": X, "side": X[:1], "number": 5}, r"float32\[1, 3\] in place of float32\[2, 3\]"),
        ({"out": X, "side": X.double(), "number": 5}, r"float64\[2, 3\] in place of float32\[2, 3\]"),
        ({"out": X, "side": None, "number": 5}, "None in place of float32"),
        ({"out": X, "number": 5}, "another structure"),
    ],
    ids=["number", "kind of number", "shape", "dtype", "nothing", "structure"],
)
def test_an_output_unlike_what_later_stages_were_told_fails(made: dict[str, Any], news: str) -> None:
    def step(root: Root) -> None:
        root.one.forward = lambda x: made
        root.one(X)

    with pytest.raises(DataMismatchError, match=f"'one' returned something else than .*: {news}"):
        run(FIRST, step=step)


def test_outputs_of_another_shape_are_described_where_that_is_asked_for() -> None:
    _, made = run(FIRST, step=lambda root: root(X[:1]), describe=True, stubbed_later=("one", "two"))
    assert made.templates == {("one", 0): Template.of(Times(1)(X[:1]))}


def test_a_step_that_switched_gradients_off_does_not_leave_them_off() -> None:
    def step(root: Root) -> None:
        made = root.one(X)
        torch.set_grad_enabled(False)
        root.two(made["out"])

    run(FIRST, step=step)
    assert torch.is_grad_enabled()


def test_no_exception_handler_of_the_step_sees_its_end() -> None:
    caught = []

    def step(root: Root) -> None:
        try:
            root(X)
        except Exception as error:
            caught.append(error)
        finally:
            caught.append("finally")

    run(FIRST, step=step)
    assert caught == ["finally"]


def test_errors_of_the_step_are_its_own() -> None:
    def step(root: Root) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(FIRST, step=step)


def test_the_user_s_hooks_on_the_next_stage_s_block_run_there_alone() -> None:
    for passage, received, times in ((FIRST, (), 0), (MIDDLE, (X,), 1)):
        root = Root()
        ran: list[Any] = []
        root.two.register_forward_pre_hook(lambda module, args, ran=ran: ran.append(args))
        Replay(root, {"step": passage}, CPU).run("step", lambda root=root: root(X), received, TABLE)
        assert len(ran) == times


def test_outside_a_run_stubs_and_hooks_do_nothing() -> None:
    """Activation checkpoints run modules in the backward."""
    root = Root()
    replay = Replay(root, {"step": LAST, "other": FIRST}, CPU)
    expected = Root()(X)
    assert torch.equal(root(X), expected)
    replay.run("step", lambda: root(X), (X,), TABLE)
    assert torch.equal(root(X), expected)


def test_each_step_has_stubs_of_its_own() -> None:
    root = Root()
    replay = Replay(root, {"step": LAST, "other": FIRST}, CPU)
    replay.run("other", lambda: root(X), (), TABLE)
    assert root.one.runs == 1


def user_s_own(module: nn.Module) -> None:
    module.forward = lambda x: {"out": x, "side": x, "number": 5}


@pytest.mark.parametrize("prepare", [lambda module: None, user_s_own], ids=["class", "instance"])
def test_the_module_is_as_it_was_afterwards(prepare: Callable[[nn.Module], None]) -> None:
    root = Root()
    prepare(root.one)
    before = {name: dict(module.__dict__) for name, module in root.named_modules()}
    replay = Replay(root, {"step": LAST, "other": MIDDLE}, CPU, ("one", "two"))
    assert root.one.forward is not before["one"].get("forward")
    replay.remove()
    assert {name: dict(module.__dict__) for name, module in root.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in root.modules())


def test_the_user_s_hooks_run_after_a_stub_too() -> None:
    root = Root()
    root.one.register_forward_hook(lambda module, args, output: {**output, "out": output["out"] * 10})
    sent = Replay(root, {"step": FIRST}, CPU).run("step", lambda: root(X)).sent[0]
    assert sent.tolist() == (X * 2).tolist()
    root = Root()
    root.one.register_forward_hook(lambda module, args, output: {**output, "out": output["out"] * 10})
    made = Replay(root, {"step": MIDDLE}, CPU).run("step", lambda: root(X), (sent,), TABLE)
    assert made.sent[1].tolist() == (X * 2 * 10 * 3).tolist()
