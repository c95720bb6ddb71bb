"""A module that draws has random numbers of its own: it may be a stub, or run again, and nobody else notices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_cpipe.probe.recording import record
from lightning_cpipe.stage import randomness
from lightning_cpipe.stage.isolation import Isolation
from lightning_cpipe.stage.randomness import seeded

ONES = torch.ones(32)
SEED = 7


class Noise(nn.Module):
    def __init__(self, use_reentrant: bool | None = None) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.weight = nn.Parameter(torch.ones(32))
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.use_reentrant is None:
            return self.drop(self.drop(x) * self.weight)
        return checkpoint(lambda x: self.drop(self.drop(x) * self.weight), x, use_reentrant=self.use_reentrant)


def three(make: Callable[[], nn.Module] = Noise) -> nn.Sequential:
    return nn.Sequential(make(), make(), make())


def run(root: nn.Sequential, *, stub: int = 0, isolated: bool = True, repeated: tuple[str, ...] = ()) -> list[Tensor]:
    """What each block gives, and noise drawn after each; the first `stub` blocks compute nothing."""
    names = [name for name, _ in root.named_children()] if isolated else []
    isolation = Isolation(root, names, repeated)
    hooks = []
    for block in root[:stub]:
        block.forward = lambda x: x
    try:
        with seeded(SEED), isolation.of(SEED):
            found = []
            for block in root:
                found += [block(ONES), torch.rand(3)]
            return found
    finally:
        isolation.remove()
        for block in root[:stub]:
            del block.__dict__["forward"]
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("repeated", [(), ("0", "1", "2")])
@pytest.mark.parametrize("stub", [1, 2, 3])
def test_stubs_change_nothing_behind_them(stub: int, repeated: tuple[str, ...]) -> None:
    root = three()
    whole, staged = run(root, repeated=repeated), run(root, stub=stub, repeated=repeated)
    assert all(map(torch.equal, whole[2 * stub :], staged[2 * stub :]))
    assert all(map(torch.equal, whole[1::2], staged[1::2]))


def test_without_isolation_stubs_change_everything_behind_them() -> None:
    root = three()
    whole, staged = run(root, isolated=False), run(root, stub=1, isolated=False)
    assert not any(map(torch.equal, whole[1:], staged[1:]))


def test_each_module_draws_its_own_numbers() -> None:
    found = run(three())
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[2], found[4])


@pytest.mark.parametrize(("repeated", "same"), [((), True), (("0",), False)])
def test_a_repeated_module_draws_other_numbers_each_time(repeated: tuple[str, ...], same: bool) -> None:
    root = three()
    isolation = Isolation(root, ["0"], repeated)
    with seeded(SEED), isolation.of(SEED):
        assert torch.equal(root[0](ONES), root[0](ONES)) is same


def test_seeds_decide() -> None:
    root = three()
    isolation = Isolation(root, ["0"])
    found = []
    for seed in (1, 2, 1):
        with isolation.of(seed):
            found.append(root[0](ONES))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("repeated", [(), ("0",)])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("around", [True, False], ids=["around the module", "inside the module"])
def test_a_checkpoint_draws_the_same_in_the_backward(around: bool, use_reentrant: bool, repeated: tuple[str]) -> None:
    """Then the gradient of a weight is the product of both masks, which the output is too."""
    root = three(lambda: Noise(None if around else use_reentrant))
    isolation = Isolation(root, ["0"], repeated)
    x = ONES.clone().requires_grad_()
    for seed in range(3):
        with seeded(seed), isolation.of(seed):
            outputs = [checkpoint(root[0], x, use_reentrant=use_reentrant) if around else root[0](x) for _ in range(2)]
        torch.rand(5)
        for output in reversed(outputs):
            root[0].weight.grad = None
            with isolation.of(seed):
                output.sum().backward()
            assert torch.equal(root[0].weight.grad, output.detach())


def test_outside_its_scope_it_does_nothing() -> None:
    root = three()
    with seeded(SEED):
        expected = [block(ONES) for block in root]
    isolation = Isolation(root, ["0", "1", "2"])
    with seeded(SEED):
        assert all(map(torch.equal, expected, [block(ONES) for block in root]))
    isolation.remove()
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in root)


def test_a_module_that_is_left_by_an_error_does_no_harm() -> None:
    """A stage ends by one."""
    root = three()
    isolation = Isolation(root, ["0", "1", "2"])
    with seeded(SEED), isolation.of(SEED):
        expected = [root[0](ONES), torch.rand(3)]

    def fail(x: Tensor) -> Tensor:
        raise KeyError

    root[1].forward = fail

    def leave() -> None:
        with seeded(SEED), isolation.of(SEED):
            root[1](ONES)

    with pytest.raises(KeyError):
        leave()
    with seeded(SEED), isolation.of(SEED):
        assert all(map(torch.equal, expected, [root[0](ONES), torch.rand(3)]))


def test_a_step_may_go_on_after_an_error_in_a_module() -> None:
    root = three()
    isolation = Isolation(root, ["0"])
    with seeded(SEED), isolation.of(SEED):
        expected = torch.rand(3)

    def fail(x: Tensor) -> Tensor:
        torch.rand(5)
        raise KeyError

    root[0].forward = fail
    with seeded(SEED), isolation.of(SEED):
        with pytest.raises(KeyError):
            root[0](ONES)
        assert torch.equal(torch.rand(3), expected)


def test_nothing_is_kept_of_a_module_that_a_stage_left() -> None:
    """No state is put back after the exception that ends a stage, which torch does not take for one."""

    class End(BaseException):
        pass

    def end(x: Tensor) -> Tensor:
        raise End

    root = three()
    isolation = Isolation(root, ["0"])
    root[0].forward = end
    with pytest.raises(End), isolation.of(SEED):
        root[0](ONES)
    assert isolation._entered == []


def test_scopes_may_be_nested() -> None:
    """A validation within training."""
    root = three()
    isolation = Isolation(root, ["0"])
    with isolation.of(1):
        expected = root[0](ONES)
        with isolation.of(2):
            other = root[0](ONES)
        assert torch.equal(root[0](ONES), expected)
    assert not torch.equal(other, expected)


def test_drawing_on_an_accelerator_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another generator stands for that of a GPU."""
    device = torch.Generator()
    monkeypatch.setattr(randomness, "_cuda_generators", lambda: [device])

    class OnDevice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand(32, generator=device)

    root = nn.Sequential(OnDevice(), nn.Identity())
    recording, _ = record(root, lambda: root(ONES), ["0", "1"])
    assert [call.drew for call in recording.calls] == [True, False]
    isolation = Isolation(root, ["0"])
    with isolation.of(SEED):
        found = root(ONES)
        device.manual_seed(99)
        assert torch.equal(root(ONES), found)
