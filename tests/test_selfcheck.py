"""The self-check: green where all is well, red where something is not."""

import os
import subprocess
import sys

import pytest
import torch

from syncbn import backends, direct, selfcheck
from tests.support.cpu_backends import HAS_LIBRARY, ON_CPU


def test_two_ranks_are_right() -> None:
    """Under torchrun, two CPU ranks pass every row and say what they ran on."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "syncbn.selfcheck",
    ]
    done = subprocess.run(
        [*command, "--device", "cpu"], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "ranks 2   transport gloo" in done.stdout
    assert f"torch {torch.__version__}   device cpu" in done.stdout
    assert f"back-end {ON_CPU} ({'native code for' if HAS_LIBRARY else 'plain torch operations'}" in done.stdout
    assert done.stdout.count(" ok\n") == 24
    assert "all 48 checks are right" in done.stdout


@pytest.mark.parametrize("verb", ["batch_sums", "normalize", "grad_sums", "grad_input"])
def test_a_defect_is_a_red_row(verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A verb that is off by 1e-4 turns rows wrong and the exit code to 1."""
    verbs = backends._load(ON_CPU)
    original = getattr(verbs, verb)
    monkeypatch.setattr(direct, "normalize", lambda *_: None)  # which does not go through it

    def mutant(*arguments):
        result = original(*arguments)
        first = result[0] if isinstance(result, tuple) else result
        with torch.no_grad():
            first *= 1 + 1e-4
        return result

    monkeypatch.setattr(verbs, verb, mutant)
    assert selfcheck.main(["--device", "cpu"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_alone_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    """Without torchrun the same checks run in this process."""
    assert selfcheck.main(["--device", "cpu"]) == 0
    assert "this process is alone" in capsys.readouterr().out
