"""A parameter of another stage keeps its looks, takes no memory, and refuses by name to be computed with."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_cpipe.errors import AbsentWeightError, CutError
from lightning_cpipe.stage.absent import AbsentParameter


def absent(**options: Any) -> AbsentParameter:
    return AbsentParameter.of(nn.Parameter(torch.randn(3, 4), **options), "blocks.1.weight", home=2, here=0)


def module() -> nn.Linear:
    made = nn.Linear(4, 3)
    made.weight = absent()
    return made


COMPUTATIONS: dict[str, Callable[[Tensor], Any]] = {
    "add": lambda w: w + 1,
    "multiply": lambda w: 2 * w,
    "in place": lambda w: w.data.add_(1),
    "without a graph": lambda w: w.detach() * 2,
    "norm": lambda w: w.norm(),
    "sum": lambda w: w.sum(),
    "transpose": lambda w: w.t(),
    "index": lambda w: w[0],
    "iterate": lambda w: list(w),
    "view": lambda w: w.view(-1),
    "flatten": lambda w: w.flatten(),
    "clone": lambda w: w.clone(),
    "linear": lambda w: nn.functional.linear(torch.ones(2, 4), w),
    "matmul": lambda w: torch.ones(2, 3) @ w,
    "concatenate": lambda w: torch.cat([torch.ones(3, 4), w]),
    "stack in a list": lambda w: torch.stack([w, w]),
    "compare": lambda w: w == 1,
    "copy from": lambda w: torch.zeros(3, 4).copy_(w),
    "to a vector": lambda w: nn.utils.parameters_to_vector([w]),
    "is finite": lambda w: torch.isfinite(w),
    "like it": lambda w: torch.zeros_like(w),
    "as a place for the result": lambda w: torch.add(torch.ones(3, 4), 1, out=w.detach()),
}


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("name", COMPUTATIONS)
def test_any_computation_is_refused_by_name(name: str, graph: bool) -> None:
    weight = absent()
    with torch.set_grad_enabled(graph), pytest.raises(AbsentWeightError) as caught:
        COMPUTATIONS[name](weight)
    message = str(caught.value)
    assert all(words in message for words in ("stage 0 used", "'blocks.1.weight'", "live on stage 2", "use the param"))
    assert isinstance(caught.value, CutError)


def test_it_looks_like_the_parameter() -> None:
    weight, real = absent(), nn.Parameter(torch.randn(3, 4))
    assert isinstance(weight, nn.Parameter)
    for look in ("shape", "dtype", "requires_grad", "ndim", "is_leaf", "layout", "grad"):
        assert getattr(weight, look) == getattr(real, look)
    assert (weight.numel(), weight.size(0), len(weight), weight.dim()) == (12, 3, 3, 2)
    assert weight.is_floating_point()
    assert absent(requires_grad=False).requires_grad is False


def test_it_takes_no_memory() -> None:
    huge = torch.empty(10**6, 10**6, device="meta")
    assert AbsentParameter.of(huge, "huge", 1, 0).data_ptr() == 0


def test_it_says_what_it_is() -> None:
    assert repr(absent()) == "AbsentParameter('blocks.1.weight', shape=(3, 4), weights on stage 2)"
    assert "blocks.1.weight" in repr(module().state_dict())


def test_its_copies_are_absent_too() -> None:
    found = copy.deepcopy(module())
    require_same(found.weight)
    assert dict(found.named_parameters()).keys() == {"weight", "bias"}
    with pytest.raises(AbsentWeightError, match=r"blocks\.1\.weight"):
        found(torch.ones(2, 4))


def test_it_goes_to_a_process_that_is_spawned_as_what_it_is() -> None:
    """So may the worker of a data loader whose dataset knows the module."""
    require_same(pickle.loads(ForkingPickler.dumps(absent())))


def require_same(weight: Any) -> None:
    assert isinstance(weight, AbsentParameter)
    assert (weight.full_name, weight.home, weight.here) == ("blocks.1.weight", 2, 0)
    assert weight.requires_grad
    assert weight.shape == (3, 4)


@pytest.mark.parametrize("save", [pickle.dumps, lambda value: torch.save(value, io.BytesIO())], ids=["pickle", "torch"])
@pytest.mark.parametrize("what", [absent, module, lambda: module().state_dict()], ids=["it", "module", "state dict"])
def test_it_is_not_saved(what: Callable[[], Any], save: Callable[[Any], Any]) -> None:
    """Its name, shape and dtype once were, and the file had no weights."""
    with pytest.raises(AbsentWeightError) as caught:
        save(what())
    message = str(caught.value)
    parts = ("stage 0", "'blocks.1.weight'", "live on stage 2", "trainer.save_checkpoint", "when the run is over")
    assert all(part in message for part in parts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_follows_the_module_to_another_dtype(dtype: torch.dtype) -> None:
    moved = module().to(dtype)
    assert isinstance(moved.weight, AbsentParameter)
    assert moved.weight.dtype == moved.bias.dtype == dtype
    assert moved.weight.full_name == "blocks.1.weight"


def test_moving_the_module_leaves_it_a_leaf() -> None:
    """A conversion outside `no_grad` must not make it the result of one: optimizers and modules take leaves only."""
    weight = absent()
    for _ in range(2):
        weight.float(), weight.cpu(), weight.detach(), weight.data, weight.double()
    assert weight.is_leaf
    nn.Linear(4, 3).weight = weight


def test_it_may_be_in_an_optimizer() -> None:
    """Without a gradient it is passed over, and takes no state."""
    made = module()
    optimizer = torch.optim.AdamW([{"params": [made.weight], "lr": 1.0}, {"params": [made.bias], "lr": 0.5}])
    made.bias.grad = torch.ones(3)
    optimizer.zero_grad(set_to_none=False)
    made.bias.grad = torch.ones(3)
    optimizer.step()
    assert list(optimizer.state) == [made.bias]
    assert optimizer.state_dict()["param_groups"][0]["params"] == [0]


def test_gradients_can_be_clipped_beside_it() -> None:
    made = module()
    made.bias.grad = torch.full((3,), 2.0)
    assert nn.utils.clip_grad_norm_(made.parameters(), 1.0) > 1


def test_it_is_a_member_of_the_state_dict() -> None:
    state = module().state_dict()
    assert state.keys() == {"weight", "bias"}
    assert isinstance(state["weight"], AbsentParameter)


def test_numbers_can_not_be_loaded_into_it() -> None:
    with pytest.raises(RuntimeError, match="weight"):
        module().load_state_dict({"weight": torch.ones(3, 4), "bias": torch.ones(3)})
