"""Whether a call of a module runs what its class says, and whether anybody listens to it."""

import torch
from torch import nn, overrides
from torch.nn.modules import module as torch_module
from torch.utils._device import DeviceContext

OWN_CALL = frozenset({"forward", "__call__", "_call_impl", "_slow_forward"})
"""What decides what a call runs, if it is set on the object instead of its class."""


def own_call(module: nn.Module) -> str | None:
    """The first of these that is the object's own."""
    found = OWN_CALL.intersection(module.__dict__)
    return min((name for name in found if is_own(module, name)), default=None) if found else None


def is_own(module: nn.Module, name: str) -> bool:
    """Whether this was set on the object, as wrappers and patches do, and is not but its class's."""
    own = module.__dict__.get(name)
    is_bound = own is not None and getattr(own, "__func__", None) is getattr(type(module), name, own)
    return own is not None and not (is_bound and own.__self__ is module)


def forget_bound(module: nn.Module) -> None:
    """Remove from the object what is but its class's, as hooks leave it when they are taken off."""
    for name in (*OWN_CALL, "train"):
        if name in module.__dict__ and not is_own(module, name):
            del module.__dict__[name]


def is_watched(module: nn.Module | None) -> bool:
    """Whether there are hooks on it, or a call that is its own or compiled."""
    if module is None:
        return False
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or module._compiled_call_impl is not None or own_call(module) is not None


def is_any_watched() -> bool:
    """Whether there are hooks on all modules, or modes that hear of every function and do more than place tensors."""
    hooked: bool = torch_module._has_any_global_hook()  # type: ignore[no-untyped-call]  # torch's own, as below
    if hooked or not torch._C._len_torch_function_stack():
        return hooked
    modes = overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return any(type(mode) is not DeviceContext for mode in modes)
