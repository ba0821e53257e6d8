"""What the interpreter's process is asked beside whole cases: stability, repeatability, far addresses, workspaces."""

import torch
from torch import Tensor

from syncbn.backends import reference
from syncbn.formulas import Epilogue, Running, moments
from tests.support.gpu_interpreter import device_of

PLAIN = Epilogue()


def sums_error(x: Tensor, mask: Tensor | None, sms: int) -> tuple[float, float]:
    """The largest error of the mean, in standard deviations, and of the variance, relative."""
    from syncbn.backends import gpu

    with device_of(sms):
        mean, var, _ = moments(gpu.batch_sums(x, mask), x.shape[1])
    wide = x.double() if mask is None else torch.where(mask.unsqueeze(1), x.double(), 0)
    columns = wide.movedim(1, 0).reshape(x.shape[1], -1)
    if mask is not None:
        columns = columns[:, mask.reshape(-1)]
    right_mean, right_var = columns.mean(1), columns.var(1, correction=0)
    return float(((mean - right_mean).abs() / right_var.sqrt()).max()), float((var / right_var - 1).abs().max())


def bits_repeat(x: Tensor, dy: Tensor) -> None:
    """Two runs of every verb give the same bits, and leave every semaphore at 0."""
    from syncbn.backends import gpu, gpu_workspace

    runs = []
    for _ in range(2):
        sums = gpu.batch_sums(x, None)
        running = Running(torch.zeros(x.shape[1]), torch.ones(x.shape[1]), torch.tensor(0), None)
        y, mean, invstd = gpu.normalize(x, sums, PLAIN, 1e-5, running)
        dsums, _, _ = gpu.grad_sums(dy, x, mean, invstd, PLAIN)
        dx, _ = gpu.grad_input(dy, x, mean, invstd, PLAIN, dsums, sums[-3:-2], False)
        runs.append((sums, y, mean, invstd, dsums, dx, running.mean, running.var))
        assert all(not work.semaphores.any() for work in gpu_workspace._workspaces.values())
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def far_apart(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """A tensor whose elements lie more than 2³¹ apart is read and written where they are."""
    from syncbn.backends import gpu

    reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    assert reach > 2**31
    x = torch.empty(reach, dtype=torch.float16).as_strided(shape, strides)  # pages that nobody touches cost nothing
    dy = torch.empty(reach, dtype=torch.float16).as_strided(shape, strides)
    for t in (x, dy):
        t.copy_(torch.randn(shape))
    sums, right = gpu.batch_sums(x, None), gpu.batch_sums(x.contiguous(), None)
    torch.testing.assert_close(sums, right, rtol=1e-6, atol=1e-4)
    y, mean, invstd = gpu.normalize(x, sums, PLAIN, 1e-5, None)
    torch.testing.assert_close(y, reference.normalize(x, sums, PLAIN, 1e-5, None)[0])
    dsums, _, _ = gpu.grad_sums(dy, x, mean, invstd, PLAIN)
    dx, _ = gpu.grad_input(dy, x, mean, invstd, PLAIN, dsums, sums[-3:-2], False)
    right_dx, _ = reference.grad_input(dy, x, mean, invstd, PLAIN, dsums, sums[-3:-2], False)
    torch.testing.assert_close(dx, right_dx)


def cut_alike(x: Tensor, residual: Tensor) -> int:
    """Units that relu cuts in one direction only, where z is a rounding away from 0."""
    from syncbn.backends import gpu

    weight, bias = torch.rand(x.shape[1]) + 0.5, torch.randn(x.shape[1])
    z, mean, invstd = gpu.normalize(x, gpu.batch_sums(x, None), Epilogue(weight, bias), 1e-5, None)
    steps = torch.randint(-2, 3, x.shape) * z.abs() * 2**-23
    residual = steps - z
    epilogue = Epilogue(weight, bias, residual, None, "relu")
    y, mean, invstd = gpu.normalize(x, gpu.batch_sums(x, None), epilogue, 1e-5, None)
    ones = torch.ones_like(x)
    _, dresidual = gpu.grad_input(ones, x, mean, invstd, epilogue, None, ones[0, :1].double(), True)
    assert 0 < int((y > 0).sum()) < y.numel()
    return int(((y > 0) != (dresidual == 1)).sum())


def odd_buffers() -> None:
    """Running statistics that are slices of a larger tensor, and a counter of another dtype, move as others do."""
    from syncbn.backends import gpu

    x = torch.randn(4, 6, 5)
    sliced, plain = torch.zeros(2, 12)[:, ::2], torch.zeros(2, 6)
    counter = torch.tensor(1, dtype=torch.int32)
    sums = gpu.batch_sums(x, None)
    gpu.normalize(x, sums, PLAIN, 1e-5, Running(sliced[0], sliced[1], counter, None))
    reference.normalize(x, sums, PLAIN, 1e-5, Running(plain[0], plain[1], torch.tensor(1), None))
    torch.testing.assert_close(sliced, plain)
    assert counter == 2


def plans_are_bounded() -> None:
    """More shapes than plans are kept, and results stay right."""
    from syncbn.backends import gpu

    with device_of(132):
        gpu._plans.most = 3
        for size in (2, 3, 4, 5, 2, 6):
            x = torch.randn(2, 3, size)
            torch.testing.assert_close(gpu.batch_sums(x, None), reference.batch_sums(x, None), rtol=1e-6, atol=1e-6)
            assert len(gpu._plans) <= 3


def workspace_grows() -> None:
    """A larger need replaces the workspace, a smaller one does not; semaphores are zero either way."""
    from syncbn.backends import gpu_workspace

    device = torch.device("cpu")
    partials, semaphores = gpu_workspace.workspace(device, 10, 10)
    assert gpu_workspace.workspace(device, 5, 5)[0] is partials
    larger, more = gpu_workspace.workspace(device, partials.numel() + 1, semaphores.numel() + 1)
    assert larger.numel() > partials.numel()
    assert more.numel() > semaphores.numel()
    assert not more.any()
