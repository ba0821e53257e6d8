"""Synchronized batch normalization for PyTorch: exact on CPU and GPU, one collective each way."""

from syncbn import functional
from syncbn.classes import safe_globals
from syncbn.convert import convert_sync_batchnorm, name_layers, plain, register_converter, revert_sync_batchnorm
from syncbn.freeze import freeze, unfreeze
from syncbn.groups import new_group
from syncbn.inspection import checking
from syncbn.loader import EvenLoader
from syncbn.module import SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d
from syncbn.profile import Profile, profiling
from syncbn.report import conversion_report
from syncbn.statistics import recompute_statistics, synchronize_statistics

__version__ = "0.2.0"
__all__ = [
    "EvenLoader",
    "Profile",
    "SyncBatchNorm",
    "SyncBatchNorm1d",
    "SyncBatchNorm2d",
    "SyncBatchNorm3d",
    "checking",
    "conversion_report",
    "convert_sync_batchnorm",
    "freeze",
    "functional",
    "name_layers",
    "new_group",
    "plain",
    "profiling",
    "recompute_statistics",
    "register_converter",
    "revert_sync_batchnorm",
    "safe_globals",
    "synchronize_statistics",
    "unfreeze",
]
