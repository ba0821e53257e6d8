"""Every error text for a wrong argument of a call: the rule, what was received, what to do.

All of it is decided before any collective, from shapes and dtypes, so that what is wrong alike on every rank is
raised on every rank, and a failed call has moved nothing.
"""

import math
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from syncbn import groups, torch_private
from syncbn.check_tensors import check_channels, check_input, check_local, check_mask, check_residual, check_running
from syncbn.formulas import ACTIVATIONS, Epilogue, Running, Statistics

DEFAULTS = {"eps": 1e-5, "momentum": 0.1}


class Checked(NamedTuple):
    """A call in which nothing is wrong; group None means that this rank is alone, or evaluates."""

    x: Tensor
    epilogue: Epilogue
    running: Running | None
    eps: float
    group: ProcessGroup | None


def checked(
    process_group: groups.Group | None,
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
    if training and not torch.compiler.is_compiling():
        check_local(input=x, residual=residual, weight=weight, bias=bias, running_mean=running_mean)
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


def check_process_group(process_group: object) -> None:
    """A group, a mesh or None, whether or not this rank is in it."""
    if not (process_group is None or groups.is_group(process_group)):
        raise TypeError(
            f"process_group must be a ProcessGroup, a 1-d DeviceMesh or None; got {type(process_group).__name__}. "
            "Pass the group that syncbn.new_group or dist.new_group returns, or nothing for the default one."
        )


def check_group(process_group: groups.Group | None) -> ProcessGroup | None:
    """The peers to synchronise with, None when alone."""
    if not torch.compiler.is_compiling():  # which sees a stand-in of a group
        check_process_group(process_group)
    dimensions = groups.dimensions_of(process_group)
    if dimensions != 1:
        raise ValueError(
            f"A DeviceMesh to synchronise over must have one dimension; got {dimensions}. "
            "Pass one of its dimensions, e.g. mesh['dp']."
        )
    try:
        group = groups.peers(process_group)
    except groups.NotAMember as error:
        named = "it" if error.is_sure else "the newest group without this rank"
        ranks = f": {named} has ranks {list(error.ranks)}" if error.ranks else ""
        raise ValueError(
            f"A rank must belong to the process_group it synchronises over; got rank {error.rank} outside of it"
            f"{ranks}. Give each rank the group that contains it, as syncbn.new_group does; "
            "dist.new_group returns a usable group to its members only."
        ) from None
    except groups.Destroyed as error:
        of = f"of ranks {list(error.ranks)}" if error.ranks else "of unknown ranks"
        raise ValueError(
            f"A process_group to synchronise over must exist; got one {of} that dist.destroy_process_group has ended. "
            "Give each layer a new one, layer.process_group = syncbn.new_group(...), or None for the default group."
        ) from None
    if group is not None and not torch.compiler.is_compiling() and groups.is_joining():
        raise RuntimeError(
            "DistributedDataParallel.join() stands in for a rank that has run dry in DDP's own collectives only, and a "
            "synchronized layer would wait for it; got a training call of one within join(). "
            "Leave join() away and wrap the loader, syncbn.EvenLoader(loader), which gives such a rank empty batches."
        )
    return group


def check_symbolic(argument: object) -> None:
    """No process group: torch.fx can write none into a graph."""
    if isinstance(argument, groups.Group):
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
