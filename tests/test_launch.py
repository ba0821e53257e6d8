"""The shell scripts of launch/: what they start, what they refuse, and that nothing is left running."""

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.launching import LAUNCH, ROOT, environment, run, write_cifar10

SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), ROOT / "tests" / "run.sh"])
NODES = {"NNODES": "1", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Options for the shortest real training, and the log that it writes."""
    write_cifar10(tmp_path / "data", images=2)
    log = str(tmp_path / "log.jsonl")
    return ["--data", "cifar10", "--data-dir", str(tmp_path / "data"), "--epochs", "1", "--log-file", log]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    """Bash accepts every script, to its last line."""
    run("bash", "-n", script)


def test_single_node_trains_on_two_cpu_ranks(tiny: list[str]) -> None:
    """Without GPUs single_node.sh gives 2 gloo ranks, which warn about nothing and may use bfloat16 and NHWC."""
    done = run("bash", LAUNCH / "single_node.sh", *tiny, "--norm", "instance", "--amp", "--channels-last")
    row = json.loads(Path(tiny[-1]).read_text())
    assert (row["ranks"], row["backend"], row["norm"], row["amp"]) == (2, "gloo", "instance", True)
    assert "UserWarning" not in done.stderr


def test_two_nodes_meet(tiny: list[str]) -> None:
    """multi_node.sh, started twice with NODE_RANK 0 and 1, trains one model on two ranks of two nodes."""
    meeting = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "NPROC": "1"}
    command = ["bash", str(LAUNCH / "multi_node.sh"), *tiny, "--norm", "group"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    nodes = [subprocess.Popen(command, env=environment(**meeting, NODE_RANK=str(r)), **pipes) for r in (0, 1)]
    texts = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(texts)
    row = json.loads(Path(tiny[-1]).read_text())
    assert (row["ranks"], row["norm"]) == (2, "group")
    assert "epoch 1: accuracy" in texts[0]
    assert "epoch" not in texts[1]


@pytest.mark.parametrize("missing", sorted(NODES))
def test_a_missing_variable_is_named_at_once(missing: str) -> None:
    """multi_node.sh ends with code 2, the name of what is missing and an example, before it starts anything."""
    given = {name: "" if name == missing else value for name, value in NODES.items()}
    began = time.monotonic()
    done = run("bash", LAUNCH / "multi_node.sh", code=2, **given)
    assert time.monotonic() - began < 2
    assert f"missing: {missing}. For example:\n    NNODES=2 NODE_RANK=0" in done.stderr


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"NODE_RANK": "1"}, "NODE_RANK counts from 0, so it must be below NNODES=1; got 1."),
        ({"NNODES": "two"}, "NNODES must be an integer of at least 1; got 'two'."),
        ({"NPROC": "0"}, "NPROC must be an integer of at least 1; got '0'."),
        ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS must be an integer of at least 0; got '-1'."),
        ({"PYTHON": "/no/python"}, "PYTHON must be a Python interpreter; got '/no/python'."),
    ],
)
def test_wrong_variables_are_refused(changed: dict[str, str], text: str) -> None:
    """A variable with a wrong value ends multi_node.sh with code 2 and what it must be."""
    assert text in run("bash", LAUNCH / "multi_node.sh", code=2, **{**NODES, "NPROC": "1", **changed}).stderr


def test_an_error_is_said_once(tmp_path: Path) -> None:
    """What is wrong on both ranks is one message, without a traceback, and the ranks' exit code."""
    options = ["--data", "cifar10", "--data-dir", str(tmp_path)]
    done = run("bash", LAUNCH / "single_node.sh", *options, code=2, NPROC="2")
    assert done.stderr.count("train.py: error: --data cifar10 needs the files") == 1
    assert "Traceback" not in done.stderr


def test_interrupt_leaves_no_process_and_no_traceback(tmp_path: Path) -> None:
    """Ctrl-C in the middle of a training ends both ranks and the launcher, with code 130."""
    mark = f"--save={tmp_path}/never.pt"  # in the command line of each process of this run
    command = ["bash", str(LAUNCH / "single_node.sh"), "--epochs", "1000", "--batch-size", "400", mark]
    new = {"start_new_session": True, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen(command, env=environment(NPROC="2"), **pipes, **new) as node:
        try:
            assert node.stdout is not None
            seen = next((line for line in node.stdout if line.startswith("epoch 1:")), None)
            running = processes(mark)
            os.killpg(node.pid, signal.SIGINT)  # as a terminal does
            _, errors = node.communicate(timeout=60)
        finally:
            node.terminate()
    assert seen is not None, errors
    assert len(running) == 3
    assert node.returncode == 130
    assert "Traceback" not in errors
    assert processes(mark) == []


def processes(mark: str) -> list[str]:
    """The running processes with mark in their command line."""
    listed = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if mark in line]


def stub(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def test_slurm_starts_a_node_script_per_task(tmp_path: Path) -> None:
    """slurm.sbatch hands every task its rank, the first host, a port, the GPU count, the restarts and all arguments."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    stub(tmp_path / "bin" / "scontrol", "printf 'n%d\\n' {7..20000}")  # more than a pipe holds
    stub(tmp_path / "bin" / "srun", 'for i in 0 1; do SLURM_NODEID=$i "${@:2}"; done')
    stub(
        tmp_path / "launch" / "multi_node.sh",
        'echo "$NNODES $NODE_RANK $MASTER_ADDR $MASTER_PORT $NPROC $MAX_RESTARTS"; printf "<%s>" "$@"; echo',
    )
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[7-8]"}
    job |= {"SLURM_JOB_ID": "123456", "SLURM_GPUS_ON_NODE": "4", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    for given, restarts in (({}, 0), ({"MAX_RESTARTS": "3"}, 3)):
        lines = run(
            "bash", tmp_path / "launch" / "slurm.sbatch", "--data-dir", "a b", **job, **given
        ).stdout.splitlines()
        assert lines[::2] == [f"2 0 n7 23456 4 {restarts}", f"2 1 n7 23456 4 {restarts}"]
        assert lines[1::2] == ["<--data-dir><a b>", "<--data-dir><a b>"]


def test_slurm_script_must_be_submitted_from_the_root(tmp_path: Path) -> None:
    """Elsewhere slurm.sbatch ends with code 2 and says where it was."""
    done = run("bash", LAUNCH / "slurm.sbatch", code=2, SLURM_SUBMIT_DIR=str(tmp_path))
    assert f"must be submitted from the repository's root; got {tmp_path}" in done.stderr


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--everything"], "there is no option '--everything'."),
        (["--seeds"], "--seeds takes an integer of at least 1; got ''."),
        (["--seeds", "0"], "--seeds takes an integer of at least 1; got '0'."),
    ],
)
def test_quickstart_refuses_wrong_options(options: list[str], text: str) -> None:
    """A wrong option ends quickstart.sh with code 2, what is wrong with it and the usage, before it installs."""
    done = run("bash", LAUNCH / "quickstart.sh", *options, code=2)
    assert done.stderr.startswith(f"quickstart.sh: {text}\nusage: bash launch/quickstart.sh")
    assert done.stdout == ""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A copy of the repository's root whose .venv is this interpreter and whose training only writes its log."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    stub(tmp_path / ".venv" / "bin" / "activate", f'PATH="{Path(sys.executable).parent}:$PATH"')
    stamp = 'echo "train $(cat pyproject.toml launch/constraints.txt | cksum)" >.venv/installed-train'
    subprocess.run(["bash", "-c", stamp], cwd=tmp_path, check=True)
    stub(tmp_path / "launch" / "single_node.sh", 'echo "$NPROC $*" >>calls\npython launch/fake.py "$@"')
    (tmp_path / "launch" / "fake.py").write_text(FAKE)
    return tmp_path


FAKE = """
import json, sys
o = dict(zip(sys.argv[1::2], sys.argv[2::2]))
norm, seed, epochs = o["--norm"], int(o["--seed"]), int(o["--epochs"])
row = {"machine": "m", "torch": "t", "data": "digits", "norm": norm, "seed": seed, "ranks": 2, "batch_per_rank": 2}
for epoch in range(1, epochs + 1):
    accuracy = {"batch": 0.5, "syncbn": 0.9, "instance": 0.3, "group": 0.7}[norm] + 0.01 * seed
    more = {"epochs": epochs, "epoch": epoch, "accuracy": accuracy, "loss": 1 / epoch, "ms_per_step": 10.0 * epoch}
    print(json.dumps(row | more), file=open(o["--log-file"], "a"))
"""


def test_quickstart_compares_the_norms(installed: Path) -> None:
    """quickstart.sh --all --seeds 2 trains 4 norms x 2 seeds on 2 x 2 images, with table, CSV and plot at the end."""
    done = run("bash", installed / "launch" / "quickstart.sh", "--all", "--seeds", "2", "--epochs", "3")
    calls = (installed / "calls").read_text().splitlines()
    expected = [(norm, seed) for seed in (0, 1) for norm in ("batch", "syncbn", "instance", "group")]
    common = "--batch-size 2 --epochs 3"
    assert calls == [f"2 --norm {n} {common} --seed {s} --log-file out/quickstart.jsonl" for n, s in expected]
    lines = done.stdout.splitlines()
    assert "SyncBatchNorm 90.50 ± 0.71 % 0.3333 ± 0.0000 20.0 ± 0.0".split() in [line.split() for line in lines]
    assert lines[-2:] == ["runs: out/quickstart.csv", "plot: out/quickstart.png"]
    with (installed / "out" / "quickstart.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["norm"], int(row["seed"])) for row in rows] == expected
    assert rows[1]["accuracy"] == "0.90000"
    assert (installed / "out" / "quickstart.png").read_bytes().startswith(b"\x89PNG")


def test_quickstart_forgets_an_earlier_run(installed: Path) -> None:
    """A second quickstart.sh reports its own runs only, and one seed has no spread."""
    for _ in range(2):
        done = run("bash", installed / "launch" / "quickstart.sh", "--epochs", "1")
    table = [line.split() for line in done.stdout.splitlines() if "BatchNorm" in line]
    assert [cells[:3] for cells in table] == [["BatchNorm", "50.00", "%"], ["SyncBatchNorm", "90.00", "%"]]
    assert "±" not in done.stdout
    assert len((installed / "out" / "quickstart.jsonl").read_text().splitlines()) == 2


EXAMPLE = """
import sys
print(sys.argv[-1], "starts")
print("progress\\n\\na table of", sys.argv[-1])
"""


def test_examples_end_with_their_tables(installed: Path) -> None:
    """examples.sh runs both on 2 ranks and repeats what each printed after its progress; a failing one ends it."""
    stamp = (
        'echo "train,sequences $(cat pyproject.toml launch/constraints.txt | cksum)" >.venv/installed-train,sequences'
    )
    subprocess.run(["bash", "-c", stamp], cwd=installed, check=True)
    calls = 'import sys\nopen("calls", "a").write(" ".join(sys.argv[1:]) + "\\n")\n'
    (installed / "launch" / "torchrun.py").write_text(calls + EXAMPLE)
    done = run("bash", installed / "launch" / "examples.sh")
    both = ("launch/train_sequences.py", "launch/train_vae.py --all --png out/vae.png")
    assert (installed / "calls").read_text().splitlines() == [
        f"--standalone --nproc-per-node 2 {name}" for name in both
    ]
    assert done.stdout.splitlines()[-4:] == ["", "a table of launch/train_sequences.py", "", "a table of out/vae.png"]
    (installed / "launch" / "torchrun.py").write_text("raise SystemExit(3)")
    run("bash", installed / "launch" / "examples.sh", code=3)


def test_examples_refuses_options() -> None:
    """There are none, but --help."""
    done = run("bash", LAUNCH / "examples.sh", "--epochs", code=2)
    assert done.stderr.startswith("examples.sh: there is no option '--epochs'.\nusage: bash launch/examples.sh")
    assert "usage: bash launch/examples.sh" in run("bash", LAUNCH / "examples.sh", "--help").stdout
