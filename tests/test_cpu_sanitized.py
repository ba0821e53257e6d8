"""The C code under AddressSanitizer and UBSan: `python -m tests.test_cpu_sanitized 10000` for more calls."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from syncbn.backends.native import compiling

FUZZ = Path(__file__).parent / "support" / "cpu_fuzz.c"
SANITIZERS = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def build(folder: Path) -> tuple[Path, str]:
    """The program that calls the library with random shapes, or why there is none."""
    why = "no C compiler here has the sanitizers"
    for compiler in compiling.compilers():
        command = [*compiler, *compiling.FLAGS, *SANITIZERS]
        program = folder / "fuzz"
        try:
            given = compiling.objects(command, folder)
        except compiling.Failed as failed:
            why = str(failed)
            continue
        link = [*command, f"-I{compiling.HERE}", str(FUZZ), *given, "-o", str(program)]
        done = subprocess.run(link, capture_output=True, text=True, check=False)
        if done.returncode == 0 and (done := run(program, 0, 0)).returncode == 0:
            return program, ""
        why = f"a sanitized program cannot be made or started: {done.stderr.strip()[-200:]}"
    return Path(), why


def run(program: Path, seed: int, calls: int) -> subprocess.CompletedProcess[str]:
    # libgomp's threads live on until the process ends, which is no leak
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "4"}
    command = [str(program), str(seed), str(calls)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.skipif(os.name != "posix", reason="the library is made on POSIX systems only")
def test_nothing_is_read_or_written_outside(tmp_path: Path) -> None:
    """Random shapes, dtypes, extras, bits and alignments on up to four threads, at every instruction set: no report."""
    program, why = build(tmp_path)
    if why:
        pytest.skip(why)
    done = run(program, 0, 400)
    assert (done.returncode, done.stdout) == (0, "400 calls\n"), done.stderr[-2000:]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        built, missing = build(Path(name))
        sys.exit(missing or run(built, 1, int(sys.argv[1])).returncode)
