"""Tracers that write down calls: to torch.fx a layer is one node, and torch.jit is told of no check.

To torch.fx a layer is a call_module node and a call of the function a call_function node, as torch's own are.
To torch.jit a call is the operations that composed.py makes of it, and its sizes are tensors while it traces.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Proxy, Tracer


class Leaf:
    """For a module that symbolic tracing must not look into, whatever the tracer calls a leaf.

    torch.fx runs a module that is no leaf by its name while it traces, hooks included, and would do so again in the
    graph; here the call is written down before anything of it has run.
    """

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        for each in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(each, Proxy) and isinstance(each.tracer, Tracer):
                path = each.tracer.path_of_module(self)  # type: ignore[arg-type]  # a module
                return each.tracer.create_proxy("call_module", path, args, kwargs)
        return super()._call_impl(*args, **kwargs)  # type: ignore[misc]  # of nn.Module


def call_function(function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> Any:
    """The node of a call whose first argument is symbolic."""
    return args[0].tracer.create_proxy("call_function", function, args, kwargs)


def untraced(check: Callable[..., None], *given: Any) -> None:
    """check(*given) on numbers: to compare a size that is traced would warn that the graph does not compare it."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]  # not in its stubs, as below
    try:
        check(*given)
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]
