"""The private names of torch that this package touches, in one place.

Left where they are used: `_version` of a tensor, `_parameters` and `_buffers` of a module, which have been there since
before any version of torch that runs here.

A test compares them, and what they do, with what is written below.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "TorchDispatchMode",
    "has_gradient_hooks",
    "instance_of_subclass",
    "is_view",
    "no_torch_function",
    "norms_of",
    "pytree",
    "scale_all",
    "set_version_counters",
    "storage_id",
    "unprofiled",
    "written_arguments",
]

SubClass = TypeVar("SubClass", bound=Tensor)
Result = TypeVar("Result")

no_torch_function: Any = torch._C._disabled_torch_function_impl
"""As a subclass's `__torch_function__`: functions of torch see a plain tensor."""


def instance_of_subclass(cls: type[SubClass], tensor: Tensor, requires_grad: bool) -> SubClass:
    """A tensor of class `cls` with the metadata and the storage of `tensor`."""
    made: SubClass = torch.Tensor._make_subclass(cls, tensor, requires_grad)
    return made


def has_gradient_hooks(tensor: Tensor) -> bool:
    """Whether somebody asked to see the tensor's gradient with `register_hook`."""
    return bool(tensor._backward_hooks)


def storage_id(storage: torch.UntypedStorage) -> int:
    """The same for every tensor that lies in one storage, also where it has no address, as on the meta device."""
    identity: int = storage._cdata
    return identity


def set_version_counters(tensors: Sequence[Tensor], counters: Sequence[int]) -> None:
    """Let autograd take the tensors for written to as often as `counters` say, whatever was written since."""
    if _TAKES_SEVERAL:
        torch._C._autograd._unsafe_set_version_counter(tuple(tensors), tuple(counters))
    else:
        for tensor, counter in zip(tensors, counters):
            torch._C._autograd._unsafe_set_version_counter(tensor, counter)  # type: ignore[arg-type]


_TAKES_SEVERAL = "tensors" in inspect.signature(_unsafe_preserve_version_counter).parameters
"""Since torch 2.7; before, one at a time."""


def unprofiled(begin: Callable[[], Result]) -> Result:
    """Call `begin`; what begins there is unknown to torch's profiler.

    It writes the end of whatever it saw begin into its record of that time, which is gone if another cycle has begun
    since: memory is destroyed by what takes that long.
    """
    if not torch.autograd._profiler_enabled():
        return begin()
    torch._C._autograd._enable_record_function(False)
    try:
        return begin()
    finally:
        torch._C._autograd._enable_record_function(True)


def is_view(operator: Any) -> bool:
    """Whether an operator of `torch.ops` only makes views, and looks at no number."""
    returned = [each.alias_info for each in operator._schema.returns]
    return bool(returned) and all(alias is not None and not alias.is_write for alias in returned)


def written_arguments(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Those of the arguments into which an operator of `torch.ops` writes."""
    declared = operator._schema.arguments
    given = {**{each.name: arg for each, arg in zip(declared, args)}, **kwargs}
    return [
        given[each.name]
        for each in declared
        if each.name in given and each.alias_info is not None and each.alias_info.is_write
    ]


def norms_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The 2-norm of each, as `torch.nn.utils.clip_grad_norm_` computes it."""
    return list(torch._foreach_norm(list(tensors)))


def scale_all(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply each in place by a scalar tensor."""
    for device in {tensor.device for tensor in tensors}:
        torch._foreach_mul_([each for each in tensors if each.device == device], factor.to(device))
