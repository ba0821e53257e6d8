"""Activation checkpointing: the same bits, no second collective, nothing moved twice, nothing left behind."""

import functools
import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

import syncbn
from tests.support.checkpointed_net import (
    WRAPS,
    Net,
    Region,
    Reversible,
    Wrap,
    assert_equal_bits,
    by_hooks,
    plain,
    reentrant,
    step,
)
from tests.support.nets import sums_taken
from tests.support.ranks import Collectives, RankPool


def _as_without(wrap: str, nested: bool) -> None:
    right, counts = step(Net(plain, nested))
    assert counts == (Net.CALLS, Net.CALLS)
    ours, counts = step(Net(WRAPS[wrap], nested))
    assert counts == (Net.CALLS, Net.CALLS)
    assert_equal_bits(ours, right, "reentrant" in wrap)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("wrap", WRAPS)
def test_checkpointing_changes_no_bit_and_adds_no_collective(ranks: RankPool, wrap: str, nested: bool) -> None:
    """Outputs, gradients and buffers are those without checkpointing, and so is the number of collectives each way."""
    ranks.run(2, _as_without, wrap, nested)


def _retained(wrap: str) -> None:
    right, _ = step(Net(plain), retain=True)
    ours, counts = step(Net(WRAPS[wrap]), retain=True)
    assert counts == (Net.CALLS, 2 * Net.CALLS)
    assert_equal_bits(ours, right, "reentrant" in wrap)


@pytest.mark.parametrize("wrap", ["reentrant", "by_hooks", "to_the_end", "save_nothing"])
def test_a_region_may_be_recomputed_again(ranks: RankPool, wrap: str) -> None:
    """A second backward through a retained graph recomputes once more, from the same sums."""
    ranks.run(2, _retained, wrap)


def _interleaved(wrap: str) -> None:
    results = []
    for each in (plain, WRAPS[wrap]):
        net = Net(each)
        xs = [torch.randn(3, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
        xs = [x.requires_grad_() for x in xs]
        ys = [net(x) for x in xs]
        with Collectives() as backward:
            for y in ys:  # the first one first, though torch would go backwards
                y.backward(torch.ones_like(y).cumsum(0))
        assert backward.count == 2 * Net.CALLS
        results.append({"dx0": xs[0].grad, "dx1": xs[1].grad, **dict(net.named_buffers())})
    assert_equal_bits(results[1], results[0])


@pytest.mark.parametrize("wrap", ["reentrant", "by_hooks", "save_everything"])
def test_regions_may_be_recomputed_in_any_order(ranks: RankPool, wrap: str) -> None:
    """Two forward passes of the same layers, then their backwards in the order of the forwards: nothing is mixed up."""
    ranks.run(2, _interleaved, wrap)


class Interrupted(Exception):
    """What a region raises when told to."""


def _after_an_exception(wrap: str, during: str) -> None:
    right, _ = step(Net(plain))
    net = Net(WRAPS[wrap])
    raising = net.region.last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(Interrupted))
    fine = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    if during == "recomputation":
        raising.remove()
        y = net(fine)
        raising = net.region.last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            y.sum().backward()
    else:
        with pytest.raises(Interrupted):
            net(fine)
    raising.remove()
    net.zero_grad()
    for layer in net.modules():
        if isinstance(layer, syncbn.SyncBatchNorm):
            layer.reset_running_stats()
    ours, counts = step(net)
    assert counts == (Net.CALLS, Net.CALLS)
    assert_equal_bits(ours, right, "reentrant" in wrap)


@pytest.mark.parametrize("during", ["first pass", "recomputation"])
@pytest.mark.parametrize("wrap", ["reentrant", "by_hooks", "to_the_end", "save_nothing"])
def test_an_exception_leaves_nothing_behind(ranks: RankPool, wrap: str, during: str) -> None:
    """After a region was interrupted, the next step is that of a net that never was."""
    ranks.run(2, _after_an_exception, wrap, during)


def _sums_alive(wrap: str, with_backward: bool) -> int:
    with sums_taken(weakref.ref) as made:
        y = Net(WRAPS[wrap])(torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True))
        assert any(ref() is not None for ref in made)  # kept for the recomputation
        if with_backward:
            y.sum().backward()
    del y
    gc.collect()
    return sum(ref() is not None for ref in made)


@pytest.mark.parametrize("with_backward", [False, True])
@pytest.mark.parametrize("wrap", WRAPS)
def test_the_sums_go_with_the_graph(wrap: str, with_backward: bool) -> None:
    """Once the output is gone, with a backward or without one, no sums are kept anywhere."""
    assert _sums_alive(wrap, with_backward) == 0


@pytest.mark.parametrize("wrap", [reentrant, by_hooks])
def test_another_call_in_the_recomputation_is_refused(wrap: Wrap) -> None:
    """A region that calls another layer when it is recomputed gets no sums that are not its own."""
    layers = [syncbn.SyncBatchNorm(5), syncbn.SyncBatchNorm(4)]
    x = torch.randn(4, 5, 3, requires_grad=True)

    def region(t: Tensor) -> Tensor:
        layer = layers.pop(0)
        return layer(t[:, : layer.num_features]).sin()

    y = wrap(region, x)
    with pytest.raises(RuntimeError, match="got 4 channels where there were 5"):
        y.sum().backward()


def _slope_inside(wrap: Wrap) -> tuple[dict[str, Tensor], int]:
    layer = syncbn.SyncBatchNorm(4).double()

    def region(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(by_hooks(lambda t: layer(t).sin(), leaf).sum(), leaf)
            other = layer(leaf + slope).detach()
        return layer(x + other).sin()

    x = torch.randn(4, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(dist.get_rank()))
    y = wrap(region, x.requires_grad_())
    with Collectives() as backward:
        y.backward(torch.ones_like(y).cumsum(0))
    return {"y": y.detach(), "dx": x.grad}, backward.count


def _hidden_calls() -> None:
    right, _ = _slope_inside(plain)
    for wrap, collectives in ((by_hooks, 2), (reentrant, 4)):  # a reentrant region does not see the other calls
        ours, count = _slope_inside(wrap)
        assert_equal_bits(ours, right)
        assert count == collectives


def test_a_slope_taken_inside_of_a_region(ranks: RankPool) -> None:
    """Calls under enable_grad, of which a reentrant region knows nothing, get no sums of the calls that it knows."""
    ranks.run(2, _hidden_calls)


def _new_call_in_backward() -> None:
    outer, inner = (syncbn.SyncBatchNorm(4).double() for _ in range(2))
    x = torch.randn(4, 4, 5, dtype=torch.float64, requires_grad=True)
    z = by_hooks(lambda t: outer(t).sin(), x)
    z.register_hook(lambda grad: inner(grad))
    with Collectives() as backward:
        z.backward(torch.randn_like(z))
    assert backward.count == 2  # that of outer's backward and that of inner's forward
    assert (outer.num_batches_tracked, inner.num_batches_tracked) == (1, 1)


def test_a_call_of_its_own_during_backward_is_a_new_call(ranks: RankPool) -> None:
    """A layer that a gradient hook calls is no recomputation: it takes statistics, of all ranks."""
    ranks.run(2, _new_call_in_backward)


def _unknown_function() -> None:
    layer = syncbn.SyncBatchNorm(4).double()
    x = torch.randn(4, 4, 5, dtype=torch.float64, requires_grad=True)
    y = Reversible.apply(lambda t: layer(t).sin(), x)
    with Collectives() as backward:
        y.sum().backward()
    assert backward.count == 2  # a forward anew, and its backward
    assert layer.num_batches_tracked == 2


def test_a_function_of_another_name_is_not_taken_for_a_checkpoint(ranks: RankPool) -> None:
    """What an unknown autograd.Function runs in its backward may be new, such as a solver's last step: it is synced."""
    ranks.run(2, _unknown_function)


def _wrapper_modules() -> None:
    right, _ = step(Net(plain))
    for implementation in CheckpointImpl:
        net = Net(plain)
        wrapper = functools.partial(checkpoint_wrapper, checkpoint_impl=implementation)
        apply_activation_checkpointing(net, wrapper, lambda m: isinstance(m, Region))
        ours, counts = step(net)
        ours = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in ours.items()}
        assert counts == (Net.CALLS, Net.CALLS)
        assert_equal_bits(ours, right, implementation is CheckpointImpl.REENTRANT)


def test_wrapped_modules(ranks: RankPool) -> None:
    """torch's checkpoint_wrapper, which FSDP users apply, is the same thing."""
    ranks.run(2, _wrapper_modules)
