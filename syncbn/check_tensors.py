"""Errors for wrong tensors of a call; checks.py has the rest of them, and what they have in common."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from syncbn.formulas import DTYPES, PLAIN

COUNTERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_input(x: Tensor) -> None:
    """(N, C, *S), real floating point, at least one channel."""
    if type(x) not in PLAIN or x.layout is not torch.strided or x.is_nested:
        if not isinstance(x, Tensor):
            raise TypeError(f"input must be a Tensor; got {type(x).__name__}. Pass a tensor of shape (N, C, *S).")
        _check_dense("input", x)
    if x.dtype not in DTYPES:
        raise _not_real("input", x)
    if x.ndim < 2:
        raise ValueError(
            f"input must have at least 2 dimensions, (N, C, *S); got shape {tuple(x.shape)}. "
            "Add the batch dimension, e.g. input.unsqueeze(0)."
        )
    if x.shape[1] == 0:
        raise ValueError(
            f"input must have at least one channel in dimension 1; got shape {tuple(x.shape)}. "
            "An empty batch has 0 in dimension 0 and still its channels."
        )


def check_channels(x: Tensor, **per_channel: Tensor | None) -> None:
    """Every given tensor is a real (C,) on x's device."""
    channels, device = x.shape[1], x.device
    for name, t in per_channel.items():
        if t is None:
            continue
        if type(t) not in PLAIN or t.layout is not torch.strided or t.is_nested:  # `_check_dense`, without its call
            if not isinstance(t, Tensor):
                raise TypeError(
                    f"{name} must be a Tensor or None; got {type(t).__name__}. Pass e.g. torch.zeros({channels})."
                )
            _check_dense(name, t)
        if t.shape != (channels,):
            raise ValueError(
                f"{name} must have one value for each channel of input, dimension 1; got {name} of shape "
                f"{tuple(t.shape)} with input of shape {tuple(x.shape)}. "
                f"Build the layer with num_features={channels}, or check the dimension order of input."
            )
        if t.dtype not in DTYPES:
            raise _not_real(name, t)
        if t.device != device:
            _check_device(x, name, t)


def check_running(
    x: Tensor,
    training: bool,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
) -> None:
    """Both statistics or neither, without gradients; in training, each channel's own memory, and a counter for
    momentum None, which is an integer on x's device.
    """
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"running_mean and running_var come together; got no {missing}. Pass both or neither.")
    if training and running_mean is not None and momentum is None and num_batches_tracked is None:
        raise ValueError(
            "momentum=None is the cumulative average and needs num_batches_tracked; got none. "
            "Pass num_batches_tracked=torch.tensor(0, device=input.device), or a momentum."
        )
    if running_mean is not None and running_var is not None:
        if (running_mean.requires_grad or running_var.requires_grad) and torch.is_grad_enabled():
            name = "running_mean" if running_mean.requires_grad else "running_var"
            raise ValueError(
                f"{name} must be a buffer, in which nothing is differentiated; got one that requires a gradient. "
                f"Pass {name}.detach(), or give a module its buffers by register_buffer."
            )
        if training:
            _check_movable("running_mean", running_mean)
            _check_movable("running_var", running_var)
    if num_batches_tracked is not None:
        if not isinstance(num_batches_tracked, Tensor):
            got = type(num_batches_tracked).__name__
            raise TypeError(f"num_batches_tracked must be one integer in a Tensor; got {got}. Use torch.tensor(0).")
        _check_dense("num_batches_tracked", num_batches_tracked)
        if num_batches_tracked.numel() != 1 or num_batches_tracked.dtype not in COUNTERS:
            raise TypeError(
                "num_batches_tracked must be one integer in a Tensor; got shape "
                f"{tuple(num_batches_tracked.shape)} of {num_batches_tracked.dtype}. Use torch.tensor(0)."
            )
        _check_device(x, "num_batches_tracked", num_batches_tracked)


def check_residual(x: Tensor, residual: Tensor | None) -> None:
    """Of x's shape, real floating point, on x's device."""
    if residual is None:
        return
    if not isinstance(residual, Tensor):
        raise TypeError(f"residual must be a Tensor or None; got {type(residual).__name__}. Pass forward(x, residual).")
    _check_dense("residual", residual)
    if residual.shape != x.shape:
        raise ValueError(
            f"residual must have the shape of input, {tuple(x.shape)}; got {tuple(residual.shape)}. "
            "Expand it first: it is added elementwise, before the activation."
        )
    if residual.dtype not in DTYPES:
        raise _not_real("residual", residual)
    _check_device(x, "residual", residual)


def check_mask(x: Tensor, mask: Tensor | None) -> None:
    """bool, broadcastable to (N, *S), on x's device."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool Tensor, True where a position counts; got {got}. Use e.g. mask.bool().")
    _check_dense("mask", mask)
    shape = (x.shape[0], *x.shape[2:])
    if not _broadcasts(mask.shape, shape):
        raise ValueError(
            f"mask must broadcast to (N, *S) = {shape}, the input without its channels; got {tuple(mask.shape)}. "
            "Drop the channel dimension: all channels of a position count or none."
        )
    _check_device(x, "mask", mask)


def check_local(**given: Tensor | None) -> None:
    """No DTensor: statistics are summed by the layer, of what each rank has itself."""
    for name, t in given.items():
        if type(t) not in PLAIN and hasattr(t, "to_local"):
            raise TypeError(
                f"{name} must be a local tensor in training; got a {type(t).__name__}. "
                f"Pass {name}.to_local() to a layer of local parameters, with the mesh as its process_group."
            )


def _check_dense(name: str, t: Tensor) -> None:
    """Numbers that lie in memory at strides, and as many as the shape says."""
    if type(t) in PLAIN and t.layout is torch.strided and not t.is_nested:
        return
    if is_lazy(t):
        raise ValueError(
            f"{name} must have a shape; got an {type(t).__name__}, which has none. Call the lazy layer it belongs to."
        )
    if t.is_nested:
        way = f"Pad it, torch.nested.to_padded_tensor({name}, 0.0), and pass a mask that is False on the padding"
        raise TypeError(f"{name} must be a dense tensor; got a nested one. {way}.")
    if t.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got layout {t.layout}. Pass {name}.to_dense().")


def _not_real(name: str, t: Tensor) -> TypeError:
    hint = f"Convert it, e.g. {name}.{'dequantize' if t.is_quantized else 'float'}()"
    if t.is_complex():
        hint = "Normalize the real and imaginary parts apart"
    return TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {t.dtype}. {hint}.")


def _check_movable(name: str, t: Tensor) -> None:
    if t.stride(0) == 0 and t.shape[0] > 1:
        raise ValueError(
            f"{name} must have memory for each channel, since it is moved in place; got stride 0. Pass {name}.clone()."
        )


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    trailing = to[len(to) - len(shape) :]
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape, trailing, strict=True))


def _check_device(x: Tensor, name: str, t: Tensor) -> None:
    if t.device != x.device:
        raise ValueError(f"{name} must be on the device of input, {x.device}; got {t.device}. Move one of them.")
