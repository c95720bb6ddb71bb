"""What a stub returns besides tensors is what the module returned; objects that can't be known can't be used."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from lightning_cpipe.errors import CutError
from lightning_cpipe.stage.describing import Opaque, described, difference
from lightning_cpipe.tree import Template, TensorSpec

X = torch.ones(2, 3)


def template_of(output: Any) -> Template:
    return described(output, "block")[0]


class Color(Enum):
    RED = 1
    BLUE = 2


class Unknown:
    def __init__(self) -> None:
        self.hidden = X


@dataclass
class Known:
    hidden: Any
    more: Any


PLAIN = [None, True, 3, 0.5, 1j, "text", b"bytes", slice(1, 2), range(3), int, Color.RED, torch.float32, X.shape]


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_values_are_kept(value: Any) -> None:
    assert template_of((X, value)).build([X])[1] == value


OTHERS = [
    Unknown(),
    np.ones(2),
    np.float32(1),
    {1, 2},
    lambda: X,
    X.to_sparse(),
    torch.nested.as_nested_tensor([X, X[:1]], layout=torch.jagged),
    pack_sequence([X, X[:1]]),
]


@pytest.mark.parametrize("value", OTHERS, ids=lambda value: type(value).__name__)
def test_other_objects_are_not(value: Any) -> None:
    (stand_in,) = template_of([value]).leaves
    assert isinstance(stand_in, Opaque)
    with pytest.raises(
        CutError, match=rf"`\.hidden` of an object of class {type(value).__name__}.* that 'block'.*dataclasses"
    ):
        _ = stand_in.hidden
    with pytest.raises(TypeError):
        torch.ones(2) * stand_in


def test_tensors_are_kept_as_shapes_wherever_containers_hold_them() -> None:
    spec = TensorSpec.of(X)
    assert template_of({"a": [X, (X,)], "b": Known(X, Unknown())}).leaves == (
        spec,
        spec,
        spec,
        Opaque("Unknown", "block"),
    )


def test_a_stand_in_can_be_passed_on_and_travels() -> None:
    stand_in = Opaque("Unknown", "block")
    assert template_of([stand_in]).leaves == (stand_in,)
    assert template_of([stand_in]) == template_of([Unknown()])
    assert pickle.loads(pickle.dumps(stand_in)) == copy.deepcopy(stand_in) == stand_in
    assert stand_in != Opaque("Other", "block")
    assert stand_in == Opaque("Unknown", "another block"), "who passes it on returns it too"
    assert len({stand_in, Opaque("Unknown", "block"), Opaque("Other", "block")}) == 2
    assert stand_in is not None
    assert bool(stand_in)


NAN = float("nan")


@pytest.mark.parametrize(
    ("told", "found", "words"),
    [
        ((X, 1), (X * 2, 1), None),
        ((X, NAN), (X, NAN), None),
        ((X, Unknown()), (X, Unknown()), None),
        ({"a": X}, {"a": X}, None),
        ((X, 1), (X, 2), "2 in place of 1"),
        ((X, 1), (X, 1.0), "1.0 in place of 1"),
        ((X, 1), (X, True), "True in place of 1"),
        ((X, 1.0), (X, NAN), "nan in place of 1.0"),
        ((X, None), (X, X), "float32[2, 3] in place of None"),
        ((X,), (X[0],), "float32[3] in place of float32[2, 3]"),
        ((X,), (X.int(),), "int32[2, 3] in place of float32[2, 3]"),
        ((X, Color.RED), (X, Color.BLUE), "Color.BLUE in place of Color.RED"),
        ((X, Unknown()), (X, np.ones(2)), "an object of class ndarray in place of an object of class Unknown"),
        ((X,), (X, X), "another structure"),
        ((X,), [X], "another structure"),
        ({"a": X}, {"b": X}, "another structure"),
        (Known(X, 1), Known(X, [1]), "another structure"),
    ],
)
def test_differences_are_told(told: Any, found: Any, words: str | None) -> None:
    assert difference(template_of(told), template_of(found)) == words
