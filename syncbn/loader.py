"""Loaders of different lengths: all ranks of a group make as many steps as the longest of them."""

import contextlib
import copy
import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.distributed import ProcessGroup

from syncbn import calls, checks, comm, groups
from syncbn.emptied import emptied
from syncbn.names import Step

_NONE: Any = object()
"""No batch; None may be one."""


def check_iterable(name: str, given: object) -> None:
    """What a for statement takes."""
    if not (hasattr(given, "__iter__") or hasattr(given, "__getitem__")):
        raise TypeError(
            f"{name} must be iterable, as a DataLoader is; got {type(given).__name__}. "
            "Pass what your loop iterates over."
        )


def _checked(loader: object, process_group: object, empty: object, device: Any) -> torch.device | None:
    """The device as torch knows it, if all are what they should be."""
    check_iterable("loader", loader)
    checks.check_process_group(process_group)
    if not (empty is None or callable(empty)):
        raise TypeError(
            f"empty must be a function from a batch to an empty one, or None; got {type(empty).__name__}. "
            "Pass e.g. empty=lambda batch: batch[:0]."
        )
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise TypeError(f"device must be a device or None; got {device!r}. Pass e.g. device='cuda:0'.") from None


def _failed(rank: int, what: str) -> RuntimeError:
    """For the ranks whose loaders did not."""
    return RuntimeError(
        f"Every rank's loader must give batches or end; that of rank {rank} raised {what}. "
        f"See rank {rank}'s traceback for where; this rank stops with it, as no step can be made without all ranks."
    )


class EvenLoader:
    r"""A loader that ends on all ranks together, when the longest has run dry; the others get empty batches till then.

    With a loader of its own length on every rank, one rank would leave the loop while the others wait for it in a
    layer's or DistributedDataParallel's collective. Empty batches keep it in step: they add nothing to statistics,
    and no gradient.

    Args:
        loader: a DataLoader, or whatever can be iterated over.
        process_group: the ranks that make steps together, those of the layers and of DistributedDataParallel: a
            ProcessGroup or a 1-d DeviceMesh; None is the default group, looked up at each ``iter()``.
        empty: a function from a batch to an empty one, for batches of a structure of one's own.
        device: where the ranks' flags lie; by default on the CPU, under NCCL alone on this rank's GPU.

    An empty batch has the structure of the rank's first one in this pass:

    - Tensors and numpy arrays have 0 in dimension 0; dtype, device, strides and ``requires_grad`` stay. They are not
      pinned, as nothing is to be copied. A ``PackedSequence`` holds one step of no sequences, which recurrent layers
      take; of ``pad_packed_sequence`` it has no gradient in torch 2.13 (``find_unused_parameters=True`` is for that).
    - Mappings, named tuples, dataclasses, lists and tuples keep their type, keys and order.
    - But lists and tuples that have an entry a sample (strings, numbers, any objects, images of a size each, dicts of
      targets) lose all of them. The number of samples is what most of the batch agrees on. Where a list could also be
      one of fields, having as many as there are samples, the outermost one is, unless it is of dicts; one within is
      if ``default_collate`` made it.
    - Numbers, strings, None and 0-dim tensors are those of the first batch: a count of tokens there is not 0.
    - Everything else, or a batch with nothing in it to empty, is a TypeError at the first step: pass ``empty``, which
      is called once a pass; its result is copied for every step.

    Every rank must run the same loop: start it alike, and leave it at the same step, if before its end. A step has one
    all-reduce of three integers on the group, started when a batch is handed out and waited for when the next one is
    asked for, and there is one more for the end. To know what it has, a rank fetches one batch ahead, so that one
    more is in memory, and a loader that reuses a batch's memory must hand out copies.
    A rank without any batch gets the structure of another's, by an exchange on that occasion only. If no rank has a
    batch, there is no step.
    Without a process group, or alone in it, ``iter()`` is the loader's own.

    ``len()`` is that of this rank's loader; it may get more. All other attributes are the loader's, so that
    ``loader.sampler.set_epoch(epoch)`` works. Each ``iter()`` is a new pass.

    Raises:
        TypeError: for a wrong argument, before any communication; at the first step, for a batch it cannot empty.
        ValueError: for a group without this rank.
        RuntimeError: if another rank's loader raised, or its batch cannot be emptied, naming the rank and its error, at
            the step of the batch that is missing; that rank raises its own error.

    Losses that are means are NaN on an empty batch, though their gradients are zeros; only a learned factor of such a
    loss would get a NaN. To weigh every sample alike, and to have something to log, sum losses, and divide by the
    ranks' mean number of samples, as DistributedDataParallel takes the mean of the ranks' gradients.

    Example::

        >>> loader = syncbn.EvenLoader(DataLoader(dataset, batch_size=32))
        >>> for images, labels in loader:
        ...     loss = F.cross_entropy(model(images), labels, reduction="sum")
        ...     count = torch.tensor(float(len(labels)), device=loss.device)
        ...     dist.all_reduce(count)
        ...     (loss * dist.get_world_size() / count).backward()
    """

    def __init__(
        self,
        loader: Iterable[Any],
        process_group: groups.Group | None = None,
        *,
        empty: Callable[[Any], Any] | None = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        self._device = _checked(loader, process_group, empty, device)
        self.loader = loader
        self._group, self._empty = process_group, empty

    def __len__(self) -> int:
        """Of this rank's loader, if it has one."""
        return len(self.loader)  # type: ignore[arg-type]  # then it is len's TypeError

    def __getattr__(self, name: str) -> Any:
        if name == "loader" or name.startswith("__"):  # while it is copied or unpickled
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        group = checks.check_group(self._group)
        if group is None:
            return iter(self.loader)
        empty = self._empty or (lambda batch: emptied(batch, self.loader))
        return _in_step(_Source(self.loader, empty), _Company(group, self._device))


class _Source:
    """This rank's batches, fetched one ahead: `batch` is the next one; `error` may say why there is none."""

    def __init__(self, loader: Iterable[Any], empty: Callable[[Any], Any]) -> None:
        self._loader, self._empty = loader, empty
        self._batches: Iterator[Any] | None = None
        self.batch = self.template = _NONE
        self.error: Exception | None = None

    def fetch(self) -> None:
        """The next batch; of the first, also an empty one."""
        self.batch = _NONE
        try:
            if self._batches is None:
                self._batches = iter(self._loader)
            batch = next(self._batches)
            if self.template is _NONE:
                self.template = self._empty(batch)
                self.take()  # it can be copied
            self.batch = batch
        except StopIteration:
            self._batches = iter(())  # ends its workers, and stays so
        except Exception as error:
            self._batches, self.error = iter(()), error

    def take(self) -> Any:
        """The batch, or an empty one that may be changed."""
        return copy.deepcopy(self.template) if self.batch is _NONE else self.batch

    def packed(self) -> bytes | None:
        """The template for another rank; None with an error."""
        stream = io.BytesIO()
        try:
            torch.save(self.template, stream)
        except Exception as error:
            self.error = error
            return None
        return stream.getvalue()

    def unpack(self, data: bytes | None, group: ProcessGroup) -> None:
        """Another rank's template, on the CPU or on this rank's device of the kind."""

        def here(storage: Any, location: str) -> Any:
            device = comm.device_of(group, torch.device(location.split(":")[0]))
            return torch.serialization.default_restore_location(storage, str(device))  # type: ignore[no-untyped-call]

        try:
            if data is not None:
                self.template = torch.load(io.BytesIO(data), map_location=here, weights_only=False)
                self.take()
        except Exception as error:
            self.error = error


class _Company:
    """The other ranks, and what they agree on."""

    def __init__(self, group: ProcessGroup, device: torch.device | None) -> None:
        self.group, self._device = group, comm.device_of(group, device)
        self._rank, self._size = group.rank(), group.size()

    def start(self, source: _Source) -> Callable[[], list[int]]:
        """Tell what there is; the answer: which ranks have a batch (from behind), fail, and lack a template."""
        has = 0 if source.batch is _NONE else self._size - self._rank
        fails = 0 if source.error is None else self._rank + 1
        return comm.start_largest((has, fails, int(source.template is _NONE)), self.group, self._device)

    def share_template(self, source: _Source, has: int) -> list[int]:
        """Of the first rank that has a batch, to those without a template; the new answer."""
        giver = self._size - has
        data = comm.from_rank(source.packed() if giver == self._rank else None, giver, self.group, self._device)
        if source.template is _NONE:
            source.unpack(data, self.group)
        return self.start(source)()

    def check(self, source: _Source, fails: int) -> None:
        """Raise if a rank's loader did; there its own error."""
        if not fails:
            return
        rank, error = fails - 1, source.error
        what = comm.from_rank(f"{type(error).__name__}: {error}"[:2000], rank, self.group, self._device)
        raise error or _failed((groups.ranks_of(self.group) or ())[rank], what)


def _in_step(source: _Source, company: _Company) -> Iterator[Any]:
    """Its own batches, then empty ones, as long as any rank has one."""
    source.fetch()
    process, answer = os.getpid(), company.start(source)
    for step in itertools.count(1):
        has, fails, lacks = calls.awaited(Step(company.group, step), answer)
        company.check(source, fails)
        if not has:
            return
        if lacks:
            has, fails, _ = company.share_template(source, has)
            company.check(source, fails)
        batch = source.take()
        source.fetch()
        answer = company.start(source)
        try:
            yield batch
        except GeneratorExit:  # left before the end; what has been started on all ranks is waited for,
            if os.getpid() == process:  # but not in a forked worker, which has no part in it
                with contextlib.suppress(RuntimeError):
                    answer()
            raise
