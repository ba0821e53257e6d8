"""What stands between a verb and its kernel: the plan of a call, and the launch itself."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn.backends import gpu_tiles as tiles
from syncbn.backends.gpu_efforts import effort_of

MOST_PLANS = 1024
"""Plans kept, the oldest dropped first; what Triton compiled does not depend on sizes and is not dropped."""

SMS_WITHOUT_DEVICE = 132

Pointers = tuple[Tensor | None, ...]


class Kernel:
    """A Triton kernel with its constants, for arguments of one set of dtypes, integers and missing pointers.

    Triton compiles it for every pattern of which activations are 16-byte aligned; no other pointer's alignment counts.
    No fusion into fma but where a kernel says so: forward and backward must round z alike.
    """

    def __init__(self, function: Any, constants: dict[str, Any], warps: int) -> None:
        self.function = function
        self.constants = {name: constants[name] for name in function.arg_names if name in constants}
        self.options = {"num_warps": warps, "enable_fp_fusion": False}
        self.aligned = [at for at, p in enumerate(getattr(function, "params", ())) if _is_specialised_on_alignment(p)]
        self.all_aligned = (2 << len(self.aligned)) - 1
        self.compiled: dict[int, Any] = {}


def launch(kernel: Kernel, grid: int, pointers: Pointers, numbers: tuple[float, ...]) -> None:
    """Run the kernel on the current stream, the readable way; what was compiled is kept, for the direct one too."""
    aligned = 1
    for at in kernel.aligned:
        pointer = pointers[at]
        aligned = aligned << 1 | (pointer is None or pointer.data_ptr() % 16 == 0)
    compiled = kernel.compiled.get(aligned)
    if compiled is not None:
        compiled[grid, 1, 1](*pointers, *numbers, *kernel.constants.values())
        return
    compiled = kernel.function[grid, 1, 1](*pointers, *numbers, **kernel.constants, **kernel.options)
    if hasattr(compiled, "packed_metadata"):  # a compiled kernel; the interpreter returns nothing
        kernel.compiled[aligned] = compiled


def _is_specialised_on_alignment(parameter: Any) -> bool:
    is_pointer = parameter.name.endswith("_ptr")
    return is_pointer and not (parameter.is_constexpr or parameter.do_not_specialize_on_alignment)


class Plan(NamedTuple):
    """How one call runs, or, where copies has a name in it, which tensors must be made contiguous first.

    partials and semaphores are the sizes of what combine needs, 0 for a verb without sums.
    """

    kernel: Kernel
    grid: int
    integers: tuple[int, ...]
    partials: int
    semaphores: int
    copies: tuple[str, ...] = ()


def make_plan(function: Any, tensors: dict[str, Tensor | None], constants: dict[str, Any]) -> Plan:
    """The plan for x and what goes with it: y (or dx), dy and residual of x's shape, mask of x's without channels."""
    x, mask = tensors["x"], tensors["mask"]
    assert x is not None, "every verb has an x"
    views: dict[str, tiles.Strides] = {}
    copies = []
    given = {name: t for name, t in tensors.items() if t is not None}
    for name, t in given.items():
        strides = (t.stride(0), 0, *t.stride()[1:]) if name == "mask" else t.stride()
        view = tiles.collapse(x.shape, strides)
        if view is None:
            copies.append(name)
        else:
            views[name] = view
    if copies:
        return Plan(Kernel(function, {}, 0), 0, (), 0, 0, tuple(copies))
    samples, channels, *spatial = x.shape
    pixels = torch.Size(spatial).numel()
    dense = [views[name] for name in given if name != "mask"]
    itemsize = min(given[name].element_size() for name in given if name != "mask")
    if mask is None and tiles.are_small_planes(samples, channels, pixels, dense, itemsize):
        shape = tiles.Shape(1, channels * pixels, samples, samples * pixels, plane=pixels)
        views = {name: tiles.Strides(0, 1, view.outer) for name, view in views.items()}
        return _plan_of(function, tensors, views, shape, constants)
    outer, inner, merged = tiles.merge(samples, pixels, [views[name] for name in given])
    views = dict(zip(given, merged, strict=True))
    shape = tiles.Shape(outer, channels, inner, samples * pixels)
    dense = [views[name] for name in given if name != "mask"]
    fold = 0 if mask is not None else tiles.fold_factor(channels, samples * pixels, dense)
    if fold:
        shape = tiles.Shape(1, channels * fold, -(-inner // fold), samples * pixels, fold=channels)
        views = {name: tiles.Strides(0, 1, channels * fold) for name in given}
    return _plan_of(function, tensors, views, shape, constants)


def _plan_of(
    function: Any,
    tensors: dict[str, Tensor | None],
    views: dict[str, tiles.Strides],
    shape: tiles.Shape,
    constants: dict[str, Any],
) -> Plan:
    x = tensors["x"]
    assert x is not None, "every verb has an x"
    kinds = {name: tiles.kind_of(view, shape.columns, shape.inner) for name, view in views.items() if name != "mask"}
    itemsize = min(t.element_size() for name, t in tensors.items() if t is not None and name != "mask")
    kind = kinds["x"]
    align = tiles.alignment(shape, kind, list(kinds.values()), [views[name] for name in kinds], itemsize)
    light = tensors["mask"] is not None or align * itemsize < 16 or shape.fold > 0
    verb, sms = function.__name__.removesuffix("_kernel"), sms_of(x.device)
    layout, with_residual = "small planes" if shape.plane else kind, tensors.get("residual") is not None
    effort = effort_of(verb, layout, shape.columns, x.numel() * x.element_size(), sms, with_residual)
    tile = tiles.choose(shape, kind, x.element_size(), sms, effort, light)
    names = {"x": "KIND", "y": "KIND_Y", "dy": "KIND_DY", "residual": "KIND_R"}
    geometry: dict[str, Any] = {names[name]: kinds.get(name, "strided") for name in tensors if name != "mask"}
    geometry |= {"ALIGN": align, "FOLD": shape.fold, "PLANE": shape.plane, "MERGED": shape.outer == 1}
    geometry |= {"EVEN": tiles.is_even(shape, tile)}
    geometry |= {"WIDE": tiles.is_wide(shape, tile, list(views.values())), "GROUP": tile.group}
    geometry |= {"BLOCK_C": tile.block_c, "BLOCK_I": tile.block_i, "STAGES": tile.stages}
    partials = semaphores = 0
    if "y" not in tensors:
        sums = tiles.combination(shape, tile, light)
        geometry |= {"BLOCK_K": sums.block_k, "BLOCK_P": sums.block_p, "TEAM": sums.team, "BLOCK_S": sums.block_s}
        partials, semaphores = sums.partials, sums.semaphores
    kernel = Kernel(function, constants | geometry, tile.warps)
    integers = _integers(tensors, views, kinds, shape, align)
    return Plan(kernel, tile.programs, integers, partials, semaphores)


def _integers(
    tensors: dict[str, Tensor | None],
    views: dict[str, tiles.Strides],
    kinds: dict[str, str],
    shape: tiles.Shape,
    align: int,
) -> tuple[int, ...]:
    """Sizes and strides in the kernels' order, divided by what the compiler is to know that divides them."""
    integers = [
        shape.outer,
        shape.inner // align if kinds["x"] == "planes" else shape.inner,
        shape.columns // align if kinds["x"] == "rows" else shape.columns,
        shape.positions // align if shape.fold else shape.positions,
    ]
    for name in tensors:
        view = views.get(name, tiles.Strides(0, 0, 0))
        unit = 1 if kinds.get(name, "strided") == "strided" else align
        strides = (view.outer // unit, view.inner // unit)
        integers += strides if name == "mask" else (strides[0], view.channel // unit, strides[1])
    return tuple(integers)


def sms_of(device: torch.device) -> int:
    """Streaming multiprocessors of the device; those of an H200 where there is none."""
    if device.type != "cuda":
        return SMS_WITHOUT_DEVICE
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
