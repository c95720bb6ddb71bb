"""Nested structures are taken apart and put together again, described without numbers, and compared to the bit."""

from __future__ import annotations

import pickle
from collections import OrderedDict, UserDict, defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_cpipe.tree import (
    Template,
    TensorSpec,
    copied,
    flatten,
    map_tensors,
    signature,
    tensors_in,
)

X, Y = torch.ones(2, 3), torch.zeros(4, dtype=torch.long)


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass
class Output:
    hidden: Any
    more: Any = None


@dataclass(frozen=True)
class Frozen:
    value: Any
    computed: Any = field(init=False, default=7)


@dataclass
class Slots:
    __slots__ = ("value",)
    value: Any


@dataclass
class Strict:
    """Refuses to be made without a tensor; putting it together again is no making."""

    value: Any

    def __post_init__(self) -> None:
        assert isinstance(self.value, Tensor)


STRUCTURES: dict[str, tuple[Any, list[Any]]] = {
    "a tensor": (X, [X]),
    "a number": (3, [3]),
    "None": (None, [None]),
    "a tuple": ((X, Y), [X, Y]),
    "a list": ([X, [Y, 1]], [X, Y, 1]),
    "a dict": ({"b": X, "a": Y}, [X, Y]),
    "an ordered dict": (OrderedDict(b=X, a=Y), [X, Y]),
    "a default dict": (defaultdict(list, {"a": X}), [X]),
    "a named tuple": (Pair(X, Pair(1, Y)), [X, 1, Y]),
    "a dataclass": (Output(X, {"a": Y}), [X, Y]),
    "a dataclass in a dataclass": (Output(Output(X, Frozen(Y)), [Slots(1)]), [X, Y, 7, 1]),
    "a dataclass in containers": ([{"a": (Output(X, Y), 2)}, Output(3)], [X, Y, 2, 3, None]),
    "a dataclass that checks itself": (Strict(X), [X]),
    "nothing": ((), []),
    "empty containers": ([{}, (), Output([], {})], []),
    "something else": ({1, 2}, [{1, 2}]),
}


def same(a: Any, b: Any) -> bool:
    """Equality that does not ask tensors for a truth value."""
    if isinstance(a, Tensor):
        return a is b
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (Output, Frozen, Slots, Strict)):
        names = [name for name in ("hidden", "more", "value", "computed") if hasattr(a, name)]
        return type(a) is type(b) and all(same(getattr(a, name), getattr(b, name)) for name in names)
    return bool(a == b)


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_are_taken_apart_and_put_together(name: str) -> None:
    tree, expected = STRUCTURES[name]
    leaves, structure = flatten(tree)
    assert same(leaves, expected)
    assert structure.num_leaves == len(leaves)
    assert same(structure.build(leaves), tree)


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_travel(name: str) -> None:
    tree, _ = STRUCTURES[name]
    leaves, structure = flatten(tree)
    arrived = pickle.loads(pickle.dumps(structure))
    assert arrived == structure
    assert same(arrived.build(leaves), tree)


trees = st.recursive(
    st.integers() | st.none() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
        | st.builds(Pair, inner, inner)
        | st.builds(Output, inner, inner)
        | st.builds(Frozen, inner)
        | st.tuples(inner, inner)
    ),
    max_leaves=12,
)


@given(trees)
def test_any_nesting_survives(tree: Any) -> None:
    leaves, structure = flatten(tree)
    assert same(structure.build(leaves), tree)
    assert same(pickle.loads(pickle.dumps(structure)).build(iter(leaves)), tree)
    assert flatten(structure.build(leaves))[1] == structure


def test_a_bare_tensor_is_a_leaf_as_any_other_and_shares_its_structure() -> None:
    (leaf,), structure = flatten(X)
    assert leaf is X
    assert structure is flatten(Y)[1]
    assert structure == pickle.loads(pickle.dumps(structure)) == flatten(nn.Parameter(X))[1] == flatten(3)[1]
    assert structure != flatten([X])[1]
    assert structure.build([Y]) is Y


def test_structures_differ() -> None:
    trees = [X, (X,), [X], {"a": X}, {"b": X}, Output(X), Output(X, (1,)), Output((X,)), Slots(X), Pair(X, X), (X, X)]
    structures = [flatten(tree)[1] for tree in trees]
    assert all((a == b) is (i == j) for i, a in enumerate(structures) for j, b in enumerate(structures))


def test_tensors_are_found_and_mapped() -> None:
    tree = Output([X, 1], {"a": Pair(Y, "text")})
    assert same(tensors_in(tree), [X, Y])
    doubled = map_tensors(lambda tensor: tensor * 2, tree)
    assert torch.equal(doubled.hidden[0], X * 2)
    assert doubled.hidden[1] == 1
    assert torch.equal(doubled.more["a"].left, Y)
    assert doubled.more["a"].right == "text"


def test_a_template_is_an_output_without_its_numbers() -> None:
    output = Output([X, 1], {"a": Pair(Y, None)})
    template = Template.of(output)
    assert template == Template.of(Output([X * 5, 1], {"a": Pair(Y + 1, None)}))
    assert template.specs == [TensorSpec((2, 3), torch.float32), TensorSpec((4,), torch.int64)]
    assert same(template.build([X, Y]), output)
    assert pickle.loads(pickle.dumps(template)) == template


def test_specs_read_as_words() -> None:
    assert str(TensorSpec.of(X.bfloat16())) == "bfloat16[2, 3]"
    assert str(TensorSpec.of(torch.tensor(1))) == "int64[]"


def test_a_tensor_fits_a_spec_of_its_shape_and_dtype() -> None:
    found = [TensorSpec((2, 3), torch.float32).fits(each) for each in (torch.ones(2, 3), X.double(), torch.ones(3, 2))]
    assert found == [True, False, False]


def test_the_order_in_memory_is_known_and_makes_no_difference() -> None:
    image = torch.arange(24.0).view(1, 2, 3, 4)
    last = TensorSpec.of(image.to(memory_format=torch.channels_last))
    assert last.order == (0, 2, 3, 1)
    assert last == TensorSpec.of(image)
    assert hash(last) == hash(TensorSpec.of(image))
    laid_out = last.laid_out(image)
    assert torch.equal(laid_out, image)
    assert laid_out.is_contiguous(memory_format=torch.channels_last)
    assert TensorSpec.of(image).laid_out(laid_out).stride() == image.stride()
    assert TensorSpec.of(image[..., ::2]).order == TensorSpec.of(torch.tensor(1)).order == ()


class Other:
    pass


class Held:
    """An object with something on an attribute of one of its attributes."""

    def __init__(self, content: Any) -> None:
        self.store = Other()
        self.store.content = content


DIFFERENT = [
    X,
    X[:1],
    X.double(),
    X[0],
    (X,),
    [X],
    (X, X),
    {"x": X},
    {"y": X},
    {"x": X[:1]},
    UserDict(x=X),
    Pair(X, 1),
    Pair(X, X),
    Output(X),
    Output(X[:1]),
    Output(X, X),
    [X, [X]],
    None,
    1,
    "text",
    Other(),
    Held(X),
    Held(X[:1]),
    X.numpy(),
    X[:1].numpy(),
]


def test_signatures_tell_shapes_and_structures_apart() -> None:
    assert len({signature(batch) for batch in DIFFERENT}) == len(DIFFERENT)


@pytest.mark.parametrize("batch", DIFFERENT, ids=lambda batch: type(batch).__name__)
def test_signatures_leave_out_the_numbers(batch: Any) -> None:
    assert hash(signature(map_tensors(torch.zeros_like, batch))) == hash(signature(batch))
    assert signature(map_tensors(torch.zeros_like, batch)) == signature(batch)


def test_signatures_leave_out_numbers_and_texts() -> None:
    assert signature({"x": X, "names": ["a", "b"], "n": 1}) == signature({"x": X, "names": ["c", "d"], "n": 2})
    assert signature({"names": ["a", "b"]}) != signature({"names": ["a"]})


def test_a_copy_of_a_part_has_no_more_than_the_part() -> None:
    """A deep copy of a slice holds all that it was sliced from."""
    whole = torch.arange(1000.0)
    part = whole[10:12]
    again, same, names = copied(({"x": part}, part, ["a"]))
    assert again["x"] is same
    assert torch.equal(same, part)
    assert same.untyped_storage().nbytes() == 8
    assert names == ["a"]
    same.zero_()
    assert whole[10] == 10
