"""Whether a call of a module runs what its class says, and whether anybody listens to it."""

import torch
from torch import nn, overrides
from torch.nn.modules import module as torch_module
from torch.utils._device import DeviceContext

OWN_CALL = frozenset({"forward", "__call__", "_call_impl", "_slow_forward", "normalize"})
"""What decides what a call runs, if it is set on the object instead of its class."""


def own_call(module: nn.Module) -> str | None:
    """The first of these that was set on the object, as wrappers and patches do."""
    return min(OWN_CALL.intersection(module.__dict__), default=None)


def is_watched(module: nn.Module | None) -> bool:
    """Whether there are hooks on it, or a call that is its own or compiled."""
    if module is None:
        return False
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or module._compiled_call_impl is not None or not OWN_CALL.isdisjoint(module.__dict__)


def is_any_watched() -> bool:
    """Whether there are hooks on all modules, or modes that hear of every function and do more than place tensors."""
    hooked: bool = torch_module._has_any_global_hook()  # type: ignore[no-untyped-call]  # torch's own, as below
    if hooked or not torch._C._len_torch_function_stack():
        return hooked
    modes = overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return any(type(mode) is not DeviceContext for mode in modes)
