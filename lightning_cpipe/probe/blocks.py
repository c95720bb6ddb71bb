"""Finds the places where a module may be cut: its *blocks*.

Blocks are the children of the chains (`nn.Sequential`, `nn.ModuleList`) that hold most of the parameters, wherever
in the module they hang. A chain inside a chain is taken apart too, unless it is one of single layers, which is a block
like any other; and so is a single block that outweighs all the others together, if there is a chain in it. Nothing
here depends on the number of stages, so neither does anything that is decided per block, such as its random numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

_CHAINS = (nn.Sequential, nn.ModuleList)

_LIGHT = 1 / 8
"""A chain with less than this share of the heaviest chain's parameters is no place to cut."""


def find_blocks(root: nn.Module) -> list[str]:
    """The names of the blocks below `root`, in the order in which they hang in it.

    Whether each is called exactly once per step is for the probe to find out.
    """
    chains = list(_outermost_chains(root, ""))
    heaviest = max((_weight(chain) for _, chain in chains), default=0)
    kept = [(name, chain) for name, chain in chains if _weight(chain) >= max(1, heaviest * _LIGHT)]
    blocks = [block for name, chain in kept for block in _links(chain, name)]
    return [name for name, _ in _taken_apart(blocks)]


def _outermost_chains(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, _CHAINS):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _outermost_chains(child, _join(name, child_name))


def _links(chain: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    for child_name, child in chain.named_children():
        child_name = _join(name, child_name)
        if _is_chain_of_modules(child):
            yield from _links(child, child_name)
        else:
            yield child_name, child


def _is_chain_of_modules(module: nn.Module) -> bool:
    """Whether it is a chain of which the links are blocks; a chain of single layers is one block itself."""
    if isinstance(module, nn.ModuleList):
        return True
    return isinstance(module, nn.Sequential) and any(next(link.children(), None) is not None for link in module)


def _taken_apart(blocks: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Replace a block that outweighs all the others together by the blocks inside it."""
    weights = [_weight(block) for _, block in blocks]
    for position, (name, block) in enumerate(blocks):
        if 2 * weights[position] > sum(weights):
            inner = [(_join(name, inside), block.get_submodule(inside)) for inside in find_blocks(block)]
            if inner:
                return [*blocks[:position], *inner, *blocks[position + 1 :]]
    return blocks


def _weight(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
