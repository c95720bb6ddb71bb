"""The private names of torch that the package touches are there, do what they did, and are touched in one file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lightning_cpipe
from lightning_cpipe import torch_private
from lightning_cpipe.torch_private import (
    has_gradient_hooks,
    instance_of_subclass,
    is_view,
    norms_of,
    scale_all,
    set_version_counters,
    storage_id,
    written_arguments,
)

PACKAGE = Path(lightning_cpipe.__file__).parent


def test_no_other_file_touches_a_private_name() -> None:
    pattern = re.compile(
        r"(?:from|import) torch[\w.]*\._\w+|from torch[\w.]* import _\w+|\btorch(?:\.\w+)*\._[a-zA-Z]\w*\b"
    )
    found = {
        (file.name, name)
        for file in PACKAGE.rglob("*.py")
        if file.name != "torch_private.py"
        for name in pattern.findall(file.read_text())
    }
    # An operator, and what an error advises.
    assert found == {("absent.py", "torch.ops.aten._to_copy"), ("describing.py", "torch.utils._pytree")}


@pytest.mark.parametrize("takes_several", [True, False])
def test_writes_can_be_hidden_from_autograd(takes_several: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before torch 2.7, the counter of one tensor at a time could be set."""
    put = torch._C._autograd._unsafe_set_version_counter

    def put_one(tensor: Tensor, counter: int) -> None:
        assert isinstance(tensor, Tensor)
        put((tensor,), (counter,))

    if not takes_several:
        monkeypatch.setattr(torch_private, "_TAKES_SEVERAL", False)
        monkeypatch.setattr(torch._C._autograd, "_unsafe_set_version_counter", put_one)
    tensors = [torch.ones(2, requires_grad=True) for _ in range(3)]
    loss = sum((tensor * tensor).sum() for tensor in tensors)
    with torch.no_grad():
        for tensor in tensors:
            tensor.mul_(3)
    set_version_counters(tensors, [0, 0, 0])
    assert [tensor._version for tensor in tensors] == [0, 0, 0]
    loss.backward()
    assert tensors[0].grad.tolist() == [6, 6]


def test_an_instance_of_a_subclass_shares_the_storage() -> None:
    class Named(torch.Tensor):
        pass

    tensor = torch.ones(2)
    made = instance_of_subclass(Named, tensor, False)
    assert type(made) is Named
    assert made.data_ptr() == tensor.data_ptr()


def test_hooks_on_a_gradient_are_seen() -> None:
    tensor = torch.ones(2, requires_grad=True) * 2
    assert not has_gradient_hooks(tensor)
    hook = tensor.register_hook(lambda gradient: None)
    assert has_gradient_hooks(tensor)
    hook.remove()
    assert not has_gradient_hooks(tensor)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensors_in_one_storage_are_known_by_it(device: str) -> None:
    tensors = [torch.ones(4, device=device) for _ in range(2)]
    first, second = (storage_id(tensor.untyped_storage()) for tensor in tensors)
    assert first != second
    assert storage_id(tensors[0][1:].untyped_storage()) == first


def test_operators_tell_what_they_write_and_whether_they_only_make_views() -> None:
    aten = torch.ops.aten
    x, y, out = torch.ones(2), torch.ones(2), torch.empty(2)
    assert written_arguments(aten.copy_.default, (x, y), {})[0] is x
    assert written_arguments(aten.mul.out, (x, y), {"out": out})[0] is out
    assert written_arguments(aten.mul.Tensor, (x, y), {}) == []
    assert all(map(is_view, (aten.view.default, aten.detach.default, aten.t.default, aten.select.int)))
    assert not any(map(is_view, (aten.copy_.default, aten.mul.Tensor, aten.clone.default, aten.t_.default)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_are_clipped_together_as_each_by_itself(dtype: torch.dtype) -> None:
    tensors = [torch.randn(size, dtype=dtype) for size in (3, 5, 1)]
    assert all(map(torch.equal, norms_of(tensors), [torch.linalg.vector_norm(each) for each in tensors]))
    share = torch.tensor(0.3, dtype=dtype)
    expected = [each * share for each in tensors]
    scale_all(tensors, share)
    assert all(map(torch.equal, tensors, expected))
