"""The four verbs by the C library: one pass over the activations each, sums in float64, the same bits with any threads.

Here tensors become what the library reads: activations without gaps, as planes (N, C, S) or as rows (M, C) with the
channels innermost, all of one dtype; the channels' vectors without gaps.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from syncbn.backends import ACTIVATIONS, LEAKY_SLOPE, Epilogue, Running, compute_dtype
from syncbn.backends.cpu_library import DTYPES, NO_MOMENTUM, Call, address, address_like, call, is_dense
from syncbn.backends.reference import MOST

_ORDINARY = (Tensor, torch.nn.Parameter)
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
    moving = None if running is None else _Moving(given, running)
    sums_at = address("sums", sums, 2 * given.channels + 3, _FLOAT64)
    given.call("normalize", sums=sums_at, mean=mean.data_ptr(), invstd=invstd.data_ptr(), y=y.data_ptr(), eps=eps)
    if moving is not None:
        moving.finish()
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
        given.fields["dsums"] = address("dsums", dsums, 2 * given.channels + 2, _FLOAT64)
        given.fields |= {"count": address("count", count, 1, _FLOAT64), "dx": dx.data_ptr()}
    if needs_dresidual:
        dresidual = torch.empty_like(given.x)
        given.fields["dresidual"] = dresidual.data_ptr()
    given.call("grad_input")
    return None if dx is None else given.as_original(dx), None if dresidual is None else given.as_original(dresidual)


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
        weight, bias, residual, mask, activation = epilogue
        dtype, self.is_rows = x.dtype, _is_rows(x)
        if (residual is not None and residual.dtype != dtype) or (dy is not None and dy.dtype != dtype):
            dtype = compute_dtype(dtype)
        self.original, self.x = x, _dense(x, self.is_rows, dtype)
        samples, self.channels = x.shape[:2]
        positions = x.numel() // self.channels
        sizes = (positions, self.channels, 1) if self.is_rows else (samples, self.channels, positions // samples)
        at = address_like("input", self.x, self.x, self.is_rows)
        self.head = self.is_rows, *sizes, DTYPES[dtype], torch.get_num_threads(), at
        self.fields: dict[str, Any] = {"activation": ACTIVATIONS.index(activation), "leaky_slope": LEAKY_SLOPE}
        self.copies: list[Tensor] = []
        for name, t in (("residual", residual), ("dy", dy)):
            if t is not None:
                dense = self._kept(_dense(t, self.is_rows, dtype))
                self.fields[name] = address_like(name, dense, self.x, self.is_rows)
        if mask is not None:
            self.fields["mask"] = address("mask", self._kept(_side_by_side(mask)), positions, (torch.bool,))
        for name, t in (("weight", weight), ("bias", bias)):
            if t is not None:
                self.add(name, self._kept(_side_by_side(t)))
        if mean is not None and invstd is not None:
            dtypes = (compute_dtype(x.dtype),)
            self.fields["mean"] = address("mean", mean, self.channels, dtypes)
            self.fields["invstd"] = address("invstd", invstd, self.channels, dtypes)

    def add(self, name: str, t: Tensor) -> None:
        """A vector of any dtype, in two fields."""
        self.fields[name], self.fields[f"{name}_dtype"] = address(name, t, self.channels), DTYPES[t.dtype]

    def call(self, verb: str, **fields: Any) -> None:
        call(verb, Call(*self.head, **self.fields, **fields))

    def as_original(self, t: Tensor) -> Tensor:
        """A result that lies as self.x does, in the dtype and memory format of the input as it was given."""
        if self.x is self.original:
            return t
        like = torch.empty_like(self.original)
        return t if t.dtype == like.dtype and t.stride() == like.stride() else like.copy_(t)

    def _kept(self, t: Tensor) -> Tensor:
        self.copies.append(t)
        return t


class _Moving:
    """The running statistics of a call: moved by the library where it can write them, else in copies of them."""

    def __init__(self, given: _Given, running: Running) -> None:
        self.running = running
        self.mean, self.var = _side_by_side(running.mean), _side_by_side(running.var)
        given.add("running_mean", self.mean)
        given.add("running_var", self.var)
        momentum, counter, fields = running.momentum, running.num_batches_tracked, given.fields
        self.counter = None if counter is None else _side_by_side(counter.to(torch.int64))
        fields["counter"] = address("num_batches_tracked", self.counter, 1, (torch.int64,))
        fields["momentum"] = NO_MOMENTUM if momentum is None else momentum
        if running.skip_nonfinite:
            fields["most"] = min(MOST[running.mean.dtype], MOST[running.var.dtype])

    def finish(self) -> None:
        """Into the buffers, of which autograd is to know that they have changed."""
        mean, var, counter = self.running[:3]
        for moved, buffer in ((self.mean, mean), (self.var, var), (self.counter, counter)):
            if moved is buffer and buffer is not None:
                increment_version(buffer)
            elif moved is not None and buffer is not None:
                buffer.copy_(moved)


def _is_rows(x: Tensor) -> bool:
    """Whether the channels are innermost in memory, or may as well be."""
    if x.ndim == 2:
        return True
    return x.stride(1) == 1 if not x.is_contiguous() else x.numel() == x.shape[0] * x.shape[1]


def _dense(t: Tensor, is_rows: bool, dtype: torch.dtype) -> Tensor:
    """t itself if the library can read it, else a copy."""
    t = t.to(dtype)
    if not is_dense(t, is_rows):
        t = t.movedim(1, -1).contiguous().movedim(-1, 1) if is_rows else t.contiguous()
    return t.clone() if t.data_ptr() % t.itemsize else t


def _side_by_side(t: Tensor) -> Tensor:
    """t itself if the library can read and write it, else a copy."""
    if type(t) in _ORDINARY and t.is_contiguous() and not t.is_neg() and not t.data_ptr() % t.itemsize:
        return t
    return torch.empty(t.shape, dtype=t.dtype).copy_(t)
