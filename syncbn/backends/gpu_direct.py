"""Launches for calls that are all alike: what gpu.py works out in each call is laid out once, here."""

import torch
from torch import Tensor

from syncbn import torch_private
from syncbn.backends import gpu, gpu_report, gpu_workspace
from syncbn.backends.gpu_launch import Plan
from syncbn.backends.gpu_triton import Launch, direct_launch, has_listeners
from syncbn.backends.gpu_workspace import Workspace
from syncbn.formulas import Epilogue, Running, compute_dtype


class Step:
    """A plan's launch, once its kernel is compiled for activations that begin at a vector."""

    launch: Launch

    def __init__(self, plan: Plan) -> None:
        self.plan, self.is_bound = plan, False

    def bind(self) -> bool:
        """Whether there is a launch."""
        if not self.is_bound:
            kernel = self.plan.kernel
            compiled = kernel.compiled.get(kernel.all_aligned)
            if compiled is not None:
                fixed = (*self.plan.integers, *kernel.constants.values())
                self.launch, self.is_bound = direct_launch(compiled, self.plan.grid, fixed), True
        return self.is_bound


class Launches:
    """Of the four verbs, for tensors like these; dy like y. Their order of arguments is the kernels'."""

    def __init__(self, x: Tensor, y: Tensor, epilogue: Epilogue, running: Running | None) -> None:
        self.device, self.index, self.on_cuda = x.device, x.device.index or 0, x.device.type == "cuda"
        self.strides, self.wide = y.stride(), compute_dtype(x.dtype)
        self.halves, self.report_at = gpu.halves, gpu_report.report_of(x.device).data_ptr()
        self.is_capturing, self.current_stream = gpu_workspace.questions(x.device)
        # backward needs the residual again for an activation's derivative only
        back = epilogue if epilogue.activation is not None else epilogue._replace(residual=None)
        self.sums, self.dsums = Step(gpu.plan_batch_sums(x, None)), Step(gpu.plan_grad_sums(y, x, back))
        self.normalized = Step(gpu.plan_normalize(x, y, epilogue, running))
        self.inputs = self.both_inputs = Step(gpu.plan_grad_input(y, x, back, y, None))
        if back.residual is not None:
            self.both_inputs = Step(gpu.plan_grad_input(y, x, back, y, y))
        plans = self.sums.plan, self.dsums.plan
        self.partials, self.semaphores = (max(getattr(p, need) for p in plans) for need in ("partials", "semaphores"))

    def turn(self, addresses: int) -> Workspace | None:
        """The workspace of the stream to launch on; None where this is no time to launch directly.

        addresses are those of the activations, or-ed: one that does not begin at a vector shows.
        """
        if addresses & 15 or has_listeners():
            return None
        if self.on_cuda and torch_private.current_cuda_device() != self.index:
            return None
        if self.is_capturing():
            return None
        work = gpu_workspace.known_workspace(self.index, self.current_stream())
        return work if work is not None and work.has(self.partials, self.semaphores) else None


def launches_for(x: Tensor, epilogue: Epilogue, running: Running | None) -> Launches | None:
    """Those for calls with tensors of these shapes, strides, dtypes and device; None where they are unusual."""
    owned = (*epilogue[:2], *(running[:3] if running is not None else ()))
    with_gaps = any(not t.is_contiguous() for t in owned if t is not None)
    cumulative = running is not None and running.momentum is None
    if epilogue.mask is not None or cumulative or with_gaps or x.numel() == 0:
        return None
    y = torch.empty_like(x, device="meta")
    if gpu.plan_normalize(x, y, epilogue, running).copies or gpu.plan_grad_sums(y, x, epilogue).copies:
        return None
    return Launches(x, y, epilogue, running)
