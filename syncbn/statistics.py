"""Running statistics of a whole data set, and of all ranks: what a model is evaluated with."""

import zlib
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parameter import is_lazy

from syncbn import calls, checks, comm, groups, torch_private
from syncbn.loader import EvenLoader, check_iterable
from syncbn.measured import Layers, is_synchronized, layers_of, measuring
from syncbn.names import Pooling

Moments = tuple[Tensor, Tensor | None]
"""mean and variance of a layer, float64 (C); no variance of a single value."""


class Pooled(NamedTuple):
    """counts: how many values a channel, or ranks, each layer's statistics are of, by its path; left: the other layers,
    and why. Printed, a line for all and one for each that was left alone.
    """

    counts: dict[str, int]
    left: dict[str, str]
    unit: str = "values a channel"

    def __str__(self) -> str:
        few, many = (min(self.counts.values()), max(self.counts.values())) if self.counts else (0, 0)
        of = f"{many}" if few == many else f"{few} to {many}"
        lines = [f"{name}: left alone, {why}" for name, why in self.left.items()]
        return "\n".join([f"statistics of {len(self.counts)} batch norms, each of {of} {self.unit}", *lines])


def recompute_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    process_group: groups.Group | None = None,
    momentum: float | None = None,
) -> Pooled:
    r"""Replace the running statistics of every batch norm by those of all the data that all ranks' batches hold.

    .. math:: \mu = \frac1n \sum x, \qquad \sigma^2 = \frac1{n-1} \Bigl(\sum x^2 - n \mu^2\Bigr)

    over every position of every sample of every batch of every rank, n values a channel, in float64; of a layer with a
    mask over those that count, of one that is called several times over all calls. Batches of any sizes weigh as they
    should, and all ranks get the same bits.

    Running statistics are an average over the last training steps, whose weights were others. Those of the whole
    training set, by the weights there are now, are what Ioffe and Szegedy (2015, algorithm 2) evaluate with; the
    smaller the batches were, the more they differ.

    Which population that is: of the layers that see data as it is, exactly the data's, however it is cut into batches.
    A deeper layer sees what the layers before it normalized, which here they do by the statistics of each batch, of
    all ranks if they are synchronized, as in training. So it is a population of such batches: give it batches as
    large as you can. All else is in eval mode, dropout for one, as it will be when the statistics are used.

    ``fvcore``'s precise batch norm averages the batches' variances and means with equal weights; the average of
    variances lacks how much the batches' means differ, and each rank gets its own. ``torch.optim.swa_utils.update_bn``
    averages what each training step would have added, with the same two gaps, and lets dropout run.

    Args:
        model: with batch norms of ours or of torch's, in any mode; wrapped in DistributedDataParallel, or compiled, it
            is run without that.
        batches: anything to iterate over, a progress bar around a loader too. Ranks may have different numbers of
            batches, and none: with synchronized layers they are given empty ones, by :class:`EvenLoader`.
        forward: ``forward(model, batch)`` runs the model on a batch. By default a batch is a tensor, or a tuple or
            list whose first entry is what the model takes.
        process_group: the ranks whose data it is; it has those of the layers in it. None is the default group.
        momentum: None replaces the statistics; a number from 0 to 1 moves them that share of the way.

    Returns:
        How many values a channel each layer's statistics are of, and which layers were left alone: frozen ones, those
        in eval mode in a model in training mode, those without running statistics or that the model did not call.
        Print it.

    Raises:
        ValueError: if there is no layer to do it for, one that is lazy, no batch on any rank, or a statistic that is
            not finite or does not fit its buffer; if ranks have different layers. On all ranks alike.
        TypeError: for a wrong argument, or a batch that needs ``forward``.
        RuntimeError: within a backward.

    Whatever is raised, by the model and the batches too, nothing has changed: statistics move at the end, for all
    layers together. Modes, hooks, gradients, momenta and num_batches_tracked stay as they were.

    It costs a forward pass over the data with each activation that a batch norm is given read once more, and besides
    the layers' own one all-reduce of 8·Σ(2C + 1) bytes at the end: 425 kB for a ResNet-50.

    Example::

        >>> with torch.autocast("cuda", torch.bfloat16):
        ...     print(syncbn.recompute_statistics(model, tqdm(loader)))
        >>> model.eval()
    """
    share = _check(model, forward, momentum)
    bare, run = groups.without_ddp(model), forward or _of_first
    layers, left = layers_of(bare)
    _require_layers(layers, left, "recomputed")
    group = checks.check_group(process_group)
    check_iterable("batches", batches)
    if is_synchronized(layers):
        batches = EvenLoader(batches, process_group)
    _require_alike(layers, group, "recompute_statistics")
    with measuring(bare, layers) as sums:
        for batch in batches:
            run(bare, batch)
    sizes = {name: 2 * layer.num_features + 1 for name, layer in layers.items()}
    local = [sums[name] if name in sums else torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()]
    totals = dict(zip(layers, _sum_of_ranks(local, group, "recompute_statistics"), strict=True))
    counts = {name: int(total[-1]) for name, total in totals.items()}
    if not any(counts.values()):
        raise ValueError(
            "The statistics are those of batches; got none on any rank, or only empty ones. "
            "Pass a loader of the training set; an iterator can be gone through once only."
        )
    left |= {name: "it was not called" for name, count in counts.items() if not count}
    _replace(layers, {name: _moments(total) for name, total in totals.items() if counts[name]}, share)
    return Pooled({name: count for name, count in counts.items() if count}, left)


def synchronize_statistics(model: nn.Module, *, process_group: groups.Group | None = None) -> Pooled:
    r"""Give all ranks the same running statistics: those of the mixture of the ranks' distributions, of equal weights.

    .. math:: \mu = \frac1W \sum_r \mu_r, \qquad
        \sigma^2 = \frac1W \sum_r \sigma_r^2 + \frac1W \sum_r (\mu_r - \mu)^2

    For models trained with unsynchronized batch norm, or synchronized over groups smaller than the world, before a
    checkpoint or an evaluation: each rank or group has seen other data, and one rank's statistics are of a part. The
    mean of variances alone would lack how much the means differ.
    DistributedDataParallel with ``broadcast_buffers=True`` gives all ranks those of rank 0 before each step, so that
    ranks then differ by one step only; with ``False`` they have statistics of their own.

    Args:
        model: with batch norms of ours or of torch's; on ranks that agree already, nothing moves.
        process_group: the ranks; None is the default group. Alone, nothing is done.

    Returns:
        How many ranks each layer's statistics are of, and which layers were left alone: frozen ones, those in eval
        mode in a model in training mode, and those without running statistics.

    Raises:
        ValueError: if there is no layer to do it for, a statistic that is not finite, or ranks have different layers.
            On all ranks alike; nothing has changed then.

    It is one all-reduce of 24·ΣC bytes; num_batches_tracked stays.
    """
    _check(model, None, None)
    layers, left = layers_of(groups.without_ddp(model))
    _require_layers(layers, left, "synchronized")
    group = checks.check_group(process_group)
    _require_alike(layers, group, "synchronize_statistics")
    world = groups.size_of(group)
    if group is not None:
        pairs = [(_double(layer.running_mean), _double(layer.running_var)) for layer in layers.values()]
        local = [torch.stack([mean, mean * mean, var]) for mean, var in pairs]
        totals = _sum_of_ranks([one.flatten() for one in local], group, "synchronize_statistics")
        thirds = [(total / world).view(3, -1) for total in totals]
        mixed = [(mean, var + (squares - mean * mean).clamp_(min=0)) for mean, squares, var in thirds]
        _replace(layers, dict(zip(layers, mixed, strict=True)), None)
    return Pooled(dict.fromkeys(layers, world), left, "ranks")


def _check(model: object, forward: object, momentum: object) -> float | None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module; got {type(model).__name__}. Pass the model that is trained.")
    if not (forward is None or callable(forward)):
        raise TypeError(
            f"forward must be a function of a model and a batch, or None; got {type(forward).__name__}. "
            "Pass e.g. forward=lambda model, batch: model(batch['image'])."
        )
    is_number = isinstance(momentum, Real) and not isinstance(momentum, bool)
    if momentum is not None and not (is_number and 0 <= momentum <= 1):  # type: ignore[operator]
        kind = ValueError if is_number else TypeError
        raise kind(
            f"momentum must be the share of the way to the new statistics, from 0 to 1, or None; got {momentum!r}. "
            "Leave it away to replace the old ones."
        )
    if torch_private.backward_id() != -1:
        raise RuntimeError(
            "Statistics can be replaced between steps only; got a call within a backward, which may still need the old "
            "ones. Call it after backward() has returned."
        )
    return None if momentum is None else float(momentum)  # type: ignore[arg-type]  # a number


def _require_layers(layers: Layers, left: dict[str, str], what: str) -> None:
    if not layers:
        why = "; ".join(f"{name!r}: {reason}" for name, reason in list(left.items())[:3])
        raise ValueError(
            f"The running statistics of a model's batch norms are {what}; got a model with none that can be"
            f"{f' ({why})' if why else ''}. Pass the model that has them, unfrozen."
        )
    lazy = [name for name, layer in layers.items() if is_lazy(layer.running_mean)]  # type: ignore[arg-type]  # a buffer
    if lazy:
        raise ValueError(f"Statistics must be there to be {what}; got {lazy[0]!r}, which is lazy. Call the model once.")


def _require_alike(layers: Layers, group: ProcessGroup | None, function: str) -> None:
    """Raise on all ranks if they differ: their sums would be of different sizes, or of different layers."""
    if group is None:
        return
    text = "\n".join(f"{name} {layer.num_features} {is_synchronized({name: layer})}" for name, layer in layers.items())
    mine = zlib.crc32(text.encode())
    answer = comm.start_largest((mine, -mine), group, comm.device_of(group))
    largest, smallest = calls.awaited(Pooling(group, function), answer)
    if largest != -smallest:
        raise ValueError(
            "All ranks must have the same batch norms, of the same sizes and kinds; got others on some ranks (this one "
            f"has {len(layers)}, first {next(iter(layers))!r}). Convert and freeze the model alike on every rank."
        )


def _of_first(model: nn.Module, batch: Any) -> None:
    x = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(x, Tensor):
        raise TypeError(
            f"A batch is a tensor, or a tuple or list that begins with one; got {type(x).__name__}. "
            "Pass forward=lambda model, batch: ..., which runs the model on it."
        )
    model(x)


def _sum_of_ranks(parts: list[Tensor], group: ProcessGroup | None, function: str) -> list[Tensor]:
    """Of all layers in one all-reduce; on the CPU."""
    sizes = [part.numel() for part in parts]
    device = torch.device("cpu") if group is None else comm.device_of(group)
    wire = torch.cat([part.to(device) for part in parts])
    if group is not None:
        calls.awaited(Pooling(group, function), lambda: comm.all_sum(wire, group))
    return list(torch.split(wire.cpu(), sizes))


def _moments(total: Tensor) -> Moments:
    """Of Σx, Σx² and n; the variance is unbiased."""
    (first, second), n = total[:-1].view(2, -1), total[-1]
    mean = first / n
    return mean, (second / n - mean * mean).clamp_(min=0) * (n / (n - 1)) if n > 1 else None


def _double(buffer: Tensor | None) -> Tensor:
    assert buffer is not None, "one of layers_of's"
    return buffer.detach().double()


@torch.no_grad()
def _replace(layers: Layers, moments: dict[str, Moments], share: float | None) -> None:
    """All of them, or none if one cannot be."""
    new: list[tuple[Tensor, Tensor]] = []
    for name, (mean, var) in moments.items():
        layer = layers[name]
        for buffer, value in ((layer.running_mean, mean), (layer.running_var, var)):
            if buffer is None or value is None:
                continue
            value = value.to(buffer.device)
            moved = value if share is None else torch.lerp(buffer.double(), value, share)
            stored = moved.to(buffer.dtype)
            if not stored.isfinite().all():
                raise ValueError(
                    f"Statistics must be finite and fit their buffers; got {_first_bad(stored)} for {name!r}, whose "
                    f"buffers are {buffer.dtype}. Look for NaN or inf in the batches or in what comes before that "
                    "layer; nothing has changed."
                )
            new.append((buffer, stored))
    for buffer, stored in new:
        buffer.copy_(stored)


def _first_bad(values: Tensor) -> str:
    at = int((~values.isfinite()).nonzero()[0])
    return f"{values[at].item()} in channel {at}"
