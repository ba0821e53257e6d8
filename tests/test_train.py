"""launch/train.py: its data, its evaluation, its training on one process and on two."""

import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.launching import FROM_A_LAUNCHER, TORCHRUN, TRAIN, forget_launched, launched, run, write_cifar10

EPOCH = ("--epochs", "1", "--lr", "0.005")
"""A quarter of the rate it would take: then roundings do not grow into units that switch on in one run only, which they
did on one kind of CPU, to a distance of 3e-4."""

LAUNCHED = ("batch", "syncbn")  # here; test_launch.py starts the others
Runs = dict[str, tuple[dict[str, Any], dict[str, Tensor]]]


@pytest.fixture(scope="module")
def train() -> Any:
    """The script as a module."""
    yield launched("train")
    forget_launched()


def call(train: ModuleType, *options: str) -> None:
    """The script in this process, as no launcher would start it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *options])
        for name in FROM_A_LAUNCHER:
            patch.delenv(name, raising=False)
        patch.setattr(torch.cuda, "device_count", lambda: 0)  # like the ranks it is compared with
        train.main()


def outcome(folder: Path, norm: str, *command: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The last log line and the state_dict of an epoch on the digits."""
    log, saved = folder / f"{norm}.jsonl", folder / f"{norm}.pt"
    run(*command, "--norm", norm, *EPOCH, "--log-file", log, "--save", saved)
    return json.loads(log.read_text().splitlines()[-1]), torch.load(saved)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What batch norm gives, unsynchronized and synchronized, on two gloo ranks with 25 images each."""
    folder = tmp_path_factory.mktemp("two_ranks")
    return {norm: outcome(folder, norm, *TORCHRUN, TRAIN, "--batch-size", "25") for norm in LAUNCHED}


@pytest.fixture(scope="module")
def one_process(train: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The state_dict that ordinary batch norm gives without a launcher, with 50 images."""
    saved = tmp_path_factory.mktemp("one") / "batch.pt"
    call(train, "--norm", "batch", *EPOCH, "--batch-size", "50", "--save", str(saved))
    return torch.load(saved)


@pytest.mark.parametrize("norm", LAUNCHED)
def test_two_ranks_train(two_ranks: Runs, norm: str) -> None:
    """An epoch of the digits on two gloo ranks is logged with what ran, and beats guessing."""
    row, _ = two_ranks[norm]
    assert (row["norm"], row["ranks"], row["batch_per_rank"], row["backend"]) == (norm, 2, 25, "gloo")
    assert row["accuracy"] > 0.15  # guessing gives 0.1
    assert row["ms_per_step"] > 0


@pytest.mark.parametrize("norm", LAUNCHED)
def test_aggregated_accuracy_is_exact(two_ranks: Runs, train: ModuleType, norm: str) -> None:
    """The two ranks' accuracy and loss over 599 test images are those of the saved model in one pass, none twice."""
    row, state = two_ranks[norm]
    data = train.load("digits", "")
    assert len(data.test_labels) % 2 == 1
    model = train.build(norm, 1)
    model.load_state_dict(state)
    model.eval()
    with torch.no_grad():
        logits = model((data.test_images.float() - data.mean[0]) / data.std[0])
    assert row["accuracy"] == (logits.argmax(1) == data.test_labels).double().mean().item()
    assert row["loss"] == pytest.approx(F.cross_entropy(logits.double(), data.test_labels).item(), rel=1e-5)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of two state_dicts' entries, in units of the entry's root mean square."""
    pairs = [(a[name].double(), b[name].double()) for name in a]
    return max(((x - y).abs().max() / y.square().mean().sqrt().clamp_min(1e-3)).item() for x, y in pairs)


def test_two_synchronized_ranks_train_like_one_process(two_ranks: Runs, one_process: dict[str, Tensor]) -> None:
    """SyncBatchNorm on 2 x 25 images gives the model of one process with 50; unsynchronized batch norm does not."""
    assert distance(two_ranks["syncbn"][1], one_process) < 1e-5  # measured 1e-6: fp32 rounding, grown over 24 steps
    assert distance(two_ranks["batch"][1], one_process) > 1e-1


def test_plain_batch_norm_is_what_gets_converted(train: ModuleType) -> None:
    """--norm syncbn is the batch model with every layer converted, and --norm batch has none that is."""
    import syncbn

    models = {norm: train.build(norm, 3) for norm in LAUNCHED}
    kinds = {
        norm: [type(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d)] for norm, model in models.items()
    }
    assert len(kinds["syncbn"]) == len(kinds["batch"]) == 6
    assert all(issubclass(kind, syncbn.SyncBatchNorm) for kind in kinds["syncbn"])
    assert set(kinds["batch"]) == {nn.BatchNorm2d}


@pytest.mark.parametrize("sub", [".", "cifar-10-batches-bin"])
def test_cifar10_is_read_as_written(train: ModuleType, tmp_path: Path, sub: str) -> None:
    """Labels and the planes of every record arrive in the order of the files, from the folder or the archive's."""
    written = write_cifar10(tmp_path / sub)
    data = train.load("cifar10", str(tmp_path))
    training = torch.cat([written[f"data_batch_{i}.bin"] for i in range(1, 6)])
    assert torch.equal(data.train_labels, training[:, 0].long())
    assert torch.equal(data.train_images.flatten(1), training[:, 1:])
    assert torch.equal(data.test_images.flatten(1), written["test_batch.bin"][:, 1:])
    assert data.test_images.shape == (4, 3, 32, 32)
    assert data.test_images[1, 2, 3, 4] == written["test_batch.bin"][1, 1 + 2 * 1024 + 3 * 32 + 4]


def test_missing_cifar10_says_where_to_get_it(train: ModuleType, tmp_path: Path) -> None:
    """The error names the missing files, the source and the folder they belong in."""
    write_cifar10(tmp_path)
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(ValueError, match=r"has no data_batch_3\.bin") as error:
        train.load("cifar10", str(tmp_path))
    text = str(error.value)
    assert "CIFAR-10 binary version, University of Toronto, https://www.cs.toronto.edu/~kriz/cifar.html" in text
    assert str(tmp_path) in text


@pytest.mark.parametrize("size", [0, 3073 * 2 - 1, 3073 + 1])
def test_truncated_cifar10_is_an_error(train: ModuleType, tmp_path: Path, size: int) -> None:
    """A file that is not a whole number of records is refused by name and size."""
    write_cifar10(tmp_path)
    path = tmp_path / "test_batch.bin"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"3073-byte records; .*test_batch.bin has {size} bytes"):
        train.load("cifar10", str(tmp_path))


def test_damaged_cifar10_is_an_error(train: ModuleType, tmp_path: Path) -> None:
    """A label above 9 is refused: the file is something else, or shifted."""
    write_cifar10(tmp_path)
    path = tmp_path / "data_batch_1.bin"
    path.write_bytes(b"\x0b" + path.read_bytes()[1:])
    with pytest.raises(ValueError, match=r"label from 0 to 9; .*data_batch_1.bin has one that starts with 11"):
        train.load("cifar10", str(tmp_path))


def test_augmentation_shifts_and_mirrors(train: ModuleType) -> None:
    """Every augmented image is one of the 9 x 9 shifts of the original or of its mirror, and all differ somewhere."""
    image = torch.arange(1, 1 + 3 * 6 * 6, dtype=torch.uint8).view(1, 3, 6, 6)
    padded = F.pad(torch.cat([image, image.flip(3)]), (4, 4, 4, 4))
    expected = {bytes(padded[m, :, r : r + 6, c : c + 6].numpy()) for m in (0, 1) for r in range(9) for c in range(9)}
    out = train.crop_and_flip(image.expand(300, -1, -1, -1), torch.Generator().manual_seed(0))
    seen = {bytes(one.contiguous().numpy()) for one in out}
    assert seen <= expected
    assert len(seen) > 100  # of 162


def test_cifar10_trains_in_bfloat16_and_channels_last(train: ModuleType, tmp_path: Path) -> None:
    """--amp and --channels-last reach the convolutions, also in one process."""
    write_cifar10(tmp_path)
    seen = set()

    def note(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            seen.add((y.dtype, y.is_contiguous(memory_format=torch.channels_last)))

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        call(train, "--data", "cifar10", "--data-dir", str(tmp_path), "--epochs", "1", "--amp", "--channels-last")
    finally:
        handle.remove()
    assert seen == {(torch.bfloat16, True)}


def test_help_lists_every_way_to_start(train: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """--help shows the commands for 1 process, 2 CPU ranks, 8 GPUs, 2 nodes and Slurm, and those that survive."""
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    text = capsys.readouterr().out
    for part in ("python launch/train.py", "--nproc-per-node 2", "--nproc-per-node 8", "NODE_RANK=1", "sbatch --nodes"):
        assert part in text
    for part in ("train.py --checkpoint", "MAX_RESTARTS=3 bash launch/single_node.sh --checkpoint", "sbatch --requeue"):
        assert part in text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--batch-size", "0"], "--batch-size: must be at least 1; got 0"),
        (["--epochs", "-1"], "--epochs: must be at least 1; got -1"),
        (["--norm", "layer"], "invalid choice: 'layer'"),
        (["--nrom", "batch"], "unrecognized arguments: --nrom"),
    ],
)
def test_wrong_options_are_refused(
    train: ModuleType, capsys: pytest.CaptureFixture[str], options: list[str], text: str
) -> None:
    """A wrong option ends with code 2, what is wrong with it, and the usage."""
    assert "LOCAL_RANK" not in os.environ
    with pytest.raises(SystemExit) as ended:
        train.parse(options)
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert text in shown
    assert "usage: train.py" in shown
