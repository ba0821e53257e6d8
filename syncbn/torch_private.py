"""Everything of torch that has no public name, as questions with an answer for a torch that has renamed it.

Each is looked up once, as syncbn is imported. Where one is missing, its stand-in gives the safe answer: the slower way,
or an error in words, never other numbers without a word. One warning then names torch's version and says what is lost.
"""

import contextlib
import pkgutil
import warnings
from collections.abc import Callable
from types import CodeType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd import forward_ad

if TYPE_CHECKING:
    from torch.nn.modules import batchnorm, instancenorm

    BatchNormBase = batchnorm._BatchNorm
    NormBase = batchnorm._NormBase
    InstanceNormBase = instancenorm._InstanceNorm
else:
    BatchNormBase = nn.BatchNorm1d.__base__
    NormBase = BatchNormBase.__base__
    InstanceNormBase = nn.InstanceNorm1d.__base__

T = TypeVar("T")
_missing: list[str] = []


def _torchs(name: str, stand_in: T, lost: str) -> T:
    """What torch has by this name, module:attribute, or the stand-in, without which this much is lost."""
    try:
        return pkgutil.resolve_name(name)  # type: ignore[no-any-return]  # torch has no types for most of these
    except (ImportError, AttributeError):
        _missing.append(f"{name.replace(':', '.')} ({lost})")
        return stand_in


def _always(answer: T) -> Callable[..., T]:
    return lambda *_: answer


def _needed(name: str, lost: str) -> Callable[..., Any]:
    """`_torchs`, for what cannot be done without it."""

    def refuse(*_: object) -> Any:
        raise RuntimeError(
            f"This needs {name.replace(':', '.')}, which torch {torch.__version__} does not have; got a call in a "
            "graph or transform that leads there. Use a version of torch that syncbn's README lists, or call outside."
        )

    return _torchs(name, refuse, lost)


# --- Is a graph being written?

_FX = "torch.fx looks into layers, or refuses them"
is_fx_tracing = _torchs("torch.fx._symbolic_trace:is_fx_symbolic_tracing", _always(False), _FX)
_JIT = "torch.jit.trace warns that checks are not traced"
_is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]  # not in its stubs
_tracing_state: Callable[[], Any] = _torchs("torch._C:_get_tracing_state", lambda: _is_tracing() or None, _JIT)
_set_tracing_state = _torchs("torch._C:_set_tracing_state", _always(None), _JIT)
COMPILER = "torch._dynamo"
"""Loaded if anything can be compiled in this process."""
_GRAPHS = "compiled checkpointed regions sum again when they are recomputed"
_proxy_mode: Any = _torchs("torch._C:_TorchDispatchModeKey.PROXY", None, _GRAPHS)
_dispatch_mode: Callable[[Any], Any] = _torchs("torch._C:_get_dispatch_mode", _always(None), _GRAPHS)
_traced_stack: Callable[[], Any] = _torchs("torch._guards:TracingContext.extract_stack", tuple, _GRAPHS)


def is_jit_tracing() -> bool:
    """Whether torch.jit.trace is writing this call down."""
    return _tracing_state() is not None


def untraced(function: Callable[..., T], *given: Any) -> T:
    """function(*given) on numbers: to compare a size that is traced would warn that the graph does not compare it."""
    state = _tracing_state()
    if state is True:  # the stand-in's, which cannot be put back
        return function(*given)
    _set_tracing_state(None)
    try:
        return function(*given)
    finally:
        _set_tracing_state(state)


def graph_nodes() -> Any:
    """Of the graph that operations are being written to; empty if there is none."""
    mode = None if _proxy_mode is None else _dispatch_mode(_proxy_mode)
    return () if mode is None else mode.tracer.graph.nodes


def traced_lines() -> list[str]:
    """Where the call stands that torch.compile is writing to a graph, from the outermost frame; empty if unknown."""
    return [f"{f.filename}:{f.lineno}:{getattr(f, 'colno', '')}" for f in _traced_stack()]


def constant_when_compiled(function: T) -> T:
    """torch.compiler.assume_constant_result, which would load the compiler: it calls the function as it traces."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a function
    return function


# --- What stands behind this tensor?


def _has_address(t: Tensor) -> bool:
    with contextlib.suppress(NotImplementedError, RuntimeError):
        return t.data_ptr() >= 0
    return False


_SLOWER = "small calls take some microseconds longer"
_FUNC = "calls in torch.func transforms take the slower way, or are refused"
_VMAP = "a misuse of torch.vmap is told by torch, not in our words"
_MANY = "batched gradients are refused"
has_storage = _torchs("torch._C:_has_storage", _has_address, _SLOWER)
are_transforms_active = _torchs("torch._C:_are_functorch_transforms_active", _always(True), f"{_SLOWER}; {_FUNC}")
_is_wrapped: Callable[[Tensor], bool] = _torchs("torch._C._functorch:is_functorch_wrapped_tensor", _always(True), _FUNC)
_is_batched: Callable[[Tensor], bool] = _torchs("torch._C._functorch:is_batchedtensor", _always(False), _VMAP)
_unwrapped: Callable[[Tensor], Tensor | None] = _torchs("torch._C._functorch:get_unwrapped", _always(None), _VMAP)
_CLEAR = "torch._functorch.pyfunctorch:temporarily_clear_interpreter_stack"
unmapped: Callable[[], contextlib.AbstractContextManager[Any]] = _torchs(_CLEAR, contextlib.nullcontext, _FUNC)
"""Within it, no transform of torch.func is in force: for a call of whose tensors it transforms none, such as one that
is recomputed for a backward which is mapped over; in its first pass there was no transform."""
_dispatch_keys: Callable[[Tensor], Any] | None = _torchs("torch._C:_dispatch_keys", None, _MANY)
remove_batch_dim = _needed("torch:_remove_batch_dim", _MANY)
add_batch_dim = _needed("torch:_add_batch_dim", _MANY)
_unpack_dual: Any = forward_ad.unpack_dual
_has_ad_level = _torchs("torch.autograd.forward_ad:_current_level", None, _SLOWER) is not None


def is_any_wrapped(*given: Tensor | None) -> bool:
    """Whether torch.func, whose transforms are active, transforms any of these tensors."""
    return any(t is not None and _is_wrapped(t) for t in given)


def is_mapped(t: Tensor | None) -> bool:
    """By torch.vmap, at any level of torch.func's transforms."""
    with contextlib.suppress(RuntimeError):  # of what is not known to be wrapped, and is not
        while t is not None and are_transforms_active() and _is_wrapped(t):
            if _is_batched(t):
                return True
            t = _unwrapped(t)
    return False


def is_batch_of_gradients(t: Tensor) -> bool:
    """Whether autograd's is_grads_batched maps over it, whose map is older than torch.vmap's."""
    return _dispatch_keys is not None and bool(_dispatch_keys(t).has("Batched"))


def is_forward_ad_on(*given: Tensor | None) -> bool:
    """Whether forward-mode AD is in force or, where that cannot be asked, one of these is dual."""
    if _has_ad_level:
        return forward_ad._current_level >= 0
    return any(t is not None and _unpack_dual(t).tangent is not None for t in given)


# --- Which backward is running, and which checkpointed regions are open?

backward_id = _torchs("torch._C:_current_graph_task_id", _always(-1), "reentrant regions sum again when recomputed")
"""Of the backward pass that is running; -1 if none is."""
_REGIONS = f"non-reentrant checkpointed regions sum again when they are recomputed; {_SLOWER}"
top_hooks: Any = _torchs("torch._C._autograd:_top_saved_tensors_default_hooks", None, _REGIONS)
"""The innermost hooks on saved tensors, pack and unpack, of whatever is in force; None if there are none."""
pop_hooks: Any = _torchs("torch._C._autograd:_pop_saved_tensors_default_hooks", None, _REGIONS)
push_hooks: Any = _torchs("torch._C._autograd:_push_saved_tensors_default_hooks", None, _REGIONS)
_MODES = "selective checkpointing may refuse a recomputation"
count_modes = _torchs("torch._C:_len_torch_dispatch_stack", _always(0), _MODES)
modes: Any = _torchs("torch.utils._python_dispatch:_get_current_dispatch_mode_stack", list, _MODES)
"""What hears of every operation; what a mode itself does is not heard by it."""
pop_mode: Any = _torchs("torch.utils._python_dispatch:_pop_mode", None, _MODES)
push_mode: Any = _torchs("torch.utils._python_dispatch:_push_mode", None, _MODES)
_SELECTIVE = "_CachingTorchDispatchMode", "_CachedTorchDispatchMode"
selective_modes = tuple(_torchs(f"torch.utils.checkpoint:{name}", type(None), _MODES) for name in _SELECTIVE)


def checkpoint_of(pack: Any) -> tuple[Any, Any] | None:
    """The frame of the non-reentrant checkpoint that this hook is of; and, if of a recomputation, what tells that from
    the frame's others, else None.
    """
    function = getattr(pack, "_torchdynamo_orig_callable", pack)
    code = getattr(function, "__code__", None)
    if code is None or code.co_filename != torch.utils.checkpoint.__file__:
        return None
    behind = dict(zip(code.co_freevars, (c.cell_contents for c in function.__closure__ or ()), strict=True))
    if "frame" in behind:
        return behind["frame"], None
    return (behind["target_frame_ref"](), pack) if "target_frame_ref" in behind else None


def _knows(setter: str, variable: str) -> bool:
    """Whether the hooks that this sets have such a variable."""
    made_by = getattr(getattr(torch.utils.checkpoint, setter, None), "__init__", None)
    inner = [c for c in getattr(made_by, "__code__", _knows.__code__).co_consts if isinstance(c, CodeType)]
    return any(variable in code.co_freevars for code in inner)


_missing += [
    f"torch.utils.checkpoint.{setter}, {variable} ({_REGIONS})"
    for setter, variable in (("_checkpoint_hook", "frame"), ("_recomputation_hook", "target_frame_ref"))
    if not _knows(setter, variable)
]
can_see_hooks = None not in (top_hooks, pop_hooks, push_hooks)
if not can_see_hooks:
    top_hooks = _always(None)
if None in (pop_mode, push_mode) or type(None) in selective_modes:
    count_modes = _always(0)

# --- Does anybody listen?

_HEARD = "activations of timm's layers are not fused"
_has_global_hook = _torchs("torch.nn.modules.module:_has_any_global_hook", _always(True), _HEARD)
_count_function_modes = _torchs("torch._C:_len_torch_function_stack", _always(1), _HEARD)
_function_modes = _torchs("torch.overrides:_get_current_function_mode_stack", _always([_missing]), _HEARD)
_places_tensors: Any = _torchs("torch.utils._device:DeviceContext", None, _HEARD)
is_profiled = _torchs("torch._C._autograd:_profiler_enabled", _always(False), "layers have no labels in profiles")
"""Whether torch.profiler or emit_nvtx records what this thread does."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_of_module = {_HEARD: _HOOKS, "swapping compiled modules is not refused": ["_compiled_call_impl"]}
_bare = nn.Module()
_missing += [f"Module.{n} ({lost})" for lost, names in _of_module.items() for n in names if not hasattr(_bare, n)]
OWN_CALL = frozenset({"forward", "__call__", "_call_impl", "_slow_forward"})
"""What decides what a call of a module runs, if it is set on the object instead of its class."""


def has_hooks(module: nn.Module) -> bool:
    """Whether there are any on this module, or its call is compiled; true where that cannot be told."""
    return any(getattr(module, name, True) for name in _HOOKS) or is_call_compiled(module)


def is_call_compiled(module: nn.Module) -> bool:
    """By module.compile()."""
    return getattr(module, "_compiled_call_impl", None) is not None


def is_everything_heard() -> bool:
    """Whether there are hooks on all modules, or modes that hear of every function and do more than place tensors."""
    if _has_global_hook() or not _count_function_modes():
        return _has_global_hook()
    return any(type(mode) is not _places_tensors for mode in _function_modes())


# --- What do a module, a wrapper, a device, a process group hold?

WRAPPED = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
"""What torch's wrappers call the module that they wrap; a parallel wrapper calls it `module`."""
_COMPOSED = "compiled and traced calls with peers are refused"
all_reduce: Callable[[Tensor, str, str], Tensor] = _needed("torch:ops._c10d_functional.all_reduce", _COMPOSED)
wait_tensor: Callable[[Tensor], Tensor] = _needed("torch:ops._c10d_functional.wait_tensor", _COMPOSED)
can_trace_sums = not any(_COMPOSED in each for each in _missing)
default_store = _needed("torch.distributed.distributed_c10d:_get_default_store", "hangs are reported by one rank alone")
_JOIN = "a call within DistributedDataParallel.join() is not refused, and layers may have numbers for names"
_torchs("torch.nn.parallel:DistributedDataParallel._active_ddp_module", None, _JOIN)
current_cuda_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
raw_cuda_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
"""By which torch's own code generators ask for the stream of a device; a CPU build has neither."""


def own_parts(module: nn.Module) -> tuple[Any, Any, Any]:
    """Parameters, buffers and modules by name: Module.__getattr__ takes ten times as long for each."""
    return module._parameters, module._buffers, module._modules


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that torch.compile was given."""
    return getattr(module, "_orig_mod", module)


def active_ddp(cls: type) -> Any:
    """The DistributedDataParallel whose forward is running."""
    return getattr(cls, "_active_ddp_module", None)


def is_joining(ddp: Any) -> bool:
    """Whether `join()` of this DistributedDataParallel is in force."""
    return bool(getattr(getattr(ddp, "_join_config", None), "enable", False))


def collectives_started(group: Any) -> int:
    """On a process group by this rank, of all kinds; 0 if its transport does not count."""
    with contextlib.suppress(AttributeError, RuntimeError):
        return int(group._get_sequence_number_for_group())
    return 0


if _missing:
    warnings.warn(
        f"torch {torch.__version__} is not a version that syncbn knows; it lacks {'; '.join(_missing)}. "
        "Numbers are right all the same, or a call is refused.",
        RuntimeWarning,
        stacklevel=2,
    )
