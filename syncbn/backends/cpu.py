"""The four verbs by the C library: one pass over the activations each, sums in float64, the same bits with any threads.

Here tensors become what the library reads: activations without gaps, as planes (N, C, S) or as rows (M, C) with the
channels innermost, all of one dtype; the channels' vectors without gaps.
"""

from typing import Any

import torch
from torch import Tensor

from syncbn.backends.cpu_library import (
    DTYPES,
    NO_MOMENTUM,
    Alike,
    Own,
    address,
    address_like,
    is_dense,
    pack_alike,
    pack_own,
    verb,
)
from syncbn.formulas import ACTIVATIONS, LEAKY_SLOPE, MOST, PLAIN, Epilogue, Running, compute_dtype

_FLOAT64 = (torch.float64,)


def batch_sums(x: Tensor, mask: Tensor | None, tag: float = 0.0) -> Tensor:
    """[Σx (C), Σx² (C), count, fingerprint (2)]"""
    given = _Given(x, Epilogue(mask=mask))
    sums = torch.empty(2 * given.channels + 3, dtype=torch.float64)
    given.call("batch_sums", tag=tag, sums=sums.data_ptr())
    return sums


def normalize(
    x: Tensor, sums: Tensor, epilogue: Epilogue, eps: float, running: Running | None, tag: float = 0.0, turn: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """y = activation((x − mean)·invstd·weight + bias + residual)"""
    given, wide = _Given(x, epilogue), compute_dtype(x.dtype)
    y = torch.empty_like(given.x)
    mean, invstd = torch.empty(given.channels, dtype=wide), torch.empty(given.channels, dtype=wide)
    written = None if running is None else given.move(running)
    sums_at = address("sums", sums, 2 * given.channels + 3, _FLOAT64)
    given.call("normalize", sums=sums_at, mean=mean.data_ptr(), invstd=invstd.data_ptr(), y=y.data_ptr(), eps=eps)
    if running is not None and written is not None:
        for buffer, moved in zip(running[:3], written, strict=True):
            if moved is not buffer and buffer is not None:
                buffer.copy_(moved)  # type: ignore[arg-type]  # there is one for each
    return given.as_original(y), mean, invstd


def grad_sums(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, epilogue: Epilogue, tag: float = 0.0
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[Σdz (C), Σdz·x̂ (C), fingerprint (2)], dweight, dbias"""
    given = _Given(x, epilogue, dy, mean, invstd)
    dsums = torch.empty(2 * given.channels + 2, dtype=torch.float64)
    grads = [None if t is None else torch.empty(given.channels, dtype=t.dtype) for t in epilogue[:2]]
    dweight_at, dbias_at = (0 if t is None else t.data_ptr() for t in grads)
    given.call("grad_sums", tag=tag, dsums=dsums.data_ptr(), dweight=dweight_at, dbias=dbias_at)
    return dsums, grads[0], grads[1]


def grad_input(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    epilogue: Epilogue,
    dsums: Tensor | None,
    count: Tensor,
    needs_dresidual: bool,
    tag: float = 0.0,
    turn: int = 0,
) -> tuple[Tensor | None, Tensor | None]:
    """dx = (dz − Σdz/count − (x − mean)·slope)·invstd·weight, slope = invstd·Σdz·x̂/count; dresidual = dz"""
    given = _Given(x, epilogue, dy, mean, invstd)
    dx = dresidual = None
    if dsums is not None:
        dx = torch.empty_like(given.x)
        given.own["dsums"] = address("dsums", dsums, 2 * given.channels + 2, _FLOAT64)
        given.own |= {"counted": address("count", count, 1, _FLOAT64), "dx": dx.data_ptr()}
    if needs_dresidual:
        dresidual = torch.empty_like(given.x)
        given.own["dresidual"] = dresidual.data_ptr()
    given.call("grad_input")
    return None if dx is None else given.as_original(dx), None if dresidual is None else given.as_original(dresidual)


def alike(x: Tensor, epilogue: Epilogue, running: Running | None) -> Alike:
    """What calls with tensors like these share; x is readable."""
    (samples, channels), positions = x.shape[:2], x.numel() // x.shape[1]
    rows = is_rows(x)
    first, pixels = (positions, 1) if rows else (samples, positions // max(1, samples))
    vectors = (*epilogue[:2], *(running or (None, None))[:2])
    weight, bias, mean, var = (0 if t is None else DTYPES[t.dtype] for t in vectors)
    most = min(MOST[running.mean.dtype], MOST[running.var.dtype]) if running and running.skip_nonfinite else 0.0
    codes = DTYPES[x.dtype], ACTIVATIONS.index(epilogue.activation)
    return Alike(rows, first, channels, pixels, *codes, LEAKY_SLOPE, weight, bias, mean, var, most)


class _Given:
    """What a call is given, as the library reads it; what had to be copied for that lives as long as this.

    All activations lie in memory as x does and are of its dtype or, if their dtypes differ, of the one computed in.
    """

    def __init__(
        self,
        x: Tensor,
        epilogue: Epilogue,
        dy: Tensor | None = None,
        mean: Tensor | None = None,
        invstd: Tensor | None = None,
    ) -> None:
        self.original, self.epilogue, self.channels = x, epilogue, x.shape[1]
        self.running: Running | None = None
        weight, bias, residual, mask, _ = epilogue
        dtype = x.dtype
        if (residual is not None and residual.dtype != dtype) or (dy is not None and dy.dtype != dtype):
            dtype = compute_dtype(dtype)
        self.x = x = _readable(x, x, dtype)
        self.own: dict[str, Any] = {"x": address_like("input", x, x, is_rows(x))}
        self.copies: list[Tensor] = []
        for name, t in (("residual", residual), ("dy", dy)):
            if t is not None:
                self.own[name] = address_like(name, self._kept(_readable(t, x, dtype)), x, is_rows(x))
        if mask is not None:
            flat = self._kept(_side_by_side(mask))
            self.own["mask"] = address("mask", flat, x.numel() // self.channels, (torch.bool,))
        for name, t in (("weight", weight), ("bias", bias)):
            if t is not None:
                self.own[name] = address(name, self._kept(_side_by_side(t)), self.channels)
        if mean is not None and invstd is not None:
            wide = (compute_dtype(dtype),)
            self.own["mean"] = address("mean", mean, self.channels, wide)
            self.own["invstd"] = address("invstd", invstd, self.channels, wide)

    def move(self, running: Running) -> list[Tensor | None]:
        """Have the running statistics moved, by the library itself or in the copies that this gives."""
        self.running = running
        mean, var, counter, momentum, _ = running
        counter = None if counter is None else _side_by_side(counter.to(torch.int64))
        written = [_side_by_side(mean), _side_by_side(var), counter]
        self.own["running_mean"] = address("running_mean", written[0], self.channels)
        self.own["running_var"] = address("running_var", written[1], self.channels)
        self.own["counter"] = address("num_batches_tracked", counter, 1, (torch.int64,))
        self.own["momentum"] = NO_MOMENTUM if momentum is None else momentum
        return written

    def call(self, name: str, **own: Any) -> None:
        shared = pack_alike(*alike(self.x, self.epilogue, self.running))
        verb(name)(shared + pack_own(*Own(torch.get_num_threads(), **self.own, **own)))

    def as_original(self, t: Tensor) -> Tensor:
        """A result that lies as self.x does, in the dtype and memory format of the input as it was given."""
        if self.x is self.original:
            return t
        like = torch.empty_like(self.original)
        return t if t.dtype == like.dtype and t.stride() == like.stride() else like.copy_(t)

    def _kept(self, t: Tensor) -> Tensor:
        self.copies.append(t)
        return t


def is_rows(x: Tensor) -> bool:
    """Whether the channels are innermost in memory, or may as well be."""
    if x.ndim == 2:
        return True
    return x.numel() == x.shape[0] * x.shape[1] if x.is_contiguous() else x.stride(1) == 1


def is_readable(t: Tensor, x: Tensor) -> bool:
    """Whether the library can read an activation as it lies, along with x."""
    return is_dense(t, is_rows(x)) and not t.data_ptr() % t.itemsize


def is_side_by_side(t: Tensor) -> bool:
    """Whether the library can read and write a vector as it lies."""
    return type(t) in PLAIN and t.is_contiguous() and not t.is_neg() and not t.data_ptr() % t.itemsize


def _readable(t: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """t itself, or a copy."""
    t = t.to(dtype)
    if is_readable(t, x):
        return t
    t = t.movedim(1, -1).contiguous().movedim(-1, 1) if is_rows(x) else t.contiguous()
    return t.clone() if t.data_ptr() % t.itemsize else t


def _side_by_side(t: Tensor) -> Tensor:
    """t itself, or a copy."""
    return t if is_side_by_side(t) else torch.empty(t.shape, dtype=t.dtype).copy_(t)
