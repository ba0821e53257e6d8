"""Draw a results file: python -m benchmarks.plot results/layer-<machine>.csv out.svg

    layer-*.csv     time of each variant over the copy's, by shape and pass; a panel per layout
    kernels-*.csv   bytes per second of each verb by its bytes, against the copy: the roofline
    wire.csv        bytes arriving at a rank per step, by world size
    batch-size-*    error of each norm by the images a rank has in a step: mean over seeds, lowest to highest

Every number drawn stands in the file; of a file with several settings the captions name the one drawn.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.harness import read_rows

Row = dict[str, str]
COLOURS = ("#888888", "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
MOST_LINEAR = 50.0
"""Times of the copy's beyond which an axis is logarithmic, as of inputs that a copy takes microseconds for."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("out", type=Path, help=".svg or .png")
    args = parser.parse_args(argv)
    plt.rcParams.update(
        {"svg.hashsalt": "syncbn", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    draw(args.csv, args.out)


def draw(source: Path, out: Path) -> None:
    """The picture for this kind of file."""
    rows = read_rows(source)
    if not rows:
        raise ValueError(f"{source} has no rows to draw.")
    kind = source.stem.partition("-")[0]
    figure = {"layer": layer, "kernels": kernels, "wire": wire, "batch": batch_size}[kind](rows)
    figure.savefig(out, bbox_inches="tight", metadata={"Date": None} if out.suffix == ".svg" else None, dpi=120)
    plt.close(figure)


def layer(rows: list[Row]) -> Any:
    """Bars of forward + backward over the copy's, for the first op, dtype, mode and number of ranks of the file."""
    first = rows[0]
    fixed = ("op", "dtype", "mode", "ranks")
    rows = [row for row in rows if row["pass"] == "both" and _alike(row, first, fixed)]
    layouts, names = unique(row["layout"] for row in rows), unique(row["variant"] for row in rows)
    figure, axes = plt.subplots(len(layouts), 1, figsize=(9, 3 * len(layouts)), squeeze=False, layout="constrained")
    for axis, layout in zip(axes[:, 0], layouts, strict=True):
        part = [row for row in rows if row["layout"] == layout]
        shapes = unique(row["shape"] for row in part)
        for at, name in enumerate(names):
            _bars(axis, name, part, shapes, at, len(names))
        axis.set_xticks(range(len(shapes)), shapes, rotation=20, ha="right", rotation_mode="anchor")
        axis.set_ylabel(f"{layout}\ntime / time of two copies")
        if axis.get_ylim()[1] > MOST_LINEAR:
            axis.set_yscale("log")
    axes[0, 0].legend(ncols=6, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.suptitle(f"Forward + backward of one layer, median and 20/80 percentiles\n{_caption(first, fixed)}")
    return figure


def _bars(axis: Any, name: str, panel: list[Row], shapes: list[str], at: int, of: int) -> None:
    """One variant's bars, the at-th of `of` beside each other."""
    copies = {row["shape"]: float(row["ms"]) for row in panel if row["variant"] == "copy"}
    rows = [row for row in panel if row["variant"] == name]
    places = [shapes.index(row["shape"]) + (at - of / 2 + 0.5) * 0.8 / of for row in rows]
    low, middle, high = (
        [float(row[column]) / copies[row["shape"]] for row in rows] for column in ("ms_p20", "ms", "ms_p80")
    )
    spread = [[m - p for m, p in zip(middle, low, strict=True)], [p - m for m, p in zip(middle, high, strict=True)]]
    colour = COLOURS[at % len(COLOURS)]
    axis.bar(places, middle, 0.8 / of, label=name, color=colour, yerr=spread, error_kw={"elinewidth": 0.7})


def kernels(rows: list[Row]) -> Any:
    """Points: bytes per second by bytes; a panel per verb; the copy is the roof."""
    first = rows[0]
    fixed = ("epilogue", "dtype", "cache")
    rows = [row for row in rows if _alike(row, first, fixed)]
    verbs = unique(row["verb"] for row in rows)
    width = 3.4 * len(verbs)
    figure, axes = plt.subplots(1, len(verbs), figsize=(width, 3.8), sharey=True, squeeze=False, layout="constrained")
    for axis, verb in zip(axes[0], verbs, strict=True):
        part = [row for row in rows if row["verb"] == verb]
        for at, name in enumerate(unique(row["variant"] for row in part)):
            _points(axis, [row for row in part if row["variant"] == name], COLOURS[at])
        axis.set_xscale("log")
        axis.set_xlabel("megabytes it must move")
        axis.set_title(verb)
        axis.legend(fontsize=6, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    axes[0, 0].set_ylabel("gigabytes per second")
    figure.suptitle(_caption(first, fixed))
    return figure


def _points(axis: Any, rows: list[Row], colour: str) -> None:
    """One variant: circles for contiguous, squares for channels_last; the copy is a line of its best."""
    name = rows[0]["variant"]
    for layout, marker in (("contiguous", "o"), ("channels_last", "s")):
        chosen = [row for row in rows if row["layout"] == layout or name == "copy"]
        points = sorted((float(row["bytes"]) / 1e6, float(row["gigabytes_per_second"])) for row in chosen)
        if name == "copy":
            best = {size: speed for size, speed in points}  # of equal sizes the fastest comes last
            axis.plot(list(best), list(best.values()), "-", label="copy", color=colour)
            return
        if points:
            axis.plot(*zip(*points, strict=True), marker, label=f"{name}, {layout}", color=colour, ms=4)


def wire(rows: list[Row]) -> Any:
    """Lines: megabytes received by a rank in a step, by world size, both axes logarithmic."""
    figure, axis = plt.subplots(figsize=(5, 3.4))
    for colour, scheme in zip(COLOURS[1:], unique(row["scheme"] for row in rows), strict=False):
        chosen = [row for row in rows if row["scheme"] == scheme and row["pass"] == "step"]
        sizes = [int(row["world_size"]) for row in chosen]
        axis.plot(sizes, [int(row["ring_received"]) / 1e6 for row in chosen], "o-", label=scheme, color=colour, ms=4)
    axis.set_yscale("log")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("ranks")
    axis.set_ylabel("megabytes received per rank and step")
    axis.set_title(f"Batch norm of {rows[0]['model']}, {rows[0]['layers']} layers, ring collectives")
    axis.legend(frameon=False)
    return figure


def _alike(row: Row, first: Row, keys: tuple[str, ...]) -> bool:
    return all(row[key] == first[key] for key in keys)


def _caption(row: Row, keys: tuple[str, ...]) -> str:
    """Where, what and with what."""
    shown = ", ".join(f"{key} {row[key]}" for key in keys)
    return f"{row['device']}, {shown}, torch {row['torch']}, commit {row['commit']}"


def unique(values: Any) -> list[Any]:
    """In order of first appearance."""
    return list(dict.fromkeys(values))


def batch_size(rows: list[Row]) -> Any:
    """Lines with bands over the seeds; of batch norm also with recomputed statistics."""
    names = {"syncbn": "SyncBatchNorm", "batch": "BatchNorm", "group": "GroupNorm", "instance": "InstanceNorm"}
    lines = [(norm, "accuracy", label, "-") for norm, label in names.items()]
    lines.insert(2, ("batch", "recomputed_accuracy", "BatchNorm, statistics recomputed", "--"))
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    sizes = sorted({int(row["batch_per_rank"]) for row in rows})
    for colour, (norm, column, label, style) in zip(COLOURS[1:], lines, strict=False):
        measured = [row for row in rows if row["norm"] == norm and row[column]]  # a run may have been interrupted
        at = {s: [100 - 100 * float(r[column]) for r in measured if int(r["batch_per_rank"]) == s] for s in sizes}
        at = {s: errors for s, errors in at.items() if errors}
        means = [sum(errors) / len(errors) for errors in at.values()]
        axis.plot(list(at), means, style, marker="o", markersize=3, color=colour, label=label)
        extremes = list(map(min, at.values())), list(map(max, at.values()))
        axis.fill_between(list(at), *extremes, color=colour, alpha=0.15, lw=0)
    axis.set_yscale("log")
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    some = rows[0]
    axis.set(xlabel=f"images a rank, {some['ranks']} ranks", ylabel="test error (%)")
    axis.set_title(f"{some['data']}, {some['epochs']} epochs, {len({row['seed'] for row in rows})} seeds")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


if __name__ == "__main__":
    main()
