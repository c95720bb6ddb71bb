"""Gives every rank the numbers that a module has on rank 0."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from lightning_cpipe.stage.weights import named_numbers
from lightning_cpipe.transport.control import Control


def share_numbers(control: Control, root: nn.Module, but: Collection[str] = ()) -> None:
    """Give every rank the weights and buffers that the module has on rank 0; all must call it, on the CPU.

    A buffer that another rank does not have, or has in another size, becomes that of rank 0: steps and hooks that run
    on one rank alone may have made it.

    Args:
        control: of all ranks.
        root: the module.
        but: names of what is left alone.
    """
    own = named_numbers(root)
    described = {name: (tensor.shape, tensor.dtype) for name, tensor in own.items() if name not in but}
    for name, (shape, dtype) in control.share(described).items():
        tensor = own.get(name)
        if tensor is None or (tensor.shape, tensor.dtype) != (shape, dtype):
            tensor = torch.empty(shape, dtype=dtype)
            path, _, key = name.rpartition(".")
            holder = dict(root.named_modules()).get(path)
            if holder is not None and hasattr(holder, key):
                setattr(holder, key, tensor)
            elif holder is not None:
                holder.register_buffer(key, tensor)
        with torch.no_grad():
            control.share_tensors([tensor])
