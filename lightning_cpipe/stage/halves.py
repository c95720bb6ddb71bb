"""A backward in two halves: the gradients of what a stage received, for which others wait, and all others later.

The first half runs the nodes of autograd's graph that lead to what was received, and keeps what arrives at those from
which something else hangs, such as the product with a weight. There the second half begins: it runs such a node once
more, for what the first half left out. So no node does the same work twice, and each gradient is added up from the same
numbers as in a whole backward.

Roughly, for ``y = x @ w + b`` with x received and the gradient gy:

    first half    gx = gy @ w.T       keeps gy
    second half   w.grad += x.T @ gy, b.grad += gy.sum()

What can't be split runs whole in the first half: a graph with functions that are written in Python, which make all
their gradients at once. `torch.distributed.pipelining` has halves of the same kind, but they leave out what depends on
weights alone, and change the outputs in place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

_CAN_BEGIN_AT_NODES = "GradientEdge" in str(inspect.signature(torch.autograd.backward))
"""Older versions of torch begin a backward at tensors only."""

Arrived = Sequence[Tensor | None]
"""The gradients of a node's outputs."""


def backward_in_halves(outputs: Sequence[tuple[Tensor, Tensor]], received: Sequence[Tensor]) -> Callable[[], None]:
    """Run the first half.

    Args:
        outputs: where the backward begins, each with its gradient.
        received: leaves, whose gradients are in their `.grad` afterwards.

    Returns:
        Runs the second half, once.
    """
    roots = [get_gradient_edge(output) for output, _ in outputs]
    first = _leading_to(roots, {get_gradient_edge(leaf).node for leaf in received})
    if outputs and (not _CAN_BEGIN_AT_NODES or any(isinstance(node, BackwardCFunction) for node in first)):
        torch.autograd.backward([output for output, _ in outputs], [gradient for _, gradient in outputs])
        return lambda: None
    begun = [output for output, edge in zip(outputs, roots) if edge.node in first]
    arrived = _first_half(begun, received, [node for node in first if _others(node, first)])
    starts = [
        _Start(edges, [each for each in at if each is not None], _leaves(_others(node, first)), {node: at})
        for node, at in arrived.items()
        if (edges := [GradientEdge(node, place) for place, each in enumerate(at) if each is not None])
    ]
    starts += [
        _Start([edge], [gradient], _leaves([edge.node]))
        for edge, (_, gradient) in zip(roots, outputs)
        if edge.node not in first
    ]
    return partial(_second_half, starts)


def leaves_reached(output: Tensor) -> set[Tensor]:
    """The leaves that get a gradient in a backward from `output`."""
    return set() if output.grad_fn is None else _leaves([output.grad_fn])


@dataclass(eq=False)
class _Start:
    """Where a part of the second half begins.

    Attributes:
        edges: of the graph.
        gradients: that arrive there.
        leaves: that get a gradient from there.
        arrived: what arrives at nodes, whatever comes there on another way.
    """

    edges: list[GradientEdge]
    gradients: list[Tensor]
    leaves: set[Tensor]
    arrived: dict[Node, Arrived] = field(default_factory=dict)


def _first_half(
    begun: Sequence[tuple[Tensor, Tensor]], received: Sequence[Tensor], watched: Iterable[Node]
) -> dict[Node, Arrived]:
    """The gradients of what was received; what arrived at the watched nodes."""
    arrived: dict[Node, Arrived] = {}
    if not begun:
        return arrived
    hooks = [node.register_prehook(partial(arrived.__setitem__, node)) for node in watched]
    try:
        outputs, gradients = zip(*begun)
        found = torch.autograd.grad(outputs, list(received), gradients, retain_graph=True, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    for leaf, gradient in zip(received, found):
        leaf.grad = gradient
    return arrived


def _second_half(starts: list[_Start]) -> None:
    for start in _that_share_no_leaf(starts):
        # From one start the way may lead to another one, where all that arrives is known already.
        hooks = [node.register_prehook(partial(_instead, at)) for node, at in start.arrived.items()]
        try:
            torch.autograd.backward(start.edges, start.gradients, retain_graph=True, inputs=list(start.leaves))
        finally:
            for hook in hooks:
                hook.remove()


def _instead(arrived: Arrived, _: Any) -> Any:
    return tuple(arrived)


def _that_share_no_leaf(starts: Iterable[_Start]) -> Iterable[_Start]:
    """Those that lead to the same leaf as one, so that its gradient is added up as in a whole backward."""
    by_leaf: dict[Tensor, _Start] = {}
    for start in starts:
        for other in dict.fromkeys(by_leaf[leaf] for leaf in start.leaves if leaf in by_leaf):
            start = _Start(
                other.edges + start.edges,
                other.gradients + start.gradients,
                other.leaves | start.leaves,
                other.arrived | start.arrived,
            )
        by_leaf.update(dict.fromkeys(start.leaves, start))
    return dict.fromkeys(by_leaf.values())


def _leading_to(roots: Sequence[GradientEdge], targets: set[Node]) -> dict[Node, None]:
    """The nodes from which a target is reached, targets included."""
    before: dict[Node, list[Node]] = {}
    for node in _reached([edge.node for edge in roots]):
        for following, _ in node.next_functions:
            if following is not None:
                before.setdefault(following, []).append(node)
    known = {node for edge in roots for node in (edge.node,)} | before.keys()
    return dict.fromkeys(_reached([each for each in targets if each in known], lambda node: before.get(node, [])))


def _others(node: Node, first: dict[Node, None]) -> list[Node]:
    """What hangs from a node and leads to nothing that was received."""
    return [following for following, _ in node.next_functions if following is not None and following not in first]


def _leaves(nodes: Iterable[Node]) -> set[Tensor]:
    """The leaves that are reached."""
    return {node.variable for node in _reached(nodes) if hasattr(node, "variable")}


def _following(node: Node) -> Iterator[Node]:
    return (following for following, _ in node.next_functions if following is not None)


def _reached(nodes: Iterable[Node], following: Callable[[Node], Iterable[Node]] = _following) -> Iterator[Node]:
    """These nodes and all that follow, each once."""
    to_visit = list(dict.fromkeys(nodes))
    seen = set(to_visit)
    while to_visit:
        yield (node := to_visit.pop())
        for each in following(node):
            if each not in seen:
                seen.add(each)
                to_visit.append(each)
