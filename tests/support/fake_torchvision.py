"""Lets the real timm be imported where torchvision cannot be: beside a CPU build of torch there is none.

timm needs torchvision's names at import only; building and running its models uses none of them.
"""

import enum
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
from torch import nn

MODES = ["NEAREST", "NEAREST_EXACT", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS"]


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Every torchvision module exists, and every name in it is an empty class."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return (
            importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None
        )

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = functools.cache(_name)  # type: ignore[method-assign]  # PEP 562
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _name(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return enum.Enum(name, MODES) if name == "InterpolationMode" else type(name, (nn.Module,), {})


def timm(module: str) -> Any:
    """A module of timm, the test skipped without it. torchvision is there for as long as the import takes only: other
    libraries look for it, too.
    """
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed; pip install --no-deps timm huggingface_hub safetensors pyyaml")
    finder = _Finder()
    is_missing = importlib.util.find_spec("torchvision") is None
    if is_missing:
        sys.meta_path.append(finder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm's own about itself
            return importlib.import_module(module)
    finally:
        if is_missing:
            sys.meta_path.remove(finder)
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
