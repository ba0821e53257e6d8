"""Hatchling's part of an installation: a wheel with the CPU library, or of pure Python where no C compiler is."""

import runpy
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

HERE = Path(__file__).parent


class NativeHook(BuildHookInterface):  # type: ignore[type-arg]  # its configuration is not looked at
    """An editable installation gets the library in place, a wheel another; it is good for every Python and torch."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        compiling = runpy.run_path(str(HERE / "compiling.py"))
        self.folder = tempfile.TemporaryDirectory()
        in_place: Path = compiling["LIBRARY"]
        target = in_place if version == "editable" else Path(self.folder.name) / in_place.name
        if reason := compiling["compile_library"](target):
            self.app.display_warning(f"syncbn is installed without its CPU library, which is slower: {reason}")
            return
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")
        if version != "editable":
            build_data["force_include"][str(target)] = str(in_place.relative_to(self.root))

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        self.folder.cleanup()
