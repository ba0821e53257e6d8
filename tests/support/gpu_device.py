"""Running a `Case` on a CUDA device."""

import contextlib
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.layer_runs import layer_for
from tests.support.oracle import Call, Case, Outcome, make_calls


def to_cuda(t: Tensor | None) -> Tensor | None:
    """A copy with the same strides."""
    if t is None:
        return None
    if t.numel() == 0 or 0 in t.stride():
        return t[:1, :, ..., :1].cuda().expand(t.shape) if t.numel() and t.ndim > 2 else t.cuda()
    reach = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
    return torch.empty(reach, dtype=t.dtype, device="cuda").as_strided(t.shape, t.stride()).copy_(t)


def cuda_call(case: Case, rank: int = 0) -> Call:
    call = make_calls(case)[rank]
    return Call(*(to_cuda(t) for t in (call.x, call.dy, call.weight, call.bias, call.residual, call.mask)))


def run_on_cuda(case: Case, steps: int = 1) -> Outcome:
    """This rank's part on the first device; the outcome's tensors on the CPU."""
    call = cuda_call(case, dist.get_rank() if dist.is_initialized() else 0)
    layer = layer_for(case, call).cuda()
    for _ in range(steps):
        layer.zero_grad()
        x = call.x.detach().requires_grad_()
        residual = None if call.residual is None else call.residual.detach().requires_grad_()
        y = layer(x, residual, call.mask)
        y.backward(call.dy)
    results = (y.detach(), x.grad, None if layer.weight is None else layer.weight.grad)
    results += (None if layer.bias is None else layer.bias.grad, None if residual is None else residual.grad)
    results += (layer.running_mean, layer.running_var, layer.num_batches_tracked)
    return Outcome(*(None if t is None else t.cpu() for t in results))


@contextlib.contextmanager
def no_synchronization() -> Iterator[None]:
    """Any wait of the host for the device is an error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
