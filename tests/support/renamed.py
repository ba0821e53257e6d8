"""A torch that has renamed one of its private parts: what the layer does there, in every way that a call may take.

Each way gives `right` if it has nn.BatchNorm's numbers, else the error's type and text, or `wrong`.
"""

import functools
import multiprocessing
import os
import pkgutil
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.fx
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import checkpoint

X = torch.linspace(-1, 2, 4 * 3 * 5, dtype=torch.float64).sin().reshape(4, 3, 5)
DY = torch.linspace(0, 3, 4 * 3 * 5, dtype=torch.float64).cos().reshape(4, 3, 5)
HOOKS = {"frame": "_checkpoint_hook", "target_frame_ref": "_recomputation_hook"}
"""Variables of torch's checkpoint that can be renamed, too, and what sets them."""
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["torch", "torch.fx", "torch._dynamo", "tests.support.renamed"])

Outcome = tuple[dict[str, str], list[str]]
"""By way, what came of it; and the warnings of the import."""


def without(names: list[str], ways: list[str]) -> Outcome:
    """These ways in a fresh process in which torch has none of these names, module:attribute."""
    ours, theirs = _server.Pipe()
    process = _server.Process(target=_run, args=(theirs, names, ways), daemon=True)
    process.start()
    theirs.close()
    found: Outcome = ours.recv() if ours.poll(120) else ({"all": "no answer"}, [])
    process.join(10)
    return found


def _run(connection: Connection, names: list[str], ways: list[str]) -> None:
    torch.set_num_threads(1)
    resolve = pkgutil.resolve_name

    def resolve_others(name: str) -> Any:
        if name in names:
            raise AttributeError(name)
        return resolve(name)

    os.environ["SYNCBN_WATCH"] = "0"
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())  # its sums are this rank's alone
    pkgutil.resolve_name = resolve_others
    for variable in HOOKS.keys() & set(names):
        _rename(HOOKS[variable])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        import syncbn
    texts = [str(w.message) for w in said if issubclass(w.category, RuntimeWarning)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        connection.send(({way: _outcome(way, syncbn.SyncBatchNorm1d) for way in ways}, texts))


def _rename(hook: str) -> None:
    """Its variable, so that nobody who looks for that finds it; torch works as before."""
    original = getattr(checkpoint, hook)

    class Renamed(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, *given: Any) -> None:
            inner = original(*given)
            super().__init__(lambda t: inner.pack_hook(t), lambda held: inner.unpack_hook(held))

    setattr(checkpoint, hook, Renamed)


def _outcome(way: str, cls: Callable[..., nn.Module]) -> str:
    try:
        found, right = (WAYS[way](layer(3, dtype=torch.float64)) for layer in (cls, nn.BatchNorm1d))
    except Exception as error:
        return f"{type(error).__name__}: {error}" + ("" if isinstance(error, RuntimeError) else traceback.format_exc())
    close = functools.partial(torch.allclose, rtol=1e-10, atol=1e-10)
    return "right" if all(map(close, found, right)) else f"wrong: {found} {right}"


def _gradients(layer: nn.Module, y: Tensor, x: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], DY)]


def step(layer: nn.Module) -> list[Tensor]:
    """Two training steps and an evaluation."""
    found = []
    for _ in range(2):
        x = X.clone().requires_grad_()
        found += _gradients(layer, layer(x), x)
    return [*found, layer.running_mean, layer.running_var, layer.eval()(X).detach()]


def _checkpointed(layer: nn.Module, **how: Any) -> list[Tensor]:
    x = X.clone().requires_grad_()
    y = checkpoint.checkpoint(lambda x: layer(x.sin()).exp(), x, **how)
    x_grad, *rest = torch.autograd.grad(y, [x], DY) if how["use_reentrant"] is False else (_by_backward(y, x),)
    return [y.detach(), x_grad, *rest]


def _by_backward(y: Tensor, x: Tensor) -> Tensor:
    y.backward(DY)
    assert x.grad is not None
    return x.grad


def selective(layer: nn.Module) -> list[Tensor]:
    """Checkpointing that saves the results of exp."""

    def policy(ctx: Any, op: Any, *_: Any, **__: Any) -> checkpoint.CheckpointPolicy:
        is_saved = op is torch.ops.aten.exp.default
        return getattr(checkpoint.CheckpointPolicy, "MUST_SAVE" if is_saved else "PREFER_RECOMPUTE")

    context = functools.partial(checkpoint.create_selective_checkpoint_contexts, policy)
    return _checkpointed(layer, use_reentrant=False, context_fn=context)


def fx(layer: nn.Module) -> list[Tensor]:
    """A symbolic trace, run."""
    return step_of(torch.fx.symbolic_trace(nn.Sequential(layer)), layer)


def step_of(called: Callable[[Tensor], Tensor], layer: nn.Module) -> list[Tensor]:
    x = X.clone().requires_grad_()
    return _gradients(layer, called(x), x)


def jit(layer: nn.Module) -> list[Tensor]:
    """A trace by torch.jit, run."""
    return step_of(torch.jit.trace(layer, (X,), check_trace=False), layer)


def func_grad(layer: nn.Module) -> list[Tensor]:
    """torch.func.grad of x."""
    layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
    return [torch.func.grad(lambda x: (layer(x) * DY).sum())(X)]


def func_others(layer: nn.Module) -> list[Tensor]:
    """A call within a transform of another tensor."""
    layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
    return [torch.func.grad(lambda scale: (scale * layer(X).detach() * DY).sum())(X.new_ones(()))]


def many(layer: nn.Module) -> list[Tensor]:
    """Two cotangents at once."""
    x = X.clone().requires_grad_()
    return list(torch.autograd.grad(layer(x), [x], torch.stack([DY, 2 * DY]), is_grads_batched=True))


def jvp(layer: nn.Module) -> list[Tensor]:
    """Forward-mode AD."""
    with torch.autograd.forward_ad.dual_level():
        y = layer(torch.autograd.forward_ad.make_dual(X, DY))
        return list(torch.autograd.forward_ad.unpack_dual(y))


def twice(layer: nn.Module) -> list[Tensor]:
    """A second derivative."""
    x = X.clone().requires_grad_()
    (dx,) = torch.autograd.grad(layer(x), x, DY, create_graph=True)
    return list(torch.autograd.grad(dx, [x], DY))


def compiled(layer: nn.Module) -> list[Tensor]:
    """torch.compile of a whole checkpointed region."""
    region = functools.partial(checkpoint.checkpoint, lambda x: layer(x.sin()), use_reentrant=False)
    return step_of(torch.compile(region, fullgraph=True, backend="aot_eager"), layer)


WAYS: dict[str, Callable[[nn.Module], list[Tensor]]] = {
    "step": step,
    "checkpoint": functools.partial(_checkpointed, use_reentrant=False),
    "reentrant": functools.partial(_checkpointed, use_reentrant=True),
    **{way.__name__: way for way in (selective, fx, jit, func_grad, func_others, many, jvp, twice, compiled)},
}
EAGER = [way for way in WAYS if way != "compiled"]
