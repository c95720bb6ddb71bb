"""Blocks are the links of the chains that hold most parameters, in order, wherever they hang."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from lightning_cpipe.probe.blocks import find_blocks


def heavy() -> nn.Linear:
    return nn.Linear(10, 10)


def light() -> nn.Linear:
    return nn.Linear(1, 1)


class Holder(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def chain(*links: nn.Module) -> nn.Sequential:
    return nn.Sequential(*links)


CASES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "a Sequential": (lambda: Holder(net=chain(heavy(), heavy())), ["net.0", "net.1"]),
    "the root itself": (lambda: chain(heavy(), heavy()), ["0", "1"]),
    "a ModuleList": (lambda: Holder(layers=nn.ModuleList([heavy(), heavy()])), ["layers.0", "layers.1"]),
    "deep down": (
        lambda: Holder(model=Holder(body=Holder(stack=chain(heavy(), heavy())))),
        ["model.body.stack.0", "model.body.stack.1"],
    ),
    "links without weights": (lambda: Holder(net=chain(heavy(), nn.ReLU(), heavy())), ["net.0", "net.1", "net.2"]),
    "a chain in a chain": (
        lambda: Holder(net=chain(heavy(), chain(Holder(one=heavy()), heavy()), heavy())),
        ["net.0", "net.1.0", "net.1.1", "net.2"],
    ),
    # A step may run it as a whole, such as inside an activation checkpoint.
    "a chain of single layers in a chain": (
        lambda: Holder(net=nn.ModuleList([chain(heavy(), nn.ReLU()), chain(heavy(), nn.ReLU())])),
        ["net.0", "net.1"],
    ),
    "a ModuleList in a ModuleList": (
        lambda: Holder(net=nn.ModuleList([nn.ModuleList([heavy(), heavy()]), heavy()])),
        ["net.0.0", "net.0.1", "net.1"],
    ),
    "two chains": (
        lambda: Holder(encoder=chain(heavy(), heavy()), decoder=chain(heavy(), heavy())),
        ["encoder.0", "encoder.1", "decoder.0", "decoder.1"],
    ),
    "a light chain beside a heavy one": (
        lambda: Holder(stem=chain(light(), light()), net=chain(heavy(), heavy())),
        ["net.0", "net.1"],
    ),
    "an empty chain": (lambda: Holder(net=nn.Sequential()), []),
    "no chain": (lambda: Holder(one=heavy(), other=heavy()), []),
    "a chain without weights": (lambda: Holder(net=chain(nn.ReLU(), nn.Tanh()), one=heavy()), []),
    "a block that outweighs the others": (
        lambda: Holder(net=chain(light(), Holder(inner=chain(heavy(), heavy(), heavy())), light())),
        ["net.0", "net.1.inner.0", "net.1.inner.1", "net.1.inner.2", "net.2"],
    ),
    "a heavy block without a chain in it": (
        lambda: Holder(net=chain(light(), Holder(one=heavy()), light())),
        ["net.0", "net.1", "net.2"],
    ),
    "blocks of the same weight with chains in them": (
        lambda: Holder(net=nn.ModuleList([Holder(mlp=chain(heavy(), heavy())) for _ in range(3)])),
        ["net.0", "net.1", "net.2"],
    ),
    "a subclass of Sequential": (
        lambda: Holder(net=type("Named", (nn.Sequential,), {})(heavy(), heavy())),
        ["net.0", "net.1"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_blocks_are_found(case: str) -> None:
    make, expected = CASES[case]
    assert find_blocks(make()) == expected
