"""Whether a call of a module runs what its class says, and whether anybody listens to it."""

from torch import nn

from syncbn import torch_private
from syncbn.torch_private import OWN_CALL


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
    return torch_private.has_hooks(module) or own_call(module) is not None
