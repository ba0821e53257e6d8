"""Tracers that write down calls: to torch.fx a layer is one node, and torch.jit is told of no check.

To torch.fx a layer is a call_module node and a call of the function a call_function node, as torch's own are.
To torch.jit a call is the operations that composed.py makes of it, and its sizes are tensors while it traces.
"""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch.fx import Proxy, Tracer
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from syncbn import checks


class Leaf:
    """For a module that symbolic tracing must not look into, whatever the tracer calls a leaf.

    torch.fx runs a module that is no leaf by its name while it traces, hooks included, and would do so again in the
    graph; here the call is written down before anything of it has run.
    """

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        if is_fx_symbolic_tracing():
            tracer = _tracer_of_call(sys._getframe(1))
            if tracer is not None:
                path = tracer.path_of_module(self)  # type: ignore[arg-type]  # a module
                return tracer.create_proxy("call_module", path, args, kwargs)
        return super()._call_impl(*args, **kwargs)  # type: ignore[misc]  # of nn.Module


def _tracer_of_call(frame: FrameType | None) -> Tracer | None:
    """Whose call_module is calling, from this frame of the Python stack outwards.

    None if it traces operations, or runs a module for a shape while it writes the node of one down.
    """
    from torch.fx.experimental.proxy_tensor import PythonKeyTracer

    while frame is not None and frame.f_code is not Leaf._call_impl.__code__:
        tracer = frame.f_locals.get("self") if frame.f_code.co_name == "call_module" else None
        if isinstance(tracer, Tracer):
            return None if isinstance(tracer, PythonKeyTracer) else tracer
        frame = frame.f_back
    return None


def call_function(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The node of this call, if one of its arguments is symbolic; None if it is an ordinary one."""
    given = (*args, *kwargs.values())
    symbols = [each for each in given if isinstance(each, Proxy)]
    if not symbols:
        return None
    for each in given:
        checks.check_symbolic(each)
    return symbols[0].tracer.create_proxy("call_function", function, args, kwargs)


def untraced(check: Callable[..., None], *given: Any) -> None:
    """check(*given) on numbers: to compare a size that is traced would warn that the graph does not compare it."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]  # not in its stubs, as below
    try:
        check(*given)
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]
