"""The layer as a module: its state, its momentum rules, its place among torch's batch norms."""

import copy
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import init

from syncbn import checks, groups, names, torch_private
from syncbn.check_tensors import check_input
from syncbn.functional import normalize
from syncbn.symbolic import Leaf
from syncbn.torch_private import BatchNormBase


class SyncBatchNorm(Leaf, BatchNormBase):
    r"""Batch normalization over the batches of all ranks: ``activation(bn(input) + residual)``.

    .. math:: \mathrm{bn}(x) = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}}\,\gamma + \beta

    A drop-in for ``torch.nn.SyncBatchNorm``, with its constructor order, state_dict and ``convert_sync_batchnorm``,
    that also runs on CPU, under gloo, and without a process group, where it is an ordinary batch norm.
    It is a ``BatchNormBase``, not an ``nn.SyncBatchNorm``: DistributedDataParallel refuses the latter on CPU.

    Args:
        num_features: C of an input (N, C, \*S).
        eps: added to the variance; finite, not negative, and not 0 in training.
        momentum: weight of the newest batch in the running statistics; None for their cumulative average.
        affine: learn weight :math:`\gamma` and bias :math:`\beta`, (C,) each.
        track_running_stats: keep running_mean, running_var (C,) and num_batches_tracked; without them eval uses the
            statistics of its own, local batch.
        process_group: the ranks to synchronise over, a ProcessGroup (see `syncbn.new_group`) or a 1-d DeviceMesh;
            None is the default group, looked up at each call. It can be set later; `dist.destroy_process_group` ends
            it, and a layer that has it still can be saved, copied and evaluated.
        device, dtype: of parameters and buffers; the input's dtype may be another.
        bias: learn :math:`\beta` too.
        activation: None, ``"relu"``, ``"leaky_relu"`` (slope 0.01) or ``"silu"``, fused.
        skip_nonfinite: a channel whose mean or variance is not finite, on any rank or by overflow, leaves its running
            statistics as they are, alike on all ranks; False for torch's behaviour, which keeps a NaN for good.

    In training the statistics are those of all ranks, by one all-reduce forward and one backward; every rank must
    call the layer equally often. In eval nothing is communicated and ``F.batch_norm`` does the work.
    num_batches_tracked counts training calls, globally empty ones too; those move no running statistic, and under
    momentum=None still take a share of the average.

    Raises:
        TypeError, ValueError: for a wrong argument, before any communication and with the buffers unchanged.
        RuntimeError: by a call, if the ranks are in different calls, or the transport fails.

    Source: Ioffe and Szegedy, Batch Normalization, 2015 (arXiv:1502.03167).

    Example::

        >>> layer = syncbn.SyncBatchNorm(64, activation="relu")
        >>> y = layer(torch.randn(8, 64, 32, 32))
    """

    process_group: groups.Group | None = None
    activation: str | None = None
    skip_nonfinite: bool = True
    _label: names.Label | None = None
    convert_sync_batchnorm: ClassVar[Callable[..., Any]]
    """torch's name for `syncbn.convert_sync_batchnorm`, of (module, process_group=None) and more; convert.py's."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: groups.Group | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        skip_nonfinite: bool = True,
    ) -> None:
        checks.check_num_features(num_features)
        checks.check_numbers(eps, momentum, of_batch=False)  # as given: a layer for eval may have an eps of 0
        checks.check_activation(activation)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if affine and not bias:  # not passed on: torch's base takes bias only from 2.13 on
            self.register_parameter("bias", None)
        self.process_group = process_group
        self.activation = activation
        if not skip_nonfinite:
            self.skip_nonfinite = False
        self._label = names.numbered(type(self).__name__, num_features, activation)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "process_group":
            checks.check_process_group(value)
            groups.ranks_of(value)  # then they outlive it
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """weight 1, bias 0, running statistics at their start."""
        self.reset_running_stats()
        for parameter, fill in ((self.weight, init.ones_), (self.bias, init.zeros_)):
            if parameter is not None:
                fill(parameter)

    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """activation(bn(input) + residual), (N, C, *S); mask bool, broadcastable to (N, *S), True where it counts."""
        return self._normalize(input, residual, mask, self.activation)

    def _normalize(self, input: Tensor, residual: Tensor | None, mask: Tensor | None, activation: str | None) -> Tensor:
        """`forward` with the activation given by the caller."""
        try:
            self._check_input_dim(input)
        except AttributeError:  # of what is no tensor, in torch's check
            check_input(input)
            raise
        training = self.training
        parameters, buffers, _ = torch_private.own_parts(self)
        weight = parameters["weight"] if "weight" in parameters else self.weight
        bias = parameters["bias"] if "bias" in parameters else self.bias
        mean = var = tracked = None
        if self.track_running_stats or not training:
            mean = buffers["running_mean"] if "running_mean" in buffers else self.running_mean
            var = buffers["running_var"] if "running_var" in buffers else self.running_var
            tracked = buffers["num_batches_tracked"] if "num_batches_tracked" in buffers else self.num_batches_tracked
        statistics = (mean, var, tracked, self.momentum, self.skip_nonfinite)
        of_call = residual, activation, mask, self._label or names.FUNCTION
        return normalize(self.process_group, input, statistics, weight, bias, training, self.eps, *of_call)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any rank; the function checks the rest."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "SyncBatchNorm":
        """A copy in the same process shares the group."""
        memo[id(self.process_group)] = self.process_group
        if hasattr(super(), "__deepcopy__"):  # of the class that was converted
            copied: SyncBatchNorm = super().__deepcopy__(memo)  # type: ignore[misc]  # if it has one
            return copied
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        super(SyncBatchNorm, new).__setstate__(copy.deepcopy(self._state(), memo))  # type: ignore[no-untyped-call]
        return new

    def __getstate__(self) -> dict[str, Any]:
        """A group cannot leave its process; its ranks can."""
        state = self._state().copy()
        if state.get("process_group") is not None:
            state["process_group"] = groups.ranks_of(state["process_group"])
        return state

    def _state(self) -> dict[str, Any]:
        """As the class that was converted has it, or all."""
        own = getattr(super(), "__getstate__", None)  # every object has one from Python 3.11 on
        state: Any = self.__dict__ if own is None else own()
        return state[0] if isinstance(state, tuple) else state  # type: ignore[no-any-return]  # beside what is in slots

    def __setstate__(self, state: dict[str, Any]) -> None:
        ranks = state.get("process_group")
        group = groups.group_of(ranks)
        state = {**state, "process_group": group} if "process_group" in state else state
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's own
        if "_label" not in state:  # saved by an earlier version
            self._label = names.numbered(type(self).__name__, self.num_features, self.activation)
        if ranks is not None and group is None:
            of = f"of ranks {list(ranks)}, which this process does not have" if ranks else "of others than its rank"
            warnings.warn(
                f"A SyncBatchNorm was saved with a process group {of}; it now synchronises over the default group. "
                "Set its process_group to use another.",
                stacklevel=2,
            )

    def extra_repr(self) -> str:
        shown: dict[str, Any] = {"eps": self.eps, "momentum": self.momentum, "affine": self.affine}
        shown |= {"bias": self.bias is not None, "track_running_stats": self.track_running_stats}
        if self.activation is not None:
            shown["activation"] = self.activation
        if not self.skip_nonfinite:
            shown["skip_nonfinite"] = False
        return ", ".join([str(self.num_features), *(f"{name}={value}" for name, value in shown.items())])


class SyncBatchNorm1d(SyncBatchNorm, nn.BatchNorm1d):
    """`SyncBatchNorm` for inputs (N, C) and (N, C, L), an instance of nn.BatchNorm1d: what conversion makes of one."""

    _mixin, _under = SyncBatchNorm, nn.BatchNorm1d
    _check_input_dim = nn.BatchNorm1d._check_input_dim


class SyncBatchNorm2d(SyncBatchNorm, nn.BatchNorm2d):
    """`SyncBatchNorm` for inputs (N, C, H, W), an instance of nn.BatchNorm2d: what conversion makes of one."""

    _mixin, _under = SyncBatchNorm, nn.BatchNorm2d
    _check_input_dim = nn.BatchNorm2d._check_input_dim


class SyncBatchNorm3d(SyncBatchNorm, nn.BatchNorm3d):
    """`SyncBatchNorm` for inputs (N, C, D, H, W), an instance of nn.BatchNorm3d: what conversion makes of one."""

    _mixin, _under = SyncBatchNorm, nn.BatchNorm3d
    _check_input_dim = nn.BatchNorm3d._check_input_dim
