"""The house's plan: arrows, light import, public names, back-end signatures, sizes."""

import ast
import graphlib
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import syncbn
from syncbn import backends

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "syncbn"
LEVELS = [
    "__init__",
    "selfcheck",
    "latency",
    "compat",
    "statistics",
    "measured",
    "report",
    "convert",
    "freeze",
    "refusals",
    "swap",
    "classes",
    "watched",
]
LEVELS += [
    "loader",
    "emptied",
    "module",
    "functional",
    "symbolic",
    "checks",
    "check_tensors",
    "direct",
    "autograd",
    "composed",
    "recompute",
    "calls",
    "profile",
    "inspection",
    "watch",
    "mixups",
    "progress",
    "bounded",
    "whereabouts",
    "fingerprint",
    "names",
    "comm",
    "groups",
    "backends",
    "formulas",
    "torch_private",
]
"""From top to bottom; a file imports from lower ones only."""


def imports_of(path: Path) -> set[str]:
    """Every module name imported anywhere in the file, as `a.b` for `from a import b`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def level_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    """A file imports only from levels below its own (back-ends from one another)."""
    own = LEVELS.index(level_of(path))
    for name in imports_of(path):
        if name.startswith("syncbn.") and (target := name.split(".")[1]) in LEVELS:
            below = LEVELS.index(target)
            assert below > own or level_of(path) == target == "backends", f"{name} is not below {LEVELS[own]}"


def test_nobody_above_imports_a_back_end() -> None:
    """Files above backends/ ask the package, which chooses and loads; a bounded table of what was seen is its alone."""
    allowed = {"syncbn.backends.recent", "syncbn.backends.native"}
    backs = {path.stem for path in (SOURCE / "backends").glob("*.py")} - {"__init__"}
    for path in SOURCE.rglob("*.py"):
        if level_of(path) != "backends":
            named = {name for name in imports_of(path) if re.match(r"syncbn\.backends\.(\w+)", name)}
            found = {name for name in named if name.split(".")[2] in backs and not name.startswith(tuple(allowed))}
            assert found == set(), path


def test_only_comm_talks_to_other_ranks() -> None:
    """torch.distributed is used by comm.py and groups.py alone; elsewhere only the type ProcessGroup is named."""
    for path in SOURCE.rglob("*.py"):
        used = {name for name in imports_of(path) if name.startswith("torch.distributed")}
        if path.name not in ("comm.py", "groups.py", "selfcheck.py"):
            assert used <= {"torch.distributed", "torch.distributed.ProcessGroup"}, path


PROBE = """
import sys, torch
{}
print('triton' in sys.modules, torch.cuda.is_initialized(), torch.distributed.is_initialized())
"""


def _after(statement: str) -> str:
    command = [sys.executable, "-c", PROBE.format(statement)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()


def test_import_is_light() -> None:
    """Importing syncbn loads no triton, starts no device and no process group."""
    assert _after("import syncbn") == "False False False"


def test_the_light_import_test_can_fail() -> None:
    """The same probe sees a triton that was loaded and a group that was started."""
    start = "import torch.distributed as d; d.init_process_group('gloo', store=d.HashStore(), rank=0, world_size=1)"
    assert _after(f"sys.modules['triton'] = sys; {start}") == "True False True"


def test_public_names() -> None:
    """__all__ is sorted, complete and true."""
    assert syncbn.__all__ == sorted(syncbn.__all__, key=lambda n: (not n[0].isupper(), n))
    assert all(hasattr(syncbn, name) for name in syncbn.__all__)


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("verb", ["batch_sums", "normalize", "grad_sums", "grad_input"])
def test_backends_have_the_protocols_signatures(name: str, verb: str) -> None:
    """Names and order of a back-end's arguments are the Protocol's."""
    ours = inspect.signature(getattr(backends._load(name), verb))
    protocol = inspect.signature(getattr(backends.Backend, verb))
    assert list(ours.parameters) == list(protocol.parameters)[1:]


def test_an_unknown_backend_is_named() -> None:
    """Forcing a back-end that there is not says which there are."""
    with backends.force("tpu"), pytest.raises(ValueError, match="no back-end named 'tpu'"):
        backends._load("tpu")


def python_files() -> list[Path]:
    return sorted(p for folder in ("syncbn", "launch", "tests", "benchmarks") for p in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_outgrows_its_limit(path: Path) -> None:
    """300 lines a file, 40 a function (80 a kernel)."""
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.body[0].lineno + 1
            if isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant):
                length = node.end_lineno - node.body[0].end_lineno
            limit = 80 if any("jit" in ast.unparse(d) for d in node.decorator_list) else 40
            assert length <= limit, f"{node.name} has {length} lines"


BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda p: p.name)
def test_a_file_of_the_benchmarks_is_short(path: Path) -> None:
    """150 lines at most."""
    assert len(path.read_text().splitlines()) <= 150


def circle(paths: list[Path]) -> list[str]:
    """Files of benchmarks/ that import one another in a circle, inside of functions too; empty without one."""
    names = {path.stem for path in paths}
    graph = {}
    for path in paths:
        parts = [name.split(".") for name in imports_of(path)]
        graph[path.stem] = {part[1] for part in parts if part[0] == "benchmarks" and part[1:]} & names
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_benchmark_imports_itself_through_others() -> None:
    """The files of benchmarks/ have an order in which each imports earlier ones only."""
    assert circle(BENCHMARKS) == []


def test_a_circle_is_seen(tmp_path: Path) -> None:
    """Also where one of the imports is in a function, as between layer.py and layer_gpu.py once."""
    layer, layer_gpu = tmp_path / "layer.py", tmp_path / "layer_gpu.py"
    layer.write_text("def main():\n    from benchmarks import layer_gpu\n")
    layer_gpu.write_text("import benchmarks.harness\nfrom benchmarks.layer import COLUMNS, write\n")
    assert set(circle([layer, layer_gpu])) == {"layer", "layer_gpu"}
    assert circle([layer_gpu]) == []


@pytest.mark.parametrize("path", sorted((SOURCE / "backends" / "native").glob("*.[ch]")), ids=lambda p: p.name)
def test_c_files_keep_the_limits(path: Path) -> None:
    """300 lines a file of 120 characters, 40 a function."""
    lines = path.read_text().splitlines()
    assert len(lines) <= 300
    assert max(map(len, lines)) <= 120
    starts = [number for number, line in enumerate(lines) if line.endswith(") {") and not line[0].isspace()]
    assert all(lines.index("}", start) - start <= 41 for start in starts)


def test_the_top_level_holds_what_the_plan_says() -> None:
    """Five folders and files, license and changelog, and what begins with a dot: nothing that a test left is kept."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a checkout, or no git to ask what is kept")
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
    kept = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    tops = {name.split("/")[0] for name in kept.split("\0") if name and not name.startswith(".")}
    assert tops == {"pyproject.toml", "syncbn", "launch", "tests", "benchmarks", "README.md", "LICENSE", "CHANGELOG.md"}


def test_changelog_is_of_this_version() -> None:
    """The newest heading of CHANGELOG.md is the package's version."""
    headings = re.findall(r"^## \[?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == syncbn.__version__
