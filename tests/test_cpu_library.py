"""The CPU library: which way CPU tensors go, what is loaded, and that no address is passed unchecked."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from syncbn.backends import cpu_library
from syncbn.backends.cpu_library import Library, address, address_like
from syncbn.backends.native import compiling
from tests.support.cpu_backends import needs_library

ROOT = Path(__file__).parent.parent
PROBE = """
import logging, torch, syncbn
from syncbn import backends
logging.basicConfig(level=logging.DEBUG)
print(backends.name_for(torch.empty(0)))
print(syncbn.SyncBatchNorm(3)(torch.randn(4, 3, 5)).isfinite().all().item())
"""


def chosen(choice: str | None) -> subprocess.CompletedProcess[str]:
    """A process that says which back-end serves the CPU, with this SYNCBN_CPU."""
    environment = {name: value for name, value in os.environ.items() if name != "SYNCBN_CPU"}
    if choice is not None:
        environment["SYNCBN_CPU"] = choice
    command = [sys.executable, "-c", PROBE]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)


def test_torch_alone_may_be_chosen() -> None:
    """SYNCBN_CPU=torch does without the library, and the debug log says so."""
    done = chosen("torch")
    assert done.stdout.split() == ["reference", "True"]
    assert "CPU tensors take plain torch operations: SYNCBN_CPU is torch" in done.stderr


@needs_library
@pytest.mark.parametrize("choice", [None, "native"])
def test_the_library_serves_where_it_is(choice: str | None) -> None:
    """By default and if it is asked for, and the debug log says for which processors it was made."""
    done = chosen(choice)
    assert done.stdout.split() == ["cpu", "True"]
    assert "CPU tensors take native code for " in done.stderr


def test_another_choice_is_refused() -> None:
    """What SYNCBN_CPU may be is said."""
    done = chosen("gpu")
    assert "ValueError: SYNCBN_CPU must be native or torch, or not be set; got 'gpu'. Unset it." in done.stderr


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A process that has not looked for the library yet."""
    monkeypatch.delenv("SYNCBN_CPU", raising=False)
    cpu_library.found.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    cpu_library.found.cache_clear()


def missing(path: Path) -> None:
    """Nothing is there."""


def no_library(path: Path) -> None:
    path.write_bytes(b"\x7fELF, but no more than that")


def another(path: Path) -> None:
    made(path, "int one(void) { return 1; }")


def stale(path: Path) -> None:
    names = "".join(f"int syncbn_{name}(const void* call) {{ return 0; }}\n" for name in cpu_library.VERBS)
    texts = 'const char* syncbn_fields(void) { return "x y"; }\nconst char* syncbn_source(void) { return "old"; }\n'
    made(
        path, names + texts + "int syncbn_use_level(int most) { return 0; }\nint syncbn_has_threads(void) { return 0; }"
    )


def made(path: Path, text: str) -> None:
    """A library of this C text."""
    compiler = next(compiling.compilers(), None)
    if compiler is None:
        pytest.skip("there is no C compiler")
    source = path.with_suffix(".c")
    source.write_text(text)
    subprocess.run([*compiler, "-shared", "-fPIC", str(source), "-o", str(path)], check=True)


@pytest.mark.parametrize(
    ("there", "text"),
    [
        (missing, "is not there"),
        (no_library, "short|invalid|truncated|not a"),
        (another, "is another library: .*syncbn_fields"),
        (stale, "was made of other C files"),
    ],
)
def test_what_does_not_fit_does_not_serve(
    tmp_path: Path,
    anew: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    there: Callable[[Path], None],
    text: str,
) -> None:
    """No library, no proper one, a foreign one and one of other sources: plain torch operations, and why in the log;
    SYNCBN_CPU=native is an error that says the same.
    """
    path = tmp_path / "lib.so"
    there(path)
    with pytest.raises(OSError, match=text):
        Library(path)
    anew.setattr(Library, "__init__", lambda self, original=Library.__init__: original(self, path))
    with caplog.at_level("DEBUG", "syncbn"):
        assert cpu_library.library() is None
    assert "CPU tensors take plain torch operations, which are slower" in caplog.text
    assert "python -m syncbn.backends.native" in caplog.text
    cpu_library.found.cache_clear()
    anew.setenv("SYNCBN_CPU", "native")
    with pytest.raises(RuntimeError, match="SYNCBN_CPU=native needs the CPU library, but "):
        cpu_library.library()


X = torch.zeros(4, 3, 5, 6)
WRONG: dict[str, Callable[[], Any]] = {
    "another size": lambda: address("t", torch.zeros(4), 5),
    "another dtype": lambda: address("t", torch.zeros(4, dtype=torch.int32), 4),
    "gaps": lambda: address("t", torch.zeros(8)[::2], 4),
    "another device": lambda: address("t", torch.zeros(4, device="meta"), 4),
    "an odd address": lambda: address("t", misplaced(4), 4),
    "an activation of another shape": lambda: address_like("t", torch.zeros(4, 3, 6, 5), X, False),
    "of another dtype": lambda: address_like("t", X.double(), X, False),
    "in another format": lambda: address_like("t", X.contiguous(memory_format=torch.channels_last), X, False),
    "no rows": lambda: address_like("t", X, X, True),
    "with gaps": lambda: address_like("t", torch.zeros(4, 3, 5, 7)[..., :6], X, False),
    "at an odd address": lambda: address_like("t", misplaced(360).view(4, 3, 5, 6), X, False),
}


def misplaced(count: int) -> Tensor:
    """float32 numbers that do not begin at a multiple of four bytes."""
    return torch.frombuffer(bytearray(4 * count + 1), dtype=torch.float32, offset=1)


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_no_address_is_passed_unchecked(wrong: Callable[[], Any]) -> None:
    """What C would read or write as something else is an error in Python."""
    with pytest.raises((RuntimeError, NotImplementedError), match=r"This is a mistake of syncbn|meta"):
        wrong()
