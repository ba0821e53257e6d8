"""Every error text for a wrong argument: the rule, what was received, what to do.

All of it is decided before any collective, from shapes and dtypes, so that what is wrong alike on every rank is
raised on every rank, and a failed call has moved nothing.
"""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from syncbn import comm, torch_private
from syncbn.formulas import ACTIVATIONS, DTYPES, Epilogue, Running, Statistics

COUNTERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
DEFAULTS = {"eps": 1e-5, "momentum": 0.1}
_REAL_NAMES = "float16, bfloat16, float32 or float64"


class Checked(NamedTuple):
    """A call in which nothing is wrong; group None means that this rank is alone, or evaluates."""

    x: Tensor
    epilogue: Epilogue
    running: Running | None
    eps: float
    group: ProcessGroup | None


def checked(
    process_group: comm.Group | None,
    x: Tensor,
    training: bool,
    statistics: Statistics,
    epilogue: Epilogue,
    eps: float,
    is_composed: bool,
) -> Checked:
    """The call, with its peers and its numbers as floats."""
    group = check_group(process_group) if training else None
    running_mean, running_var, counter, momentum, skip_nonfinite = statistics
    of_batch = training or running_mean is None
    eps, momentum = check_numbers(eps, momentum, of_batch)
    weight, bias, residual, mask, activation = epilogue
    check_input(x)
    check_channels(x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    check_running(x, training, running_mean, running_var, counter, momentum)
    check_activation(activation)
    check_residual(x, residual)
    check_mask(x, mask)
    if of_batch and mask is None and group is None:
        check_batch_size(x)
    if is_composed and not torch.compiler.is_compiling():
        check_mapped(x, mask, running_mean if training else None)
    if running_mean is None or running_var is None:
        return Checked(x, epilogue, None, eps, group)
    return Checked(x, epilogue, Running(running_mean, running_var, counter, momentum, skip_nonfinite), eps, group)


def check_input(x: Tensor) -> None:
    """(N, C, *S), real floating point, at least one channel."""
    if not isinstance(x, Tensor):
        raise TypeError(f"input must be a Tensor; got {type(x).__name__}. Pass a tensor of shape (N, C, *S).")
    if x.dtype not in DTYPES:
        hint = "Normalize the real and imaginary parts apart" if x.is_complex() else "Convert it, e.g. input.float()"
        raise TypeError(f"input must be {_REAL_NAMES}; got {x.dtype}. {hint}.")
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
    channels = x.shape[1]
    for name, t in per_channel.items():
        if t is None:
            continue
        if t.shape != (channels,):
            raise ValueError(
                f"{name} must have one value for each channel of input, dimension 1; got {name} of shape "
                f"{tuple(t.shape)} with input of shape {tuple(x.shape)}. "
                f"Build the layer with num_features={channels}, or check the dimension order of input."
            )
        if t.dtype not in DTYPES:
            raise TypeError(f"{name} must be {_REAL_NAMES}; got {t.dtype}. Convert it, e.g. {name}.float().")
        _check_device(x, name, t)


def check_running(
    x: Tensor,
    training: bool,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
) -> None:
    """Both statistics or neither; in training, momentum None needs the counter, an integer on x's device."""
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"running_mean and running_var come together; got no {missing}. Pass both or neither.")
    if training and running_mean is not None and momentum is None and num_batches_tracked is None:
        raise ValueError(
            "momentum=None is the cumulative average and needs num_batches_tracked; got none. "
            "Pass num_batches_tracked=torch.tensor(0, device=input.device), or a momentum."
        )
    if num_batches_tracked is not None:
        if num_batches_tracked.numel() != 1 or num_batches_tracked.dtype not in COUNTERS:
            raise TypeError(
                "num_batches_tracked must be one integer in a Tensor; got shape "
                f"{tuple(num_batches_tracked.shape)} of {num_batches_tracked.dtype}. Use torch.tensor(0)."
            )
        _check_device(x, "num_batches_tracked", num_batches_tracked)


def check_num_features(num_features: int) -> None:
    """A positive integer."""
    if isinstance(num_features, bool) or not hasattr(num_features, "__index__"):
        raise TypeError(
            f"num_features must be a positive integer; got {type(num_features).__name__}. Pass C of inputs (N, C, *S)."
        )
    if num_features <= 0:
        raise ValueError(f"num_features must be a positive integer; got {num_features}. Pass C of inputs (N, C, *S).")


def check_numbers(eps: float, momentum: float | None, of_batch: bool) -> tuple[float, float | None]:
    """Both as floats: eps ≥ 0, and > 0 where the statistics are a batch's; momentum any finite number, or None."""
    if type(eps) is float and 0 < eps < math.inf and type(momentum) is float and -math.inf < momentum < math.inf:
        return eps, momentum
    eps = _number("eps", eps)
    if eps < 0 or (of_batch and eps == 0):
        rule = "must be positive in training, where a channel may be constant" if eps == 0 else "cannot be negative"
        raise ValueError(f"eps {rule}; got {eps}. Use e.g. eps=1e-5; eval with running statistics takes 0 too.")
    return eps, None if momentum is None else _number("momentum", momentum)


def check_activation(activation: str | None) -> None:
    """One of the activations that can be fused."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}; got {activation!r}. "
            "Apply another one to the layer's output."
        )


def check_residual(x: Tensor, residual: Tensor | None) -> None:
    """Of x's shape, real floating point, on x's device."""
    if residual is None:
        return
    if not isinstance(residual, Tensor):
        raise TypeError(f"residual must be a Tensor or None; got {type(residual).__name__}. Pass forward(x, residual).")
    if residual.shape != x.shape:
        raise ValueError(
            f"residual must have the shape of input, {tuple(x.shape)}; got {tuple(residual.shape)}. "
            "Expand it first: it is added elementwise, before the activation."
        )
    if residual.dtype not in DTYPES:
        raise TypeError(f"residual must be {_REAL_NAMES}; got {residual.dtype}. Convert it, e.g. residual.float().")
    _check_device(x, "residual", residual)


def check_mask(x: Tensor, mask: Tensor | None) -> None:
    """bool, broadcastable to (N, *S), on x's device."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool Tensor, True where a position counts; got {got}. Use e.g. mask.bool().")
    shape = (x.shape[0], *x.shape[2:])
    if not _broadcasts(mask.shape, shape):
        raise ValueError(
            f"mask must broadcast to (N, *S) = {shape}, the input without its channels; got {tuple(mask.shape)}. "
            "Drop the channel dimension: all channels of a position count or none."
        )
    _check_device(x, "mask", mask)


def check_group(process_group: comm.Group | None) -> ProcessGroup | None:
    """The peers to synchronise with, None when alone."""
    dimensions = comm.dimensions_of(process_group)
    if dimensions != 1:
        raise ValueError(
            f"A DeviceMesh to synchronise over must have one dimension; got {dimensions}. "
            "Pass one of its dimensions, e.g. mesh['dp']."
        )
    try:
        group = comm.peers(process_group)
    except comm.NotAMember as error:
        named = "it" if error.is_sure else "the newest group without this rank"
        raise ValueError(
            f"A rank must belong to the process_group it synchronises over; got rank {error.rank} outside of it: "
            f"{named} has ranks {error.ranks}. Give each rank the group that contains it, as syncbn.new_group does; "
            "dist.new_group returns a usable group to its members only."
        ) from None
    if group is not None and not torch.compiler.is_compiling() and comm.is_joining():
        raise RuntimeError(
            "DistributedDataParallel.join() stands in for a rank that has run dry in DDP's own collectives only, and a "
            "synchronized layer would wait for it; got a training call of one within join(). "
            "Leave join() away and wrap the loader, syncbn.EvenLoader(loader), which gives such a rank empty batches."
        )
    return group


def check_loader(loader: object, process_group: object, empty: object, device: Any) -> torch.device | None:
    """Something to iterate over, a group or None, a function or None, a device or None, as torch knows it."""
    check_iterable("loader", loader)
    if not (process_group is None or comm.is_group(process_group)):
        raise TypeError(
            f"process_group must be a ProcessGroup, a 1-d DeviceMesh or None; got {type(process_group).__name__}. "
            "Pass the group of the model's layers and of DistributedDataParallel, or nothing for the default one."
        )
    if not (empty is None or callable(empty)):
        raise TypeError(
            f"empty must be a function from a batch to an empty one, or None; got {type(empty).__name__}. "
            "Pass e.g. empty=lambda batch: batch[:0]."
        )
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise TypeError(f"device must be a device or None; got {device!r}. Pass e.g. device='cuda:0'.") from None


def check_iterable(name: str, given: object) -> None:
    """What a for statement takes."""
    if not (hasattr(given, "__iter__") or hasattr(given, "__getitem__")):
        raise TypeError(
            f"{name} must be iterable, as a DataLoader is; got {type(given).__name__}. "
            "Pass what your loop iterates over."
        )


def loader_failed(rank: int, what: str) -> RuntimeError:
    """For the ranks whose loaders did not."""
    return RuntimeError(
        f"Every rank's loader must give batches or end; that of rank {rank} raised {what}. "
        f"See rank {rank}'s traceback for where; this rank stops with it, as no step can be made without all ranks."
    )


def check_symbolic(argument: object) -> None:
    """No process group: torch.fx can write none into a graph."""
    if isinstance(argument, comm.Group):
        raise TypeError(
            f"torch.fx takes no process group into a graph; got a {type(argument).__name__}. "
            "Trace a layer that has the group, syncbn.SyncBatchNorm(..., process_group=group), or pass None."
        )


def check_mapped(x: Tensor, mask: Tensor | None, running_mean: Tensor | None) -> None:
    """Under torch.vmap, running statistics for each of the batches, unless there are none to move."""
    mapped = torch_private.is_mapped
    if running_mean is not None and not mapped(running_mean) and (mapped(x) or mapped(mask)):
        raise RuntimeError(
            "Under torch.vmap every batch has statistics of its own, which one set of running statistics cannot "
            "follow; got a running_mean that is not mapped over. Pass stacked buffers (torch.func.stack_module_state), "
            "build the layer with track_running_stats=False, or call eval()."
        )


def check_batch_size(x: Tensor) -> None:
    """More than one value per channel, where no peer may have more."""
    if x.numel() == x.shape[1]:
        raise ValueError(
            "Expected more than 1 value per channel when training: one value has no variance; "
            f"got input size {x.shape} and no other rank to share statistics with. "
            "Use a larger batch, call eval(), or drop the last incomplete batch (drop_last=True)."
        )


def _number(name: str, value: Any) -> float:
    """As torch takes one for a float: a real number, or a tensor of no dimensions."""
    if torch.compiler.is_compiling() and not isinstance(value, (int, float)):  # it may have no value yet
        return value  # type: ignore[no-any-return]
    if not (isinstance(value, Real) or (isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex())):
        what = "a number or None" if name == "momentum" else "a number"
        raise TypeError(f"{name} must be {what}; got {value!r}. Use e.g. {name}={DEFAULTS[name]}.")
    number = float(value)
    if not -math.inf < number < math.inf:
        raise ValueError(f"{name} must be finite; got {number}. Use e.g. {name}={DEFAULTS[name]}.")
    return number


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    trailing = to[len(to) - len(shape) :]
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape, trailing, strict=True))


def _check_device(x: Tensor, name: str, t: Tensor) -> None:
    if t.device != x.device:
        raise ValueError(f"{name} must be on the device of input, {x.device}; got {t.device}. Move one of them.")
