"""The table, the plot and the CSV of a log that train.py --log-file has written.

python launch/summary.py out/quickstart.jsonl --csv out/quickstart.csv --png out/quickstart.png
"""

import argparse
import csv
import json
import subprocess
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

Row = dict[str, Any]
COLUMNS = ["machine", "torch", "commit", "data", "norm", "seed", "ranks", "batch_per_rank", "epochs"]
RESULTS = ["accuracy", "loss", "ms_per_step"]
RECOMPUTED = ["recomputed_accuracy", "recomputed_loss"]
"""Of runs with --recompute-statistics."""
NAMES = {"batch": "BatchNorm", "syncbn": "SyncBatchNorm", "instance": "InstanceNorm", "group": "GroupNorm"}


def read_runs(log: Path) -> list[list[Row]]:
    """The epochs of each finished run, in the log's order."""
    runs: dict[tuple[Any, ...], list[Row]] = {}
    for line in log.read_text().splitlines():
        row = json.loads(line)
        runs.setdefault((row["norm"], row["seed"]), []).append(row)
    return [epochs for epochs in runs.values() if epochs[-1]["epoch"] == epochs[-1]["epochs"]]


def last(epochs: list[Row]) -> Row:
    """A run's outcome: its last epoch's accuracy and loss, and the median over epochs of the time per step."""
    return {**epochs[-1], "ms_per_step": median(row["ms_per_step"] for row in epochs)}


def table(outcomes: list[Row]) -> str:
    """One line per norm; mean ± sample standard deviation over the seeds where there are several."""
    some = outcomes[0]
    seeds = len({row["seed"] for row in outcomes})
    spread = f", {seeds} seeds, mean ± standard deviation" if seeds > 1 else ""
    place = f"{some['ranks']} ranks x {some['batch_per_rank']} images, {some['epochs']} epochs{spread}"
    lines = [f"{some['data']}, {place}; {some['machine']}, torch {some['torch']}", ""]
    again = all(RECOMPUTED[0] in row for row in outcomes)
    head = f"{'norm':<14}{'test accuracy':>18}{'test loss':>20}{'ms per step':>16}"
    lines.append(head + (f"{'recomputed accuracy':>24}{'loss':>20}" if again else ""))
    for norm in dict.fromkeys(row["norm"] for row in outcomes):
        mine = [row for row in outcomes if row["norm"] == norm]
        accuracy, loss, ms = ([row[name] for row in mine] for name in RESULTS)
        cells = (amount([100 * a for a in accuracy], 2, " %"), amount(loss, 4), amount(ms, 1))
        line = f"{NAMES[norm]:<14}{cells[0]:>18}{cells[1]:>20}{cells[2]:>16}"
        if again:
            accuracy, loss = ([row[name] for row in mine] for name in RECOMPUTED)
            line += f"{amount([100 * a for a in accuracy], 2, ' %'):>24}{amount(loss, 4):>20}"
        lines.append(line)
    return "\n".join(lines)


def amount(values: list[float], digits: int, unit: str = "") -> str:
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}{unit}"


def write_csv(path: Path, outcomes: list[Row]) -> None:
    """One row per run, with the commit it ran at."""
    commit = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        described = subprocess.run(commit, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        described = "unknown"  # an unpacked archive
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        names = [*COLUMNS, *RESULTS, *(RECOMPUTED if any(RECOMPUTED[0] in row for row in outcomes) else [])]
        writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in outcomes:
            rounded = {name: f"{row[name]:.5f}" for name in ("accuracy", "loss", *RECOMPUTED) if name in row}
            writer.writerow({**row, **rounded, "commit": described, "ms_per_step": f"{row['ms_per_step']:.2f}"})


def plot(path: Path, runs: list[list[Row]]) -> None:
    """Test accuracy by epoch: the mean over seeds as a line, lowest to highest as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    for norm in dict.fromkeys(epochs[0]["norm"] for epochs in runs):
        curves = [[100 * row["accuracy"] for row in epochs] for epochs in runs if epochs[0]["norm"] == norm]
        at = list(zip(*curves, strict=True))
        x = range(1, len(at) + 1)
        (line,) = axes.plot(x, [mean(values) for values in at], marker="o", markersize=3, label=NAMES[norm])
        axes.fill_between(x, [min(v) for v in at], [max(v) for v in at], color=line.get_color(), alpha=0.2, lw=0)
    some = runs[0][0]
    axes.set(xlabel="epoch", ylabel="test accuracy (%)")
    axes.set_title(f"{some['data']}, {some['ranks']} ranks with {some['batch_per_rank']} images each")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    if min(epochs[-1]["accuracy"] for epochs in runs) > 0.8:
        axes.set_ylim(bottom=max(80, axes.get_ylim()[0]))  # else one slow start flattens all that matters
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser("summary.py", description=__doc__.partition("\n")[0])
    parser.add_argument("log", type=Path, help="what train.py --log-file wrote")
    parser.add_argument("--csv", type=Path, help="write one row per run to this file")
    parser.add_argument("--png", type=Path, help="plot the accuracy curves to this file")
    args = parser.parse_args()
    runs = read_runs(args.log) if args.log.is_file() else []
    if not runs:
        parser.error(f"{args.log} must hold a finished run; it has none. Write it with train.py --log-file {args.log}.")
    outcomes = [last(epochs) for epochs in runs]
    print(f"\n{table(outcomes)}\n")
    if args.csv:
        write_csv(args.csv, outcomes)
        print(f"runs: {args.csv}")
    if args.png:
        plot(args.png, runs)
        print(f"plot: {args.png}")


if __name__ == "__main__":
    main()
