"""The layer as differentiable arithmetic, for whoever looks inside: a compiler, an exporter, a higher derivative.

    sums = all_sum([Σx, Σx², count])     mean, invstd from sums     y = activation(x̂·weight + bias + residual)

These are operations that a tracer takes down one by one and autograd differentiates as often as it likes. The one
collective among them has itself as its derivative: the gradient of a sum over ranks is the sum of the ranks' gradients.
Under torch.compile it is a functional collective on the group's name, and Inductor fuses the rest with its neighbours:
the numbers are eager's to rounding, not to the bit. Under create_graph=True the backward composes y again from x and
the sums it has, and differentiates that; its own backward sums the cotangents of the gradients' sums, of the batch's
sums and of the layer's ordinary backward, so that there are up to three collectives.

A compiled graph knows its group by torch's name, which another may have after `dist.destroy_process_group`: call
torch.compiler.reset() then. It lays out empty tensors as torch's compiler does, not as x; nn.BatchNorm2d is alike.

Not possible: differentiating a compiled backward; torch.func.functionalize of a call that moves statistics; make_fx in
its "real" mode, which writes down what an eager layer's kernels do ("fake" and "symbolic" see plain operations);
torch.vmap over one set of running statistics, which is refused; torch.vmap over a trace by torch.jit.trace and, with
peers, any torch.func transform of it. Such a trace holds eps and momentum as numbers, and its process must import
syncbn if it has peers. Ranks must agree on how many cotangents there are in a batched backward, too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library
from torch.nn import functional as F

from syncbn import calls, groups, recompute, torch_private
from syncbn.formulas import (
    Epilogue,
    Running,
    activate_,
    along,
    compute_dtype,
    in_strides,
    masked,
    moments,
    move_running,
    pre_activation,
    reduced,
)
from syncbn.names import BACKWARD, FORWARD, Call
from syncbn.recompute import Taken


def normalize_batch(
    x: Tensor,
    epilogue: Epilogue,
    eps: float,
    group_name: str | None,
    running: Running | None = None,
    known: Tensor | None = None,
    call: Call | None = None,
) -> Tensor:
    """y, differentiable; moves the running statistics, if given. Without a group this rank is alone.

    known is the sums of all ranks where they were summed before; then gradients alone are communicated.
    call is this one, where it is not written to a graph.
    """
    weight, bias, residual, mask, activation = epilogue
    is_written = torch.compiler.is_compiling() or torch_private.is_jit_tracing()  # layouts are the graph's business
    strides = None if is_written else _strides_like(x)
    if strides is not None and not torch_private.is_forward_ad_on(x):
        x = _AsGiven.apply(x, strides)  # type: ignore[no-untyped-call]  # torch's own
    x, residual = masked(x, mask), None if residual is None else masked(residual, mask)
    sums, are_new = _sums_of_all(batch_sums(x, mask), group_name, known, call)
    mean64, var64, count = moments(sums, x.shape[1])
    if running is not None:
        _move(running, mean64.detach(), var64.detach(), count.detach(), are_new)
    dtype = compute_dtype(x.dtype)
    mean, invstd = mean64.to(dtype), (var64 + eps).rsqrt().to(dtype)
    z = pre_activation(x, mean, invstd, Epilogue(weight, bias, residual))
    y = masked(activate_(z, activation), mask).to(x.dtype)
    return y if strides is None else _laid(y, strides)


def gradients(
    dy: Tensor,
    x: Tensor,
    epilogue: Epilogue,
    eps: float,
    call: Call | None,
    known: Tensor,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """dx, dweight, dbias, dresidual where needed; if autograd is on, differentiable in dy and all that y depends on."""
    given, create_graph = (x, epilogue.weight, epilogue.bias, epilogue.residual), torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, each with a place of its own in the graph: one tensor may be given twice, and has a graph behind it.
        alias = [None if t is None else t.view_as(t) for t in given]
        assert alias[0] is not None, "x is always given"
        weight, bias, residual = alias[1:]
        aliased = epilogue._replace(weight=weight, bias=bias, residual=residual)
        group_name = None if call is None else groups.name_of(call.group)
        y = normalize_batch(alias[0], aliased, eps, group_name, None, known, call)
        wanted = [t for t, need in zip(alias, needed, strict=True) if t is not None and need]
    grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=create_graph) if wanted else ())
    found = [next(grads) if t is not None and need else None for t, need in zip(alias, needed, strict=True)]
    if needed[3] and epilogue.residual is None:  # not kept, since without an activation its gradient is dz = dy
        found[3] = masked(dy, epilogue.mask)
    return found


def batch_sums(x: Tensor, mask: Tensor | None) -> Tensor:
    """[Σx (C), Σx² (C), count] of x, 0 where masked out; of at most float32 from sums of x − k.

    Added up in float64 where that is cheap: a compiled CPU kernel adds up in few lanes.
    """
    dims, per_channel = reduced(x), x.numel() // x.shape[1]
    count = torch.full((1,), per_channel, dtype=torch.float64, device=x.device) if mask is None else mask.sum().double()
    if mask is not None or x.dtype == torch.float64:
        wide = x.double()
        return _packed(torch.cat([wide.sum(dims), wide.square().sum(dims)]), count)
    accumulator = torch.float64 if x.device.type == "cpu" else torch.float32
    k = _pivot(x.detach(), dims)
    d = x.float() - along(k, x)
    total, total_sq = (t.sum(dims, dtype=accumulator).double() for t in (d, d.square()))
    k = k.double()
    return _packed(torch.cat([total + count * k, total_sq + 2 * k * total + count * k.square()]), count)


def _packed(sums: Tensor, count: Tensor) -> Tensor:
    """[sums, count], not by cat: Inductor (torch 2.11 to 2.15) computes the inputs of a cat inside of it and reduces
    over the ranks in place, so that a count which another layer shares would become that of all ranks.
    """
    return F.pad(sums, (0, 1)) + F.pad(count.view(1), (sums.shape[0], 0))


def _pivot(x: Tensor, dims: list[int]) -> Tensor:
    """k (C) near the mean: that of an eighth of x, which is within 2.7 standard deviations of it whatever x holds."""
    few = x[::8] if x.ndim == 2 else x[:, :, : (x.shape[2] + 7) // 8]
    count = few.numel() // few.shape[1]  # a tensor to torch.jit.trace
    return few.sum(dims, dtype=torch.float32) / (count.clamp_min(1) if isinstance(count, Tensor) else max(1, count))


def _sums_of_all(
    sums: Tensor, group_name: str | None, known: Tensor | None, call: Call | None
) -> tuple[Tensor, Tensor | None]:
    """The sums of all ranks, and whether they are new, 1 or 0, in a graph that may run as a recomputation."""
    if not torch.compiler.is_compiling() and not torch_private.is_jit_tracing():
        return sums if group_name is None else _all_sum(sums, group_name, 1, known, call=call), None
    site = recompute.graph_site() if torch.compiler.is_compiling() else ""
    if site:
        packed = torch.ops.syncbn.all_sum(sums, group_name, 1, None, site)
        return packed[:-1], packed[-1:].detach()
    return sums if group_name is None else torch.ops.syncbn.all_sum(sums, group_name, 1), None


def _move(running: Running, mean: Tensor, var: Tensor, count: Tensor, are_new: Tensor | None) -> None:
    if torch_private.are_transforms_active() and torch_private.is_any_wrapped(mean, *running[:3]):
        _MoveRunning.apply(running, mean, var, count)  # type: ignore[no-untyped-call]  # torch's own
        return
    move_running(running, mean, var, count if are_new is None else count * are_new)  # an empty batch moves nothing
    if are_new is not None and running.num_batches_tracked is not None:
        running.num_batches_tracked.add_(are_new.squeeze().to(running.num_batches_tracked.dtype) - 1)


def _strides_like(x: Tensor) -> tuple[int, ...]:
    """Those of empty_like(x); an empty or contiguous x has them, and no operation has to be traced."""
    return x.stride() if x.is_contiguous() else torch.empty_like(x, device="meta").stride()


def _laid(t: Tensor, strides: tuple[int, ...]) -> Tensor:
    """`in_strides`, but for what is mapped over, whose memory is the map's."""
    is_mapped = torch_private.is_mapped(t) or torch_private.is_batch_of_gradients(t)
    return t if is_mapped else in_strides(t, strides)


class _AsGiven(torch.autograd.Function):
    """x, whose gradient has these strides."""

    @staticmethod
    def forward(x: Tensor, strides: tuple[int, ...]) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.strides = inputs[1]

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return _laid(dx, ctx.strides), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], x: Tensor, strides: tuple[int, ...]) -> tuple[Tensor, int]:
        return x, in_dims[0]


class _AllSum(torch.autograd.Function):
    """The sums of all ranks, or `known`, which they are; the last `tail` of them have no gradient and send none.

    site: of a call in a graph that may run as a recomputation; then the sums are followed by 1 if they are new, else 0.
    """

    @staticmethod
    def forward(
        sums: Tensor, group_name: str | None, tail: int, known: Tensor | None, site: str, call: Call | None
    ) -> Tensor:
        with recompute.kept():
            if site:
                found: Tensor = torch.ops.syncbn.all_sum_once(sums, group_name, site)
                return found
            assert group_name is not None, "alone there is nothing to sum"
            if known is not None:
                return known.clone()
            return calls.functional_sum(sums, group_name, call, FORWARD if tail else BACKWARD)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        sums, ctx.group_name, ctx.tail, _, _, ctx.call = inputs
        ctx.head = sums.shape[-1] - ctx.tail

    @staticmethod
    def backward(ctx: Any, dsums: Tensor) -> tuple[Tensor | None, ...]:
        dsums = dsums.narrow(-1, 0, ctx.head)
        if ctx.group_name is not None:
            dsums = _all_sum(dsums, ctx.group_name, 0, call=ctx.call)
        return F.pad(dsums, (0, ctx.tail)), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _all_sum(tangent, ctx.group_name, ctx.tail, call=ctx.call)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, ...], sums: Tensor, *rest: Any) -> tuple[Tensor, int]:
        """One collective for all of them."""
        return _all_sum(sums.movedim(in_dims[0], 0), *rest), 0


def _all_sum(
    sums: Tensor,
    group_name: str | None,
    tail: int,
    known: Tensor | None = None,
    site: str = "",
    call: Call | None = None,
) -> Tensor:
    if torch_private.is_batch_of_gradients(sums):
        return _below_maps(lambda sums: _all_sum(sums, group_name, tail, known, site, call), sums)
    summed: Tensor = _AllSum.apply(sums, group_name, tail, known, site, call)  # type: ignore[no-untyped-call]  # torch's own
    return summed


def _below_maps(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """function(t) once for all of a batch, which may have a dimension more for each map, where it stands."""
    sizes: list[int] = []
    while not torch_private.has_storage(t):
        t = torch_private.remove_batch_dim(t, len(sizes) + 1, 1, 0)  # 1, 0: unmapped, a dimension of size 1
        sizes.append(t.shape[0])
    t = function(t)
    for level, size in enumerate(sizes, start=1):
        dim = len(sizes) - level
        t = t.select(dim, 0) if size == 1 else torch_private.add_batch_dim(t, dim, level)
    return t


def _all_sum_once(sums: Tensor, group_name: str | None, site: str) -> Tensor:
    channels = sums.shape[0] // 2

    def take() -> Taken:
        return Taken(sums.clone() if group_name is None else calls.functional_sum(sums, group_name), channels)

    taken, are_new = recompute.taken_once(take, channels, recorded=False, site=site)
    return F.pad(taken.sums, (0, 1), value=float(are_new))


# Operators for torch.compile. Its tracer takes no autograd.Function with a jvp, so all_sum is written down as a call,
# which what comes next takes apart into the function. all_sum_once stays whole, to look around when the graph runs.
_library = library.Library("syncbn", "DEF")  # type: ignore[no-untyped-call]  # torch's own, as below
_library.define(  # type: ignore[no-untyped-call]
    "all_sum(Tensor sums, str? group_name, int tail, Tensor? known=None, str site='') -> Tensor"
)
_library.define("all_sum_once(Tensor sums, str? group_name, str site) -> Tensor")  # type: ignore[no-untyped-call]
_library.impl("all_sum", _all_sum, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("all_sum_once", _all_sum_once, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
library.register_fake(
    "syncbn::all_sum_once", lambda sums, group_name, site: sums.new_empty(sums.shape[0] + 1), lib=_library
)


class _MoveRunning(torch.autograd.Function):
    """`move_running` below the level of torch.func's transforms, which refuse to write to what they did not wrap."""

    generate_vmap_rule = True

    @staticmethod
    def forward(running: Running, *statistics: Tensor) -> Tensor:
        move_running(running, *statistics)
        return statistics[0].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def jvp(ctx: Any, *_: None) -> None:
        return None
