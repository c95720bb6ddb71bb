"""A batch is sliced along the first dimension of its tensors, whatever holds them, or as the module says."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_cpipe.strategy.data.drawn import Drawn
from lightning_cpipe.strategy.data.micro_batches import MicroBatches, micro_batches
from lightning_cpipe.strategy.data.slicing import sliced
from lightning_cpipe.tree import signature


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Sample:
    x: Tensor
    scale: float


ROWS = torch.arange(10.0).view(5, 2)


@pytest.mark.parametrize(("most", "sizes"), [(1, [5]), (2, [3, 2]), (4, [2, 1, 1, 1]), (5, [1] * 5), (9, [1] * 5)])
def test_sizes_differ_by_at_most_one_and_no_slice_is_empty(most: int, sizes: list[int]) -> None:
    slices, found = sliced(ROWS, most)
    assert found == [len(each) for each in slices] == sizes
    assert torch.equal(torch.cat(slices), ROWS)


def test_what_holds_the_tensors_stays_what_it_is() -> None:
    batch = {
        "pair": Pair(ROWS, ROWS[:, 0]),
        "sample": Sample(ROWS, 2.0),
        "list": [ROWS, (ROWS, OrderedDict(a=ROWS))],
        "encoding": UserDict(ids=ROWS),
        "names": list("abcde"),
        "scalar": torch.tensor(3.0),
        "number": 4,
        "none": None,
        "word": "five!",
        "words": ["not", "one", "each"],
        "lengths": [1, 2, 3, 4, 5],
        "size": (1, 2, 3, 4, 5),
    }
    (first, second), _ = sliced(batch, 2)
    assert isinstance(first["pair"], Pair)
    assert torch.equal(first["pair"].x, ROWS[:3])
    assert torch.equal(second["pair"].y, ROWS[3:, 0])
    assert torch.equal(second["sample"].x, ROWS[3:])
    assert second["sample"].scale == 2.0
    assert isinstance(first["list"][1][1], OrderedDict)
    assert torch.equal(second["list"][1][1]["a"], ROWS[3:])
    assert isinstance(first["encoding"], UserDict)
    assert torch.equal(first["encoding"]["ids"], ROWS[:3])
    assert (first["names"], second["names"]) == (list("abc"), list("de"))
    assert (first["lengths"], second["lengths"]) == ([1, 2, 3], [4, 5])
    for each in (first, second):
        assert each["size"] == (1, 2, 3, 4, 5), "one thing of all samples"
        assert each["scalar"] is batch["scalar"]
        assert (each["number"], each["none"], each["word"], each["words"]) == (4, None, "five!", ["not", "one", "each"])
    assert len(batch["encoding"]["ids"]) == 5, "the batch itself is as it was"


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ((ROWS, ROWS[:3]), "tensors with 3 and 5 rows"),
        (("text", torch.tensor(1.0)), "no tensor that has rows"),
        ((ROWS, object()), "an object of class object"),
        (ROWS.to_sparse(), "a tensor of layout torch.sparse_coo"),
    ],
)
def test_a_batch_that_could_be_sliced_in_several_ways_names_the_method_that_says_how(batch: Any, said: str) -> None:
    with pytest.raises(MisconfigurationException, match=said) as caught:
        sliced(batch, 2)
    assert "`split_batch(self, batch, num_microbatches)`" in str(caught.value)


class Splits(pl.LightningModule):
    """Has the samples in the second dimension."""

    count = 2

    def split_batch(self, batch: Tensor, num_microbatches: int) -> list[Tensor]:
        assert num_microbatches == 2
        return list(batch.tensor_split(self.count, dim=1))


def drawn(number: int, batch: Any) -> Drawn:
    return Drawn(number, seed=11, batch=batch, fingerprint=5, signature=signature(batch), index=number, epoch=1)


def test_the_module_s_own_slices_are_used() -> None:
    found = micro_batches(drawn(3, ROWS.T), ROWS.T, Splits(), 2)
    assert [each.batch.shape for each in found] == [(2, 3), (2, 2)]
    # By what Lightning takes for the number of samples.
    assert [each.weight for each in found] == [0.5, 0.5]
    assert [each.mark for each in found] == [(6, 5), (7, 5)]
    assert len({each.seed for each in found} | {11}) == 3
    assert [(each.index, each.epoch) for each in found] == [(3, 1)] * 2


@pytest.mark.parametrize("count", [0, 3])
def test_too_many_slices_and_none_are_refused(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Splits, "split_batch", lambda self, batch, num_microbatches: [batch] * count)
    with pytest.raises(MisconfigurationException, match=f"returned {count} micro-batches where num_microbatches=2"):
        micro_batches(drawn(0, ROWS), ROWS, Splits(), 2)


@pytest.mark.parametrize("returned", [None, ROWS, {"x": ROWS}])
def test_what_is_no_list_of_slices_is_refused(returned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Splits, "split_batch", lambda self, batch, num_microbatches: returned)
    with pytest.raises(MisconfigurationException, match=f"`split_batch` returned {type(returned).__name__} where"):
        micro_batches(drawn(0, ROWS), ROWS, Splits(), 2)


class Weighs(pl.LightningModule):
    """Says what each slice counts for."""

    returned: Any = (0.25, 0.5)

    def loss_weights(self, micro_batches: list[Tensor]) -> Any:
        assert [len(each) for each in micro_batches] == [3, 2]
        return self.returned


def test_the_module_s_own_weights_are_used_where_there_is_a_loss() -> None:
    found = micro_batches(drawn(0, ROWS), ROWS, Weighs(), 2)
    assert [each.weight for each in found] == [0.25, 0.5]
    # In an epoch's means the five samples are shared out by them.
    assert [each.samples for each in found] == pytest.approx([5 / 3, 10 / 3])
    elsewhere = micro_batches(drawn(0, ROWS), ROWS, Weighs(), 2, weighs=False)
    assert [each.samples for each in elsewhere] == [None] * 2


@pytest.mark.parametrize("returned", [None, 1.0, "ab", [1.0], [1.0, -1.0], [1.0, float("nan")], [1.0, None]])
def test_weights_must_be_finite_and_one_for_each(returned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Weighs, "returned", returned)
    with pytest.raises(MisconfigurationException, match=r"`loss_weights` returned .* for 2 micro-batches: return a"):
        micro_batches(drawn(0, ROWS), ROWS, Weighs(), 2)


class Data:
    """Stands for the fetcher: the loop is at the last one."""

    def __init__(self) -> None:
        self.at = drawn(0, ROWS)

    def mini_batch(self, number: int) -> Drawn | None:
        return self.at if number == self.at.number else None


def test_micro_batches_are_counted_through_the_run_and_only_those_at_hand_are_there() -> None:
    data = Data()
    found = MicroBatches(data, pl.LightningModule(), 4, lambda each: each.batch)
    assert found.begin(0) == range(4)
    data.at = drawn(1, ROWS[:2])
    assert found.begin(1) == range(4, 6)
    assert [found.mini_batch(number) is None for number in (3, 4, 5, 6)] == [True, False, False, True]


def test_one_micro_batch_is_the_mini_batch_itself() -> None:
    data = Data()
    found = MicroBatches(data, Splits(), 1, lambda _: pytest.fail("it is prepared when it is needed"))
    assert found.begin(0) == range(1)
    assert found.mini_batch(0) is data.at
