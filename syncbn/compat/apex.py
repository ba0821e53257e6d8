"""The names of apex.parallel, which apex removed in 2025: `from syncbn.compat import apex` and go on.

apex.parallel.SyncBatchNorm, convert_syncbn_model, create_syncbn_process_group
"""

from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from syncbn import convert, groups, module

M = TypeVar("M", bound=nn.Module)


class SyncBatchNorm(module.SyncBatchNorm):
    """syncbn.SyncBatchNorm with apex's arguments.

    Args:
        num_features, eps, momentum, affine, track_running_stats, process_group: as there.
        channel_last: inputs, residuals and outputs are (N, *S, C); they are used as they lie, without a copy.
        fuse_relu: relu(bn(input) + z).

    forward(input, z=None): z is the residual, of the input's shape.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: groups.Group | None = None,
        channel_last: bool = False,
        fuse_relu: bool = False,
        **factory: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, process_group, **factory)
        self.channel_last = channel_last
        self.fuse_relu = fuse_relu
        self.activation = "relu" if fuse_relu else None

    def forward(self, input: Tensor, z: Tensor | None = None) -> Tensor:  # type: ignore[override]  # apex's forward
        if not self.channel_last:
            return super().forward(input, z)
        residual = None if z is None else z.movedim(-1, 1)
        return super().forward(input.movedim(-1, 1), residual).movedim(1, -1)


def convert_syncbn_model(module: M, process_group: ProcessGroup | None = None, channel_last: bool = False) -> M:
    """convert_sync_batchnorm by apex's name.

    Raises:
        ValueError: for channel_last=True: converted layers take (N, C, *S), in torch's channels_last memory format
            at full speed.
    """
    if channel_last:
        raise ValueError(
            "Converted layers take (N, C, *S), not (N, *S, C); got channel_last=True. "
            "Keep the shapes and use model.to(memory_format=torch.channels_last): it is as fast."
        )
    return convert.convert_sync_batchnorm(module, process_group)


def create_syncbn_process_group(group_size: int) -> ProcessGroup | None:
    """The group of this rank among groups of group_size consecutive ranks; 0 for the whole world.

    Raises:
        ValueError: if group_size does not divide the number of ranks.
    """
    return groups.new_group(group_size or "world")


__all__ = ["SyncBatchNorm", "convert_syncbn_model", "create_syncbn_process_group"]
