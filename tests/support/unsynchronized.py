"""An example of tests/examples as it would be without synchronization: conversion leaves the model as it is.

python -m tests.support.unsynchronized FOLDER MODULE
"""

import importlib
import sys
from pathlib import Path
from typing import Any

from torch import nn

import syncbn
from syncbn import convert


def unconverted(model: nn.Module, *_: Any, **__: Any) -> nn.Module:
    return model


if __name__ == "__main__":
    syncbn.convert_sync_batchnorm = convert.convert_sync_batchnorm = unconverted  # the second is LayerSync's
    importlib.import_module(sys.argv[2]).main(Path(sys.argv[1]))
