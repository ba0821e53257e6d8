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
from collections.abc import Sequence

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


def install_if_missing() -> None:
    """Make `import torchvision` work, by the real one if there is one."""
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(_Finder())
