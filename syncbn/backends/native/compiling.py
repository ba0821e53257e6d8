"""Compiles the C library that serves the CPU: `python -m syncbn.backends.native`, and whenever syncbn is installed.

Needs the standard library only, since an installation runs it before there is anything else.
"""

import concurrent.futures
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
LIBRARY = HERE / "syncbn_cpu.so"
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-w")
"""No fused and no reordered arithmetic: every instruction set gives the same bits, NaN and infinity stay."""
V3 = ("-mavx2", "-mfma", "-mf16c")
"""What is used of x86-64-v3, in words that every compiler knows."""
WHOLE = ("-shared", "-Wl,-z,defs") if sys.platform == "linux" else ("-shared",)
"""A library, and an error where it lacks something."""
SECONDS = 120
"""What a compiler is given."""


class Failed(Exception):
    """A compiler's, with what it said."""


def compile_library(target: Path = LIBRARY) -> str:
    """Make the library with the first compiler that can; why there is none, or nothing.

    What is at target is replaced when the new one is complete; a process that has loaded it keeps the old.
    """
    reasons = []
    for compiler in compilers():
        with tempfile.TemporaryDirectory() as folder:
            command, made = [*compiler, *FLAGS], Path(folder, LIBRARY.name)
            beside = target.with_name(f"{target.name}.{os.getpid()}")
            try:
                _run([[*command, *WHOLE, *objects(command, Path(folder)), "-o", str(made)]])
                shutil.copy(made, beside)
                os.replace(beside, target)
            except (Failed, OSError) as error:
                reasons.append(f"{shlex.join(compiler)}: {error}")
            else:
                return ""
    return "; ".join(reasons) or "there is no C compiler: none of $CC, cc, gcc, clang and the package ziglang"


def compilers() -> Iterator[list[str]]:
    """Commands that may be one, the user's choice first."""
    if os.name != "posix":
        return
    if given := os.environ.get("CC"):
        yield shlex.split(given)
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            yield [name]
    if importlib.util.find_spec("ziglang") is not None:
        yield [sys.executable, "-m", "ziglang", "cc"]


def source() -> str:
    """What tells one state of the C files from another."""
    files = sorted(path for path in HERE.iterdir() if path.suffix in (".c", ".h"))
    return hashlib.sha256(b"\0".join(path.name.encode() + b"\0" + path.read_bytes() for path in files)).hexdigest()[:16]


def objects(command: list[str], folder: Path) -> list[str]:
    """Compiled in folder, for several instruction sets where the processor has such; and the flags to link them with.

    Raises:
        Failed: if the compiler cannot.
    """
    is_x86 = platform.machine() in ("x86_64", "AMD64") and _works([*command, *V3], folder)
    threads = ["-fopenmp"] if _works([*command, "-fopenmp"], folder) else []
    levels: dict[str, tuple[str, ...]] = {"base": ("-O1",), "v3": V3} if is_x86 else {"base": ()}
    about = (f'-DSOURCE="{source()}"', "-DWITH_LEVELS" if is_x86 else "")
    made = {"library": [str(HERE / "library.c"), *filter(None, about)]}
    made |= {level: [str(HERE / "level.c"), f"-DLEVEL={level}", *flags] for level, flags in levels.items()}
    outs = {name: str(folder / f"{name}.o") for name in made}
    _run([[*command, *threads, "-c", *given, "-o", outs[name]] for name, given in made.items()])
    return [*outs.values(), *threads, "-lm"]


def _works(command: list[str], folder: Path) -> bool:
    """Whether these flags make a library that lacks nothing: some compilers know -fopenmp, and have no OpenMP."""
    tiny = folder / "tiny.c"
    tiny.write_text("int one(void) {\n    int one = 0;\n#pragma omp parallel\n    one = 1;\n    return one;\n}\n")
    try:
        _run([[*command, *WHOLE, str(tiny), "-o", str(folder / "tiny.so")]])
    except Failed:
        return False
    return True


def _run(commands: list[list[str]]) -> None:
    """All of them side by side."""
    with concurrent.futures.ThreadPoolExecutor(len(commands)) as pool:
        for done in pool.map(_result, commands):
            if done:
                raise Failed(done)


def _result(command: list[str]) -> str:
    """What went wrong, or nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    said = done.stderr.strip().splitlines() or ["no word of why"]
    return f"exit status {done.returncode}, {said[0]}" if done.returncode else ""
