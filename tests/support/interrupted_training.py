"""What the ranks of test_checkpoint_files.py run: a training, and the same one interrupted after each of its epochs."""

import sys
from pathlib import Path

from tests.support.launching import LAUNCH

sys.path.insert(0, str(LAUNCH))
import train
from checkpoint import Checkpoints


class Interrupted(Exception):
    pass


class InterruptedCheckpoints(Checkpoints):
    """Ends the run right after the checkpoint of an epoch, before its log line."""

    after = 0

    def save(self, epoch: int) -> None:
        super().save(epoch)
        if epoch == self.after:
            raise Interrupted


def main(images: str, folder: Path, epochs: int) -> None:
    """Runs 0, whole, and 1 to `epochs`, interrupted after that epoch and resumed, each with files of its name."""
    me = train.join()
    data = train.load("cifar10", images)
    train.Checkpoints = InterruptedCheckpoints
    for after in range(epochs + 1):
        options = ["--data", "cifar10", "--norm", "syncbn", "--batch-size", "5", "--epochs", str(epochs)]
        options += ["--checkpoint", f"{folder}/{after}", "--log-file", f"{folder}/{after}.jsonl"]
        InterruptedCheckpoints.after = after
        try:
            train.run(data, train.parse(options), me)
        except Interrupted:
            InterruptedCheckpoints.after = 0
            train.run(data, train.parse(options), me)
    train.leave()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
