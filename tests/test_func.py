"""torch.func and forward-mode AD: gradients, tangents and maps of the layer, across ranks."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.functional import sync_batch_norm
from tests.support.layer_runs import let_torch_warn_of_itself
from tests.support.oracle import UNIT, error
from tests.support.ranks import Collectives, RankPool

EXACT = UNIT[torch.float64]


def normalize(x: Tensor) -> Tensor:
    return sync_batch_norm(x, None, None, training=True, activation="silu")


def samples(*shape: int, seed: int = 0) -> Tensor:
    """Other ones on every rank."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator().manual_seed(10 * seed + rank)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _grad(track: bool) -> None:
    layer = syncbn.SyncBatchNorm(4, track_running_stats=track, activation="silu").double()
    right = copy.deepcopy(layer)
    x, dy = (samples(3 + dist.get_rank(), 4, 5, seed=seed) for seed in range(2))
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return (functional_call(layer, parameters, (x,)) * dy).sum()

    with Collectives() as collectives:
        dparameters, dx = grad(loss, argnums=(0, 1))(parameters, x)
    assert collectives.count == 2
    leaf = x.clone().requires_grad_()
    (right(leaf) * dy).sum().backward()
    assert error(dx, leaf.grad) <= EXACT
    for name, p in right.named_parameters():
        assert error(dparameters[name], p.grad) <= EXACT
    for actual, expected in zip(layer.buffers(), right.buffers(), strict=True):
        assert error(actual, expected.double()) <= EXACT


@pytest.mark.parametrize("track", [True, False])
def test_grad_of_a_functional_call(ranks: RankPool, track: bool) -> None:
    """torch.func.grad gives autograd's gradients by two collectives, and the running statistics move once."""
    ranks.run(2, _grad, track)


def _tangents() -> None:
    let_torch_warn_of_itself()
    x, tangent, cotangent = (samples(3, 4, 5, seed=seed) for seed in range(3))
    with Collectives() as collectives:
        _, by_func = jvp(normalize, (x,), (tangent,))
    assert collectives.count == 2
    with forward_ad.dual_level():
        by_dual = forward_ad.unpack_dual(normalize(forward_ad.make_dual(x, tangent))).tangent
    assert torch.equal(by_dual, by_func)
    # <J t, v> = <t, Jᵀ v>, each summed over the ranks: v is any cotangent, Jᵀ v the ordinary backward's.
    leaf = x.clone().requires_grad_()
    normalize(leaf).backward(cotangent)
    products = torch.stack([(by_func * cotangent).sum(), (tangent * leaf.grad).sum()])
    dist.all_reduce(products)
    assert error(products[0], products[1]) <= EXACT


def test_forward_mode(ranks: RankPool) -> None:
    """A tangent takes two collectives and is the transpose of what the backward computes."""
    ranks.run(2, _tangents)


def _mapped() -> None:
    xs = samples(6, 3, 4, 5)
    right, gradients = [], []
    for x in xs:
        leaf = x.clone().requires_grad_()
        right.append(normalize(leaf))
        right[-1].pow(2).sum().backward()
        gradients.append(leaf.grad)
    with Collectives() as collectives:
        mapped = vmap(normalize)(xs)
    assert collectives.count == 1
    assert error(mapped, torch.stack(right).detach()) <= EXACT
    assert error(vmap(normalize, 2, 1)(xs.movedim(0, 2)).movedim(1, 0), mapped) <= EXACT
    with Collectives() as collectives:
        by_map = vmap(grad(lambda x: normalize(x).pow(2).sum()))(xs)
    assert collectives.count == 2
    assert error(by_map, torch.stack(gradients)) <= EXACT
    assert error(grad(lambda xs: vmap(normalize)(xs).pow(2).sum())(xs), torch.stack(gradients)) <= EXACT


def test_maps(ranks: RankPool) -> None:
    """vmap normalizes every batch by itself, with one collective for all of them; so do maps of gradients."""
    ranks.run(2, _mapped)


def _ensemble() -> None:
    models = [syncbn.SyncBatchNorm(4).double() for _ in range(3)]
    xs = samples(3, 5, 4)
    parameters, buffers = stack_module_state(models)
    mapped = vmap(lambda p, b, x: functional_call(models[0], (p, b), (x,)))(parameters, buffers, xs)
    right = torch.stack([model(x) for model, x in zip(models, xs, strict=True)])
    assert error(mapped, right.detach()) <= EXACT
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        stacked = torch.stack([getattr(model, name) for model in models])
        assert error(buffers[name], stacked.double()) <= EXACT


def test_an_ensemble(ranks: RankPool) -> None:
    """Stacked models, each with its own running statistics, are what the models are one by one."""
    ranks.run(2, _ensemble)


def _one_set_for_all() -> None:
    layer = syncbn.SyncBatchNorm(4)
    xs = torch.randn(3, 5, 4)
    for function in (layer, grad(lambda x: layer(x).sum())):
        with Collectives() as collectives, pytest.raises(RuntimeError, match="track_running_stats=False"):
            vmap(function)(xs)
        assert collectives.count == 0
    assert layer.num_batches_tracked == 0
    right = torch.stack([layer.eval()(x) for x in xs])
    assert torch.equal(vmap(layer)(xs), right)


def test_one_set_of_running_statistics_cannot_follow_a_map(ranks: RankPool) -> None:
    """vmap over a layer that moves its running statistics is refused before any collective; in eval it maps."""
    ranks.run(2, _one_set_for_all)


def _jacobians() -> None:
    let_torch_warn_of_itself()
    x = samples(2, 2, 2)

    def loss(x: Tensor) -> Tensor:
        return normalize(x).pow(3).sum()

    # Forward mode moves the inputs of all ranks at once, reverse mode adds up the outputs of all ranks.
    forward, reverse, second = jacfwd(normalize)(x), jacrev(normalize)(x), hessian(loss)(x).view(8, 8)
    for t in (forward, reverse, second):
        dist.all_reduce(t)
    assert error(forward, reverse) <= EXACT
    assert error(second, second.T) <= EXACT


def test_jacobians_and_hessians(ranks: RankPool) -> None:
    """Added up over the ranks, forward and reverse mode agree, and compose to a symmetric second derivative."""
    ranks.run(2, _jacobians)


class InBackward(torch.autograd.Function):
    """A function whose derivative is computed in its backward, by a transform."""

    @staticmethod
    def forward(ctx, t: Tensor, derivative: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(t)
        ctx.derivative = derivative
        return t.sum()

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return dy * ctx.derivative(ctx.saved_tensors[0]), None


Of = Callable[[Tensor, Tensor], Tensor]
TRANSFORMED: dict[str, Of] = {
    "grad of weight": lambda x, w: grad(lambda w: normalize_by(x, weight=w).pow(3).sum())(w),
    "grad of bias": lambda x, w: grad(lambda b: normalize_by(x, bias=b).pow(3).sum())(w),
    "grad of residual": lambda x, w: grad(lambda r: normalize_by(x, residual=r * x).pow(3).sum())(w[0]),
    "jvp of weight": lambda x, w: jvp(lambda w: normalize_by(x, weight=w).pow(3), (w,), (w.cos(),))[1],
    "vmap of weights": lambda x, w: vmap(lambda w: normalize_by(x, weight=w).pow(3).sum())(torch.stack([w, 2 * w])),
    "vmap of masks": lambda x, w: vmap(lambda m: normalize_by(x * w.sum(), mask=m).pow(3).sum())(MASKS),
    "nothing of the call": lambda x, w: vmap(lambda w: normalize_by(x).pow(3).sum() * w)(w),
}
MASKS = torch.tensor([[True, True, False, True, True], [True, False, True, True, True]])[:, None].expand(2, 3, 5)


def normalize_by(x: Tensor, **given: Tensor | None) -> Tensor:
    weight, bias = given.pop("weight", None), given.pop("bias", None)
    return sync_batch_norm(x, None, None, weight, bias, training=True, **given)


def _within(name: str) -> None:
    let_torch_warn_of_itself()
    transformed = TRANSFORMED[name]
    x, w = samples(3, 4, 5), samples(4, seed=1).exp() + 1
    right_w = w.clone().requires_grad_()
    right = transformed(x, right_w)
    leaf = w.clone().requires_grad_()
    InBackward.apply(leaf, lambda w: transformed(x, w).sum().expand(4)).backward()
    assert error(leaf.grad, right.detach().sum().expand(4)) <= EXACT
    (dw_right,) = torch.autograd.grad(right.sin().sum(), right_w, allow_unused=True)
    for reentrant in (True, False) if not name.startswith("grad") else (True,):  # torch.func.grad takes no such hooks
        leaf, x_leaf = w.clone().requires_grad_(), x.clone().requires_grad_()
        y = checkpoint(lambda x, w: transformed(x, w).sin().sum() + x.sum() * 0, x_leaf, leaf, use_reentrant=reentrant)
        y.backward()
        assert (leaf.grad is None) == (dw_right is None)
        assert dw_right is None or error(leaf.grad, dw_right) <= EXACT


@pytest.mark.parametrize("name", TRANSFORMED)
def test_a_transform_of_any_argument_within_a_backward(ranks: RankPool, name: str) -> None:
    """Transforms of a weight, a mask or nothing of a call are right in a backward and in a recomputed region."""
    _within(name)
    ranks.run(2, _within, name)


def _around() -> None:
    """x, residual and mask are of the outer world, the transform concerns a factor only."""
    layer = syncbn.SyncBatchNorm(4, activation="silu").double()
    x, residual, scale = samples(3, 4, 5), samples(3, 4, 5, seed=1), samples(4, seed=2)
    masks = (None, torch.tensor([[True, False, True, True, True]]).expand(3, 5))
    others: list[Callable[[Tensor, Tensor, Tensor | None], Tensor]] = [
        lambda x, r, m: grad(lambda s: layer(x, r, m).pow(3).sum() * s.sum())(scale).sum(),
        lambda x, r, m: vmap(lambda s: layer(x, r, m).pow(3).sum() * s)(scale).sum(),
        lambda x, r, m: vmap(grad(lambda s: layer(x, r, m).pow(3).sum() * s.sin()))(scale).sum(),
        lambda x, r, m: jvp(lambda s: layer(x, r, m).pow(3).sum() * s.sum(), (scale,), (scale,))[1],
    ]
    factors = (4.0, scale.sum(), scale.cos().sum(), scale.sum())
    for mask in masks:
        for number, (transformed, factor) in enumerate(zip(others, factors, strict=True)):
            given, right = ([t.clone().requires_grad_() for t in (x, residual)] for _ in range(2))
            layer.reset_running_stats()
            with Collectives() as collectives:
                dx, dresidual = torch.autograd.grad(transformed(*given, mask), given)
            assert layer.num_batches_tracked == 1
            assert collectives.count == 2, number
            expected = torch.autograd.grad(layer(*right, mask).pow(3).sum() * factor, right)
            assert error(dx, expected[0]) <= EXACT
            assert error(dresidual, expected[1]) <= EXACT


def test_a_transform_around_a_call_that_it_does_not_concern(ranks: RankPool) -> None:
    """Gradients of the call's own tensors pass a transform of others; one collective each way, statistics move once."""
    ranks.run(2, _around)
