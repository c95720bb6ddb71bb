"""Shapes are told once for each signature of a batch, and give the specs of what crosses, in the message's order."""

from __future__ import annotations

import torch

from lightning_cpipe.engine.shapes import Shapes
from lightning_cpipe.stage.cut import Crossing, Passage, StepCut, Value
from lightning_cpipe.tree import Template, TensorSpec, signature


def table(size: int) -> dict[tuple[str, int], Template]:
    """The templates for batches of this size."""
    return {
        ("embed", 0): Template.of((torch.zeros(size, 2), None, torch.zeros(size, dtype=torch.int64))),
        ("embed", 1): Template.of(torch.zeros(size, 7)),
        ("block", 0): Template.of({"hidden": torch.zeros(size, 5, dtype=torch.bfloat16)}),
    }


CROSSINGS = (
    Crossing(Value("block", 0, 0), gradient=True, rewritten=False),
    Crossing(Value("embed", 0, 1), gradient=False, rewritten=False),
    Crossing(Value("embed", 1, 0), gradient=True, rewritten=True),
)


def shapes(keep: int = 9) -> Shapes:
    """Those of a step whose probe saw a batch of 3, on a stage that hands on what it receives."""
    passage = Passage(1, "next", receives=CROSSINGS, sends=CROSSINGS)
    return Shapes(StepCut((Passage(0), passage), signature(torch.zeros(3, 2)), table(3)), passage, keep)


def test_what_the_probe_saw_is_known_and_nothing_else() -> None:
    known = shapes()
    found = known.of(signature(torch.ones(3, 2)))
    assert found is not None
    assert found.table == table(3)
    for other in (torch.zeros(4, 2), torch.zeros(3, 2, dtype=torch.float64), [torch.zeros(3, 2)]):
        assert known.of(signature(other)) is None


def test_what_was_learnt_stays_known() -> None:
    known = shapes()
    learnt = known.learn(signature(torch.zeros(4, 2)), table(4))
    assert known.of(signature(torch.zeros(4, 2))) is learnt
    assert learnt.table == table(4)
    assert known.of(signature(torch.zeros(3, 2))) is not None


def test_what_came_first_is_forgotten_first_where_shapes_never_stop_changing() -> None:
    known = shapes(keep=2)
    for size in (4, 5):
        known.learn(signature(torch.zeros(size, 2)), table(size))
    assert [known.of(signature(torch.zeros(size, 2))) is None for size in (3, 4, 5)] == [True, False, False]


SPECS = [TensorSpec((4, 5), torch.bfloat16), TensorSpec((4,), torch.int64), TensorSpec((4, 7), torch.float32)]


def test_the_specs_come_in_the_order_of_the_message() -> None:
    found = shapes().learn(signature(torch.zeros(4, 2)), table(4))
    assert found.received == found.sent == SPECS


def test_only_what_has_a_gradient_comes_back() -> None:
    assert shapes().learn(signature(torch.zeros(4, 2)), table(4)).gradients == [SPECS[0], SPECS[2]]


def test_what_a_stage_makes_itself_is_known_once_it_has_run() -> None:
    """The stages before tell of theirs."""
    passage = Passage(1, "next", receives=CROSSINGS[1:], sends=CROSSINGS)
    known = Shapes(StepCut((Passage(0), passage), signature(torch.zeros(3, 2)), table(3)), passage)
    told = {key: template for key, template in table(4).items() if key[0] == "embed"}
    before = known.learn(signature(torch.zeros(4, 2)), told)
    assert (before.received, before.sent, before.gradients) == (SPECS[1:], [], [])
    assert known.learn(signature(torch.zeros(4, 2)), table(4)).sent == SPECS
