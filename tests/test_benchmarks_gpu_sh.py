"""gpu.sh: its parts, their seconds, what is left when some fail; and all of it for real on tiny shapes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import host, kernels, step, tables
from tests.support import stub_device

ROOT = Path(__file__).parent.parent
FIRST = {
    "versions": 5,
    "precompile": 35,
    "smoke": 25,
    "kernels": 105,
    "layer": 105,
    "host": 15,
    "step": 70,
    "tests": 100,
}
SECOND = {"memcheck": 80, "racecheck": 50, "ncu": 40, "compile": 150}
FAKE = """#!/bin/bash
echo "$@" >>"$CALLS"
case "$*" in
$SLOW) sleep 30 ;;
$BROKEN) exit 3 ;;
*benchmarks.kernels*) echo a,b >"$OUT/kernels-here.csv" ;;
esac
"""


class Run:
    """gpu.sh with a python that notes how it is called; broken and slow are patterns of calls that fail or hang."""

    def __init__(self, folder: Path, *parts: str, broken: str = "none", slow: str = "none", **extra: str) -> None:
        python, calls = folder / "python", folder / "calls"
        python.write_text(FAKE.replace("$SLOW", slow).replace("$BROKEN", broken))
        python.chmod(0o755)
        calls.unlink(missing_ok=True)
        self.out = folder / "out"
        given = {"PYTHON": str(python), "CALLS": str(calls), "OUT": str(self.out), "MACHINE": "here"}
        environment = {k: v for k, v in os.environ.items() if k not in ("TOTAL", "SMOKE", "DEVICE", "TESTS")}
        done = subprocess.run(
            ["bash", "benchmarks/gpu.sh", *parts],
            cwd=ROOT,
            env={**environment, **given, **extra},
            capture_output=True,
            text=True,
            timeout=60,
        )
        self.status, self.log, self.errors = done.returncode, done.stdout, done.stderr
        self.calls = calls.read_text().splitlines() if calls.exists() else []
        self.seconds = {name: int(s) for name, s in re.findall(r"=== (\w+): at most (\d+) s", self.log)}

    def script(self, name: str) -> str:
        """The one call of a benchmark."""
        (call,) = [call for call in self.calls if call.startswith(f"-m benchmarks.{name} ")]
        return call


def test_first_and_second_are_lists_of_parts(tmp_path: Path) -> None:
    """Each part gets its seconds, in order, within 460 and 320 s; together they leave few files and exit with 0."""
    first, second = Run(tmp_path, "first"), Run(tmp_path, "second")
    assert (first.status, second.status) == (0, 0), first.log + second.log
    assert list(first.seconds.items()) == list(FIRST.items())
    unwatched = {name: s for name, s in SECOND.items() if name in second.seconds}
    assert list(second.seconds.items()) == list(unwatched.items())
    assert (sum(FIRST.values()), sum(SECOND.values())) == (460, 320)
    for script in ("kernels", "layer", "host", "step"):
        assert f"--device cuda --out {first.out} --machine here --budget" in first.script(script)
    assert "--compiled" not in " ".join(first.calls)
    assert "--budget 90" in first.script("kernels")
    assert "--budget 32" in first.script("precompile")
    assert "--budget 40" in second.script("every_kernel")
    assert "--device cuda" in second.script("compile")
    names = {path.name for path in first.out.iterdir()}
    assert names == {"log.txt", "kernels-here.csv", "parts-here.csv"}
    log = (first.out / "log.txt").read_text()
    assert "=== kernels: exit status 0" in log
    assert "=== compile: exit status 0" in log
    assert not re.search(r"\{(budget|half|most)\}", "\n".join(first.calls + second.calls))


def test_pytest_is_told_to_go_on(tmp_path: Path) -> None:
    """Warnings are not errors, a test may hang for a minute where that can be told, and few failures do not end it."""
    calls = [call for call in Run(tmp_path, "smoke", "tests", TESTS="tests/x.py").calls if "-m pytest" in call]
    assert [call.split()[2] for call in calls] == ["tests/test_gpu_device.py", "tests/x.py"]
    for call in calls:
        for option in ("-m gpu", "-W default", "--maxfail=40", "-rfE", "--timeout=60", "-p no:cacheprovider"):
            assert option in call
    without = Run(tmp_path, "tests", broken='"-c import pytest_timeout"')
    assert "--timeout" not in "".join(call for call in without.calls if "-m pytest" in call)


def test_parts_can_be_run_alone(tmp_path: Path) -> None:
    """A part may be named, with its own seconds or others; a name that is none says which there are."""
    run = Run(tmp_path, "kernels:60", "layer", "tests:80")
    assert run.seconds == {"kernels": 60, "layer": 105, "tests": 80}
    for word in ("kernel", "kernels:", "kernels:x", "first:3"):
        run = Run(tmp_path, word)
        assert (run.status, run.calls) == (2, [])
        assert f"There is no part {word}; there are first, second and versions:5" in run.errors


def test_what_is_there_is_added_to(tmp_path: Path) -> None:
    """Run again into the same folder, a script appends, and so does the log."""
    first, again = Run(tmp_path, "kernels"), Run(tmp_path, "kernels")
    assert "--append" not in first.script("kernels")
    assert again.script("kernels").endswith("--append")
    assert (again.out / "log.txt").read_text().count("=== kernels: exit status 0") == 2


def test_a_total_shortens_and_skips(tmp_path: Path) -> None:
    """What does not fit into TOTAL is shortened, then skipped by name, which is not clean."""
    run = Run(tmp_path, "kernels", "layer", TOTAL="60")
    assert run.seconds["kernels"] == 60
    assert 55 <= run.seconds["layer"] <= 60
    run = Run(tmp_path, "kernels", TOTAL="4")
    assert (run.status, run.seconds) == (1, {})
    assert "=== kernels: skipped, no time left" in run.log
    assert "not clean: kernels" in run.log


def test_what_fails_or_hangs_costs_the_others_nothing(tmp_path: Path) -> None:
    """A part that fails, or is stopped at its end, is named in the end; all others run; the exit status tells."""
    run = Run(tmp_path, "precompile", "kernels", "layer:6", "step", broken="*precompile*|*step*", slow="*layer*")
    assert run.status == 1
    assert "=== precompile: exit status 3" in run.log
    assert "=== layer: exit status 124" in run.log
    assert "not clean: precompile layer step" in run.log
    rows = tables.read_rows(run.out / "parts-here.csv")
    assert {row["part"]: row["status"] for row in rows} == {
        "precompile": "3",
        "kernels": "0",
        "layer": "124",
        "step": "3",
    }
    assert all(row["machine"] == "here" and row["commit"] and int(row["seconds"]) <= 7 for row in rows)
    assert run.calls[-1] == f"-m benchmarks.summary {run.out}"
    assert "kernels-here.csv" in {path.name for path in run.out.iterdir()}


def test_sanitizers_and_profiler_are_used_where_they_are(tmp_path: Path) -> None:
    """Each sanitizer watches every kernel, without caching; ncu writes what two kernels do to one file."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("compute-sanitizer", "ncu"):
        (tools / name).write_text('#!/bin/sh\necho "$0 caching off: $PYTORCH_NO_CUDA_MEMORY_CACHING $@"')
        (tools / name).chmod(0o755)
    run = Run(tmp_path, "memcheck:20", "racecheck", "ncu", PATH=f"{tools}:{os.environ['PATH']}")
    assert run.status == 0, run.log
    parts = [(row["part"], row["status"]) for row in tables.read_rows(run.out / "parts-here.csv")]
    assert parts == [("memcheck", "0"), ("racecheck", "0"), ("ncu", "0")]
    for tool, half in (("memcheck", 10), ("racecheck", 25)):
        (said,) = [line for line in run.log.splitlines() if line.startswith(f"{tools}/") and f"--tool {tool}" in line]
        assert "caching off: 1 " in said
        assert f"-m benchmarks.every_kernel --device cuda --budget {half}" in said
    (said,) = [line for line in run.log.splitlines() if line.startswith(f"{tools}/ncu")]
    assert "caching off:  --clock-control none --kernel-name regex:batch_sums|grad_sums" in said
    assert f"--log-file {run.out}/ncu.txt" in said
    assert "every_kernel --large" in said


def test_the_smoke_tests_are_a_few_of_each_kind() -> None:
    """What the part smoke selects: each kernel in each layout, the same bits, graphs, streams."""
    chosen = re.search(r'first_tests="(.*)"', (ROOT / "benchmarks/gpu.sh").read_text())
    assert chosen is not None
    command = [sys.executable, "-m", "pytest", "tests/test_gpu_device.py", "--collect-only", "-q", "-k", chosen[1]]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in ("bits_repeat", "graph_replay[0.1-8]", "streams_do_not_share_workspaces"):
        assert listed.count(f"::test_{name}") == 1
    for layout in ("contiguous", "channels_last"):
        assert 3 <= listed.count(f"{layout}]") <= 6
    assert 8 <= listed.count("::test_") <= 20


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Its parts for real, tiny, on CPU, but for those whose scripts another file runs."""
    folder = tmp_path_factory.mktemp("gpu")
    given = {"SMOKE": "1", "DEVICE": "cpu", "MACHINE": "here", "PYTHON": sys.executable, "OUT": str(folder / "out")}
    given |= {"TESTS": "tests/test_gpu_device.py", "TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    parts = ("versions", "smoke", "kernels", "host", "step", "tests", "memcheck", "racecheck", "ncu")
    command = ["bash", "benchmarks/gpu.sh", *parts]
    environment = {k: v for k, v in os.environ.items() if k != "TOTAL"}
    done = subprocess.run(
        command, cwd=ROOT, env={**environment, **given}, capture_output=True, text=True, timeout=600, check=False
    )
    return done, folder / "out"


WRITTEN = {
    "kernels": (kernels.COLUMNS, {"copy", "syncbn", "var_mean", "native_batch_norm", "native_batch_norm_backward"}),
    "step": (step.COLUMNS, {"nn.BatchNorm", "syncbn", "syncbn.fused", "syncbn.fused.forced"}),
    "host": (host.COLUMNS, {"nn.BatchNorm", "syncbn"}),
}
needs_stub = pytest.mark.skipif(bool(stub_device.why_not()), reason="without a GPU host.py needs the stub driver")


@needs_stub
def test_everything_runs_without_a_gpu(smoke: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    """On tiny shapes every part is clean, and the summary, two dozen lines at most, is the last that is said."""
    done, out = smoke
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not clean: none" in done.stdout
    assert "made 18 calls of all verbs, 0 wrong" in done.stdout or "no compute-sanitizer" not in done.stdout
    summary = done.stdout[done.stdout.index("\ngoals: ") :].strip().splitlines()
    assert len(summary) <= 24
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["log.txt", *(f"{name}-here.csv" for name in (*WRITTEN, "parts"))]
    )
    assert (out / "log.txt").read_text() == done.stdout
    parts = {row["part"]: row["status"] for row in tables.read_rows(out / "parts-here.csv")}
    assert set(parts.values()) == {"0"}
    assert ("unwatched" in parts) == ("no compute-sanitizer" in done.stdout) == ("memcheck" not in parts)


@pytest.mark.parametrize("script", [name for name in WRITTEN if name != "host"])
def test_rows_are_written(script: str, smoke: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    """Each script's file has its columns, a row for each variant, and times that are positive."""
    columns, names = WRITTEN[script]
    path = smoke[1] / f"{script}-here.csv"
    tables.check_columns(path, columns)
    rows = tables.read_rows(path)
    assert {row["variant"] for row in rows} == names
    assert all(float(row["ms"]) > 0 and row["commit"] and row["machine"] == "here" for row in rows)
