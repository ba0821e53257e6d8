"""Train a recurrent net with SyncBatchNorm on speech of different lengths, with and without a mask for the padding.

From the repository's root, where torch, tqdm and aeon are installed (bash launch/examples.sh does that):

    python launch/train_sequences.py                                            # 1 process, no launcher
    torchrun --standalone --nproc-per-node 2 launch/train_sequences.py          # 2 CPU ranks, gloo; with 2 GPUs, nccl
    torchrun --standalone --nproc-per-node 2 launch/train_sequences.py --mask yes --batch-size 4

Utterances of a batch are padded to the longest. A batch norm that is told which positions are padding (its third
argument, a mask) normalizes as if there were none; without it, padding is in the statistics of a training step, and
what comes out of the norm there is not 0. The table at the end has, besides the accuracy, how much the loss of an
utterance changes at most if its batch is padded by 20 frames more, with noise or with NaN in the place of zeros: in
float64, once in training, with the statistics of the batch, and once in evaluation.
"""

import argparse
import copy
import math
import sys
import time
from typing import Any

import torch
from log import Log, Row, worded
from options import parser
from ranks import Rank, distributed, fail, join, leave, machine_name, progress, require_alike, save
from score import classified, mine
from sequences import FEATURES, NORMS, Padded, Utterances, buckets, build, load, padded
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam
from torch.optim.lr_scheduler import OneCycleLR

MASKS = {"both": (False, True), "yes": (True,), "no": (False,)}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; --help ends with the commands above."""
    options = parser("train_sequences.py", __doc__ or "", NORMS, batch_size=8, epochs=15)
    options.add_argument("--mask", choices=MASKS, help="whether norms are told of padding (default: both, for syncbn)")
    options.add_argument("--lr", type=float, default=0.01, help="highest learning rate (default: %(default)s)")
    args = options.parse_args(arguments)
    if args.mask in ("both", "yes") and args.norm != "syncbn":
        options.error(f"--mask {args.mask} is for a norm that takes one; got --norm {args.norm}, which does not")
    args.mask = args.mask or ("both" if args.norm == "syncbn" else "no")
    return args


def main() -> None:
    args = parse()
    try:
        train, test = load()
    except ValueError as error:
        fail(str(error))
    me = join()
    require_alike(me, vars(args) | {"device": me.device.type, "log_file": None, "save": None})
    if me.rank == 0:
        where = f"{me.device.type}, {me.backend or 'no process group'}"
        sizes = f"{len(train.labels)} training and {len(test.labels)} test utterances"
        print(f"{args.norm} on {me.world} x {args.batch_size} utterances a step ({where}); {sizes}", flush=True)
    outcomes = [run(is_masked, train, test, args, me) for is_masked in MASKS[args.mask]]
    if me.rank == 0:
        print(f"\n{table(outcomes)}", flush=True)
    if me.backend is not None:
        leave()


def run(is_masked: bool, train: Utterances, test: Utterances, args: argparse.Namespace, me: Rank) -> Row:
    """Train one net from the beginning; what came out. With both, the masked one is trained and saved last."""
    torch.manual_seed(args.seed)
    model = build(args.norm).to(me.device)
    wrapped = distributed(model, me)  # converted by now
    order = torch.Generator().manual_seed(args.seed)  # the same on all ranks
    lengths, size = train.lengths(), args.batch_size * me.world
    steps = max(1, len(lengths) // size)
    optimizer = Adam(wrapped.parameters())
    schedule = OneCycleLR(optimizer, args.lr, total_steps=args.epochs * steps)
    log, row = Log(args.log_file if me.rank == 0 else None), describe(is_masked, args, me)
    with progress(args.epochs * steps, me) as bar:
        for epoch in range(1, args.epochs + 1):
            began = time.perf_counter()
            for chosen in buckets(lengths, size, order):
                batch = padded(train, chosen[me.rank :: me.world], me.device)
                loss = losses(wrapped, batch, is_masked).sum() * me.world / len(chosen)  # DDP takes the ranks' mean
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            ms_per_step = (time.perf_counter() - began) * 1e3 / steps
            result = evaluate(model, test, is_masked, me)
            log.rows.append(row | {"epoch": epoch} | result | {"ms_per_step": ms_per_step})
            log.write()
            if me.rank == 0:
                bar.write(f"{name(row)}, epoch {epoch}: {worded(result)}, {ms_per_step:.1f} ms per step")
    save(model, args.save, me)
    return log.rows[-1] | {"effects": effects(model, test, is_masked, me)}


def losses(model: nn.Module, batch: Padded, is_masked: bool) -> Tensor:
    """The cross-entropy of each utterance, (N,)."""
    logits = model(batch.x, batch.lengths, batch.mask() if is_masked else None)
    return F.cross_entropy(logits, batch.labels, reduction="none")


def evaluate(model: nn.Module, test: Utterances, is_masked: bool, me: Rank) -> dict[str, float]:
    """Accuracy and loss on the test set, each utterance once."""
    batches = (padded(test, chosen, me.device) for chosen in mine(len(test.labels), me))
    outputs = ((model(b.x, b.lengths, b.mask() if is_masked else None), b.labels) for b in batches)
    return classified(model, outputs, me)


@torch.no_grad()
def effects(model: nn.Module, test: Utterances, is_masked: bool, me: Rank) -> dict[str, float]:
    """What other padding changes at most in the loss of one of this rank's utterances, in training and evaluation."""
    exact = copy.deepcopy(model).double()
    batch = padded(test, torch.arange(me.rank, len(test.labels), me.world)[:16], me.device)
    batch = batch._replace(x=batch.x.double())
    found = {}
    for mode in ("training", "evaluation"):
        exact.train(mode == "training")
        right = losses(exact, batch, is_masked)
        for how, other in repadded(batch).items():
            found[f"{how}, {mode}"] = (losses(exact, other, is_masked) - right).abs().max().item()
    return found


def repadded(batch: Padded) -> dict[str, Padded]:
    """The same utterances padded by 20 frames more, with noise, and with NaN."""
    own = batch.mask()[..., None]
    noise = torch.randn(batch.x.shape, generator=torch.Generator().manual_seed(0), dtype=batch.x.dtype) * 10
    more = batch.x.new_zeros(len(batch.x), 20, FEATURES)
    return {
        "20 more": batch._replace(x=torch.cat([batch.x, more], 1)),
        "noise": batch._replace(x=torch.where(own, batch.x, noise.to(batch.x))),
        "NaN": batch._replace(x=torch.where(own, batch.x, math.nan)),
    }


def describe(is_masked: bool, args: argparse.Namespace, me: Rank) -> Row:
    """The settings that are columns of the log."""
    where = {"machine": machine_name(me.device), "torch": str(torch.__version__), "backend": me.backend}
    data = {"data": "japanese vowels", "norm": args.norm, "mask": is_masked, "seed": args.seed}
    return where | data | {"ranks": me.world, "batch_per_rank": args.batch_size, "epochs": args.epochs}


def name(row: dict[str, Any]) -> str:
    return f"{row['norm']}{', masked' if row['mask'] else ''}"


def table(outcomes: list[Row]) -> str:
    """A line for each net: how good it is, and what padding does to the loss of an utterance."""
    columns = list(outcomes[0]["effects"])
    lines = [
        f"{'':<18}{'test accuracy':>14}{'loss':>9}   change of an utterance's loss if its batch is padded by or with"
    ]
    lines.append(" " * 41 + "".join(f"{column:>21}" for column in columns))
    for row in outcomes:
        cells = "".join(f"{row['effects'][column]:>21.1e}" for column in columns)
        lines.append(f"{name(row):<18}{row['accuracy']:>14.2%}{row['loss']:>9.4f}{cells}")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
