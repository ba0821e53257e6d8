"""The four verbs for calls that are all alike: what gpu.py works out in each call is laid out once, here.

A call that turns out not to be alike goes gpu.py's way: a dy of other strides, a tensor that does not begin at a
vector, another current device, a capture, a hook on Triton's launches. So does the first, which compiles.
"""

from types import ModuleType

import torch
from torch import Tensor

from syncbn.backends import Epilogue, Running, compute_dtype, gpu, gpu_launch
from syncbn.backends.gpu_launch import Plan, Workspace
from syncbn.backends.gpu_triton import Launch, current_device_and_stream, direct_launch, has_listeners


def prepare(x: Tensor, epilogue: Epilogue, running: Running | None) -> "Direct | ModuleType":
    """A back-end for calls with tensors like these; gpu.py itself where they are unusual."""
    parameters = (epilogue.weight, epilogue.bias, *(running[:2] if running is not None else ()))
    with_gaps = any(not t.is_contiguous() for t in parameters if t is not None)
    cumulative = running is not None and running.momentum is None
    if epilogue.mask is not None or cumulative or with_gaps or x.numel() == 0:
        return gpu
    y = torch.empty_like(x)
    needs_copies = gpu.plan_normalize(x, y, epilogue, running).copies or gpu.plan_grad_sums(y, x, epilogue).copies
    return gpu if needs_copies else Direct(x, y, epilogue, running)


class Direct:
    """`Backend` for calls with tensors like these; masks are None, dy is like y."""

    def __init__(self, x: Tensor, y: Tensor, epilogue: Epilogue, running: Running | None) -> None:
        self.channels, self.device = x.shape[1], x.device
        self.dtype, self.wide, self.strides = x.dtype, compute_dtype(x.dtype), y.stride()
        self.dweight, self.dbias = (None if t is None else t.dtype for t in epilogue[:2])
        self.sums = Step(gpu.plan_batch_sums(x, None), x.device)
        self.normalized = Step(gpu.plan_normalize(x, y, epilogue, running), x.device)
        self.dsums = Step(gpu.plan_grad_sums(y, x, epilogue), x.device)
        self.inputs = {
            (wants_dx, wants_dresidual): Step(
                gpu.plan_grad_input(y, x, epilogue, y if wants_dx else None, y if wants_dresidual else None), x.device
            )
            for wants_dx, wants_dresidual in ((True, False), (True, True), (False, True))
        }

    def batch_sums(self, x: Tensor, mask: Tensor | None) -> Tensor:
        at, step = x.data_ptr(), self.sums
        stream = step.stream(at)
        work = step.workspace(stream)
        if stream is None or work is None:
            return gpu.batch_sums(x, mask)
        sums = torch.empty(2 * self.channels + 1, dtype=torch.float64, device=self.device)
        step.launch(stream, at, None, work.partials_at, work.semaphores_at, sums.data_ptr())
        return sums

    def normalize(
        self, x: Tensor, sums: Tensor, epilogue: Epilogue, eps: float, running: Running | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias, residual, _, _ = epilogue
        running_mean, running_var, tracked, momentum = running or gpu.NOT_RUNNING
        at, residual_at, step = x.data_ptr(), 0 if residual is None else residual.data_ptr(), self.normalized
        stream = step.stream(at | residual_at)
        if stream is None:
            return gpu.normalize(x, sums, epilogue, eps, running)
        y = torch.empty_like(x)
        mean = torch.empty(self.channels, dtype=self.wide, device=self.device)
        invstd = torch.empty_like(mean)
        step.launch(
            stream,
            at,
            residual_at or None,
            None,
            sums.data_ptr(),
            None if weight is None else weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            None if running_mean is None else running_mean.data_ptr(),
            None if running_var is None else running_var.data_ptr(),
            None if tracked is None else tracked.data_ptr(),
            None,
            y.data_ptr(),
            mean.data_ptr(),
            invstd.data_ptr(),
            *gpu.halves(eps, momentum),
        )
        return y, mean, invstd

    def grad_sums(
        self, dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, epilogue: Epilogue
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        weight, bias, residual, _, _ = epilogue
        dy_at, at, residual_at = dy.data_ptr(), x.data_ptr(), 0 if residual is None else residual.data_ptr()
        step, channels, device = self.dsums, self.channels, self.device
        stream = step.stream(dy_at | at | residual_at)
        work = step.workspace(stream)
        if stream is None or work is None or dy.dtype != self.dtype or dy.stride() != self.strides:
            return gpu.grad_sums(dy, x, mean, invstd, epilogue)
        dsums = torch.empty(2 * channels, dtype=torch.float64, device=device)
        dweight = None if weight is None else torch.empty(channels, dtype=self.dweight, device=device)
        dbias = None if bias is None else torch.empty(channels, dtype=self.dbias, device=device)
        step.launch(
            stream,
            dy_at,
            at,
            residual_at or None,
            None,
            mean.data_ptr(),
            invstd.data_ptr(),
            None if weight is None else weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            work.partials_at,
            work.semaphores_at,
            dsums.data_ptr(),
            None if dweight is None else dweight.data_ptr(),
            None if dbias is None else dbias.data_ptr(),
        )
        return dsums, dweight, dbias

    def grad_input(
        self,
        dy: Tensor,
        x: Tensor,
        mean: Tensor,
        invstd: Tensor,
        epilogue: Epilogue,
        dsums: Tensor | None,
        count: Tensor,
        needs_dresidual: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        weight, bias, residual, _, _ = epilogue
        dy_at, at, residual_at = dy.data_ptr(), x.data_ptr(), 0 if residual is None else residual.data_ptr()
        step = self.inputs[dsums is not None, needs_dresidual]
        stream = step.stream(dy_at | at | residual_at)
        if stream is None or dy.dtype != self.dtype or dy.stride() != self.strides:
            return gpu.grad_input(dy, x, mean, invstd, epilogue, dsums, count, needs_dresidual)
        dx = None if dsums is None else torch.empty_like(x)
        dresidual = torch.empty_like(x) if needs_dresidual else None
        step.launch(
            stream,
            dy_at,
            at,
            residual_at or None,
            None,
            mean.data_ptr(),
            invstd.data_ptr(),
            None if weight is None else weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            None if dsums is None else dsums.data_ptr(),
            count.data_ptr(),
            None if dx is None else dx.data_ptr(),
            None if dresidual is None else dresidual.data_ptr(),
        )
        return dx, dresidual


class Step:
    """A plan's launch, once its kernel is compiled for activations that begin at a vector."""

    launch: Launch

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan, self.index, self.is_bound = plan, device.index or 0, False
        self.device, self.on_cuda = device, device.type == "cuda"

    def stream(self, addresses: int) -> int | None:
        """The current stream; None where this call is not to be launched directly.

        addresses are those of the activations, or-ed: one that does not begin at a vector shows.
        """
        if not (self.is_bound or self._bind()) or addresses & 15 or has_listeners():
            return None
        return self.current_stream(self.index) if self.current_device() == self.index else None

    def workspace(self, stream: int | None) -> Workspace | None:
        """The stream's scratch, if there is enough; a captured launch needs its own."""
        if stream is None or gpu_launch.is_capturing(self.device):
            return None
        return gpu_launch.known_workspace(self.index, stream if self.on_cuda else 0, self.plan)

    def _bind(self) -> bool:
        kernel = self.plan.kernel
        compiled = kernel.compiled.get(kernel.all_aligned)
        if compiled is None:
            return False
        self.launch = direct_launch(compiled, self.plan.grid, (*self.plan.integers, *kernel.constants.values()))
        self.current_device, self.current_stream = current_device_and_stream()
        self.is_bound = True
        return True
