"""torch.fx, which writes down calls: a layer is one node to it.

To torch.fx a layer is a call_module node and a call of the function a call_function node, as torch's own are.
Its passes know torch's classes only: call fusion and prepare_qat_fx within syncbn.plain, torch.jit.script, too. What
prepare_qat_fx makes of ordinary layers can be converted afterwards. What folds a layer by its attributes, as
fuse_conv_bn_eval does, does not see its fused activation; what counts operations in a trace of training (fvcore) sees
plain ones in the place of a batch norm.
"""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch.fx import Proxy, Tracer

from syncbn import checks, torch_private


class Leaf:
    """For a module that symbolic tracing must not look into, whatever the tracer calls a leaf.

    torch.fx runs a module that is no leaf by its name while it traces, hooks included, and would do so again in the
    graph; here the call is written down before anything of it has run.
    """

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        if torch_private.is_fx_tracing():
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
