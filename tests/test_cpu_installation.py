"""Wheels, source distributions and editable installations, with a C compiler on the PATH and without."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

from syncbn.backends.native import compiling
from tests.support.cpu_backends import HAS_LIBRARY

ROOT = Path(__file__).parent.parent
LIBRARY = f"syncbn/backends/native/{compiling.LIBRARY.name}"
SOURCES = ("syncbn", "tests", "launch", "benchmarks", "README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml")
EDITABLE = "from hatchling.build import build_editable; build_editable('out')"
PROBE = """
import torch, syncbn
from syncbn import backends
print(syncbn.__file__)
print(backends.described(torch.empty(0)))
x = torch.randn(4, 3, 5, requires_grad=True)
syncbn.SyncBatchNorm(3)(x).square().sum().backward()
print(bool(x.grad.isfinite().all()))
"""
needs_compiler = pytest.mark.skipif(not HAS_LIBRARY, reason="there is no C compiler")


def build(project: Path, *command: str, compiler: bool) -> str:
    """What a build says on standard error; without a compiler nothing is on the PATH and CC is none."""
    environment = {name: value for name, value in os.environ.items() if name != "CC"}
    if not compiler:
        environment |= {"PATH": "", "CC": str(project / "no-compiler")}
    given = [sys.executable, *command]
    return subprocess.run(given, cwd=project, env=environment, capture_output=True, text=True, check=True).stderr


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a source distribution unpacks to."""
    folder = tmp_path_factory.mktemp("sdist")
    copy = folder / "checkout"
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / name, copy / name)
    shutil.copy(ROOT / ".gitignore", copy)
    (copy / LIBRARY).write_text("an earlier installation's, in place")
    build(copy, "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder), compiler=False)
    (made,) = folder.glob("*.tar.gz")
    with tarfile.open(made) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return next(folder.glob("syncbn-*/"))


def wheel_of(project: Path, out: Path, compiler: bool) -> tuple[Path, str]:
    said = build(project, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out), compiler=compiler)
    (made,) = out.glob("*.whl")
    return made, said


def in_fresh_venv(wheel: Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of a new environment in which this wheel is installed, and torch as here."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    scheme = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
    Path(scheme, "here.pth").write_text(sysconfig.get_path("purelib"))
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SYNCBN_CPU")}
    command = [str(python), "-c", PROBE]
    return subprocess.run(command, cwd=folder, env=kept | environment, capture_output=True, text=True, check=False)


def test_a_source_distribution_holds_the_source_alone(project: Path) -> None:
    """All C files and what compiles them, and no library that lay beside them."""
    native = {path.name for path in (project / "syncbn" / "backends" / "native").iterdir()}
    assert native == {path.name for path in compiling.HERE.iterdir() if path.suffix in (".c", ".h", ".py")}


@needs_compiler
def test_a_wheel_with_a_compiler(project: Path, tmp_path: Path) -> None:
    """It is of this platform and any Python, holds the library, and serves CPU tensors in a fresh environment."""
    wheel, _ = wheel_of(project, tmp_path / "out", compiler=True)
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    done = in_fresh_venv(wheel, tmp_path / "venv", SYNCBN_CPU="native")
    place, way, finite = done.stdout.splitlines()
    assert place.startswith(str(tmp_path / "venv"))
    assert way.startswith("cpu (native code for ")
    assert finite == "True"


def test_a_wheel_without_a_compiler(project: Path, tmp_path: Path) -> None:
    """It is of pure Python, said so when it was made; plain torch operations serve, and SYNCBN_CPU=native says why."""
    wheel, said = wheel_of(project, tmp_path / "out", compiler=False)
    assert "syncbn is installed without its CPU library, which is slower" in said
    assert wheel.name.endswith("-py3-none-any.whl")
    _, way, finite = in_fresh_venv(wheel, tmp_path / "venv").stdout.splitlines()
    assert way.startswith("reference (plain torch operations, which are slower: syncbn_cpu.so is not there. Where ")
    assert finite == "True"
    insisting = in_fresh_venv(wheel, tmp_path / "other", SYNCBN_CPU="native")
    assert "RuntimeError: SYNCBN_CPU=native needs the CPU library, but syncbn_cpu.so is not there." in insisting.stderr


@needs_compiler
def test_an_editable_installation(project: Path, tmp_path: Path) -> None:
    """The library is made in place; a later one without a compiler leaves it, as it is of the same source."""
    shutil.copytree(project, tmp_path / "project")
    for compiler in (True, False):
        build(tmp_path / "project", "-c", EDITABLE, compiler=compiler)
        assert (tmp_path / "project" / LIBRARY).stat().st_size > 50_000


def test_the_next_compiler_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails, of which the reason is kept, then one that there is not, then none."""
    failing = tmp_path / "cc"
    failing.write_text("#!/bin/sh\necho 'it is broken' >&2\nexit 3\n")
    failing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}")
    monkeypatch.setenv("CC", "no-such-compiler -O3")
    why = compiling.compile_library(tmp_path / "lib.so")
    assert why.startswith("no-such-compiler -O3: ")
    assert "cc: exit status 3, it is broken" in why
    assert not list(tmp_path.glob("lib.so*"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC")
    assert "none of $CC, cc, gcc, clang" in compiling.compile_library(tmp_path / "lib.so")


@needs_compiler
@pytest.mark.parametrize("lacking", ["-fopenmp", "-mavx2", "both"])
def test_a_compiler_that_can_do_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    """Without OpenMP, or without newer instructions: the library is made for one thread, or for any processor."""
    real = shutil.which(next(compiling.compilers())[0])
    words = "-fopenmp|-mavx2" if lacking == "both" else lacking
    compiler = tmp_path / "lesser"
    refuse = f'for word in "$@"; do case $word in {words}) echo "unknown: $word" >&2; exit 1;; esac; done'
    compiler.write_text(f'#!/bin/sh\n{refuse}\nexec {real} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert compiling.compile_library(tmp_path / "lib.so") == ""
    probe = (
        "import sys, pathlib; from syncbn.backends import cpu_library as c; print(c.Library(pathlib.Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", probe, str(tmp_path / "lib.so")]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert ("one thread" in said) == (lacking != "-mavx2")
    assert ("x86-64-v3" in said) <= (lacking == "-fopenmp")
