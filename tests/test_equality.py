"""Leaves are the same to the bit, or up to rounding and no more."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_cpipe.equality import close, same_bits

X = torch.ones(2, 3)


class Other:
    pass


NAN = float("nan")


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (X, X.clone(), True),
        (X, X + 1e-7, False),
        (torch.tensor([NAN, 1]), torch.tensor([NAN, 1]), True),
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (X, X.double(), False),
        (X, X.reshape(3, 2), False),
        (X.t(), torch.ones(3, 2), True),
        (X.bfloat16(), X.bfloat16(), True),
        (X > 0, X > 0, True),
        (torch.ones(()), torch.ones(()), True),
        (torch.ones(0, 3), torch.ones(0, 3), True),
        (torch.ones(0, 3), torch.ones(0, 2), False),
        (1, 1, True),
        (1, 2, False),
        (1, 1.0, False),
        (1, True, False),
        (torch.arange(8.0).view(1, 8)[:, 0], torch.zeros(1), True),
        (NAN, NAN, True),
        (1.0, NAN, False),
        (NAN, 1.0, False),
        ("a", "a", True),
        ("a", "b", False),
        (None, None, True),
        (None, 0, False),
        (X, None, False),
        (Other(), Other(), True),
        (Other(), {1}, False),
        (frozenset({1, 2}), frozenset({2, 1}), True),
        (frozenset({1}), frozenset({2}), False),
        (b"a", b"b", False),
    ],
)
def test_leaves_are_the_same_to_the_bit(a: Any, b: Any, expected: bool) -> None:
    """Of other objects than tensors, numbers and texts, only the class is known."""
    assert same_bits([a], [b]) is expected
    assert same_bits([a, 1], [b, 1]) is expected
    assert not same_bits([a], [b, b])


ONE = torch.ones(3)
INF = float("inf")


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (ONE, ONE, True),
        (ONE, ONE + 1e-6, True),
        (ONE, ONE + 1e-3, False),
        (torch.tensor([1e6, 1.0]), torch.tensor([1e6, 1.5]), True),
        (ONE * float("nan"), ONE * float("nan"), True),
        (ONE * float("nan"), ONE, False),
        (ONE, ONE.double(), False),
        (ONE, torch.ones(4), False),
        (ONE.int(), ONE.int(), True),
        (ONE.int(), ONE.int() + 1, False),
        (torch.ones(0), torch.ones(0), True),
        (ONE.to_sparse(), ONE.to_sparse(), True),
        (ONE.to_sparse(), ONE.to_sparse() * 2, False),
        (1.5, 1.5, True),
        (1.5, 2.5, False),
        (None, ONE, False),
        (torch.tensor([-INF, 1.0]), torch.tensor([-INF, 1.0]), True),
        (torch.tensor([INF, 1.0]), torch.tensor([INF, 1 + 1e-6]), True),
        (torch.tensor([INF, 1.0]), torch.tensor([INF, 1 + 1e-3]), False),
        (torch.tensor([INF, 1.0]), torch.tensor([-INF, 1.0]), False),
        (torch.tensor([INF, 1.0]), torch.tensor([1.0, 1.0]), False),
        (torch.tensor([1.0, 1.0]), torch.tensor([INF, 1.0]), False),
        (torch.tensor([NAN, 1.0]), torch.tensor([NAN, 1 + 1e-6]), True),
        (torch.tensor([NAN, 1.0]), torch.tensor([NAN, 2.0]), False),
        (torch.tensor([NAN, 1.0]), torch.tensor([1.0, NAN]), False),
        (torch.tensor([NAN, INF]), torch.tensor([NAN, INF]), True),
    ],
)
def test_close_allows_rounding_and_nothing_else(a: Any, b: Any, expected: bool) -> None:
    assert close([a], [b]) is expected
    assert not close([a], [b, b])
