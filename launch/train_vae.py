"""Train a variational autoencoder with SyncBatchNorm in encoder and decoder on real digits, a few images a rank.

From the repository's root, where torch, tqdm, scikit-learn and matplotlib are installed (bash launch/examples.sh):

    python launch/train_vae.py                                                  # 1 process, no launcher
    torchrun --standalone --nproc-per-node 2 launch/train_vae.py                # 2 CPU ranks, gloo; with 2 GPUs, nccl
    torchrun --standalone --nproc-per-node 2 launch/train_vae.py --all          # three normalizations, one by one

The table at the end has the evidence lower bound on the test set, in nats an image, the higher the better: with the
running statistics of training, and with those of the whole training set, which the picture is made with, too. In it are
test images, what the autoencoder makes of them, and images that it makes of random codes. Those come from the prior,
where the decoder's statistics are of codes of real images: the more the two differ, the less the decoder's batch norms
fit what is sampled.
"""

import argparse
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from data import Data, load
from log import Log, Row, worded
from options import parser
from ranks import Rank, as_rank_0, distributed, fail, join, leave, machine_name, progress, require_alike, save, summed
from score import mine
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.data import DistributedSampler
from vae import LATENT, LEVELS, NORMS, bound, build

import syncbn

DRAWS, SHOWN = 8, 12
"""Codes drawn for each test image; images in a row of the picture."""
NAMES = {"batch": "BatchNorm", "syncbn": "SyncBatchNorm", "none": "no norm"}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; --help ends with the commands above."""
    options = parser("train_vae.py", __doc__ or "", NORMS, batch_size=4, epochs=6)
    options.add_argument(
        "--all", action="store_true", help="all normalizations, one after the other; the first is saved"
    )
    options.add_argument("--lr", type=float, default=2e-3, help="learning rate (default: %(default)s)")
    options.add_argument("--png", type=Path, default=Path("out/vae.png"), help="the picture (default: %(default)s)")
    return options.parse_args(arguments)


def main() -> None:
    args = parse()
    try:
        data = load("digits", "")
    except ImportError as error:
        fail(f"The digits come with scikit-learn; it cannot be imported ({error}). Install syncbn[train].")
    if find_spec("matplotlib") is None:
        fail("The picture at the end is drawn with matplotlib, which is not installed. Install syncbn[train].")
    me = join()
    norms = ("syncbn", "batch", "none") if args.all else (args.norm,)
    local = {"log_file": None, "save": None, "png": None}
    require_alike(me, vars(args) | local | {"device": me.device.type})
    if me.rank == 0:
        where = f"{me.device.type}, {me.backend or 'no process group'}"
        sizes = f"{len(data.train_images)} training and {len(data.test_images)} test images"
        print(f"{', '.join(norms)} on {me.world} x {args.batch_size} images a step ({where}); {sizes}", flush=True)
    outcomes = [run(norm, data, args, me) for norm in norms]
    if me.rank == 0:
        print(f"\n{table([row for row, _ in outcomes])}\n", flush=True)
        draw(args.png, data, {row["norm"]: pictures for row, pictures in outcomes})
        print(f"picture: {args.png}", flush=True)
    if me.backend is not None:
        leave()


def run(norm: str, data: Data, args: argparse.Namespace, me: Rank) -> tuple[Row, tuple[Tensor, Tensor]]:
    """Train one from the beginning; its last row, and reconstructions and samples."""
    torch.manual_seed(args.seed)
    model = build(norm).to(me.device)
    wrapped = distributed(model, me)  # converted by now
    optimizer = Adam(wrapped.parameters(), args.lr)
    noise = torch.Generator().manual_seed(args.seed * me.world + me.rank)  # other noise on each rank
    sampler = DistributedSampler(range(len(data.train_images)), me.world, me.rank, seed=args.seed)
    steps = -(-len(sampler) // args.batch_size)
    log, described = Log(args.log_file if me.rank == 0 else None), describe(norm, args, me)
    with progress(args.epochs * steps, me) as bar:
        for epoch in range(1, args.epochs + 1):
            sampler.set_epoch(epoch)
            began = time.perf_counter()
            for chosen in torch.tensor(list(sampler)).split(args.batch_size):
                likelihood, divergence = bounds(wrapped, data.train_images[chosen], noise, me)
                optimizer.zero_grad()
                (divergence - likelihood).mean().backward()
                optimizer.step()
                bar.update()
            ms_per_step = (time.perf_counter() - began) * 1e3 / steps
            result = evaluate(model, data.test_images, args, me)
            if epoch == args.epochs and norm != "none":
                recompute(model, data, args, me)
                again = evaluate(model, data.test_images, args, me)
                result |= {f"recomputed_{name}": value for name, value in again.items()}
            log.rows.append(described | {"epoch": epoch} | result | {"ms_per_step": ms_per_step})
            log.write()
            if me.rank == 0:
                bar.write(f"{NAMES[norm]}, epoch {epoch}: {worded(result)}, {ms_per_step:.1f} ms per step")
    if not args.all or norm == "syncbn":
        save(model, args.save, me)
    return log.rows[-1], pictures_of(model, data, args, me)


def bounds(model: nn.Module, images: Tensor, noise: torch.Generator, me: Rank) -> tuple[Tensor, Tensor]:
    """log p(x|z) and the divergence of each image, for one code drawn for each."""
    counts = images.to(me.device).float()
    drawn = torch.randn(len(images), LATENT, generator=noise).to(me.device)
    return bound(counts, *model(counts / LEVELS, drawn))


def recompute(model: nn.Module, data: Data, args: argparse.Namespace, me: Rank) -> None:
    """Give the norms the statistics of the whole training set, each image once."""
    noise = torch.Generator().manual_seed(args.seed * me.world + me.rank)
    batches = (data.train_images[chosen] for chosen in mine(len(data.train_images), me))
    syncbn.recompute_statistics(model, batches, forward=lambda model, images: bounds(model, images, noise, me))


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, args: argparse.Namespace, me: Rank) -> dict[str, float]:
    """The bound and its parts, means over the test set and some codes for each image; each image by one rank."""
    as_rank_0(model, me)
    model.eval()
    noise = torch.Generator().manual_seed(args.seed * me.world + me.rank)
    totals = torch.zeros(3, dtype=torch.float64, device=me.device)  # log-likelihood, divergence, images
    for chosen in mine(len(images), me):
        for _ in range(DRAWS):
            parts = bounds(model, images[chosen], noise, me)
            totals[:2] += torch.stack([part.double().sum() for part in parts])
        totals[2] += DRAWS * len(chosen)
    model.train()
    likelihood, divergence, count = summed(totals, me).tolist()
    return {"bound": (likelihood - divergence) / count, "kl": divergence / count}


@torch.no_grad()
def pictures_of(model: nn.Module, data: Data, args: argparse.Namespace, me: Rank) -> tuple[Tensor, Tensor]:
    """Means of pixels (SHOWN, 8, 8): of the first test images again, and of codes from the prior."""
    model.eval()
    counts = data.test_images[:SHOWN].to(me.device).float()
    logits, _, _ = model(counts / LEVELS, torch.zeros(SHOWN, LATENT, device=me.device))
    codes = torch.randn(SHOWN, LATENT, generator=torch.Generator().manual_seed(args.seed)).to(me.device)
    again, sampled = (torch.sigmoid(made)[:, 0].cpu() for made in (logits, model.decoder(codes)))
    return again, sampled


def describe(norm: str, args: argparse.Namespace, me: Rank) -> Row:
    """The settings that are columns of the log."""
    where = {"machine": machine_name(me.device), "torch": str(torch.__version__), "backend": me.backend}
    settings = {"data": "digits", "norm": norm, "seed": args.seed, "ranks": me.world}
    return where | settings | {"batch_per_rank": args.batch_size, "epochs": args.epochs}


def table(rows: list[Row]) -> str:
    """A line for each norm, in nats an image."""
    lines = [
        f"{'':<14}{'evidence lower bound':>22}{'KL':>8}{'with recomputed statistics':>29}{'KL':>8}{'ms per step':>14}"
    ]
    for row in rows:
        cells = f"{row['bound']:>22.2f}{row['kl']:>8.2f}"
        again = f"{row['recomputed_bound']:>29.2f}{row['recomputed_kl']:>8.2f}" if "recomputed_kl" in row else " " * 37
        lines.append(f"{NAMES[row['norm']]:<14}{cells}{again}{row['ms_per_step']:>14.1f}")
    return "\n".join(lines)


def draw(path: Path, data: Data, pictures: dict[str, tuple[Tensor, Tensor]]) -> None:
    """A row of test images, then for each norm one of reconstructions and one of samples."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {"test images": data.test_images[:SHOWN, 0] / LEVELS}
    for norm, (again, sampled) in pictures.items():
        rows |= {f"{NAMES[norm]}:\nreconstructed": again, f"{NAMES[norm]}:\nsampled": sampled}
    figure, axes = pyplot.subplots(len(rows), SHOWN, figsize=(9, 0.8 * len(rows)), squeeze=False, layout="constrained")
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image, cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
