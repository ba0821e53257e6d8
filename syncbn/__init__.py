"""Synchronized batch normalization for PyTorch: exact on CPU and GPU, one collective each way."""

from syncbn import functional
from syncbn.convert import convert_sync_batchnorm, revert_sync_batchnorm
from syncbn.module import SyncBatchNorm

__version__ = "0.1.0"
__all__ = ["SyncBatchNorm", "convert_sync_batchnorm", "functional", "revert_sync_batchnorm"]
