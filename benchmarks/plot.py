"""Draw a results file: python -m benchmarks.plot results/layer-<machine>.csv out.svg

    layer-*.csv     time of each variant over the copy's, by shape and pass; a panel per layout
    kernels-*.csv   bytes per second of each verb by its bytes, against the copy: the roofline
    wire.csv        bytes arriving at a rank per step, by world size
    batch-size-*    error of each norm by the images a rank has in a step: mean over seeds, lowest to highest

Every number drawn stands in the file; of a file with several settings the captions name the one drawn.
"""

from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.options import parser
from benchmarks.tables import Row, read_rows

STYLE = {"svg.hashsalt": "syncbn", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
COLOURS = ("#888888", "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
MOST_LINEAR = 50.0  # times of the copy's, beyond which an axis is logarithmic: a copy may take microseconds


def main(argv: list[str] | None = None) -> None:
    own = parser(__doc__)
    own.add_argument("csv", type=Path)
    own.add_argument("out", type=Path, help=".svg or .png")
    args = own.parse_args(argv)
    plt.rcParams.update(STYLE)
    draw(args.csv, args.out)


def draw(source: Path, out: Path) -> None:
    """The picture for this kind of file."""
    rows = read_rows(source)
    if not rows:
        raise ValueError(f"{source} has no rows to draw.")
    drawn = {"layer": layer, "kernels": kernels, "wire": wire, "batch": batch_size}[source.stem.partition("-")[0]]
    figure = drawn(rows)
    figure.savefig(out, bbox_inches="tight", metadata={"Date": None} if out.suffix == ".svg" else None, dpi=120)
    plt.close(figure)


def layer(rows: list[Row]) -> Any:
    """Bars of forward + backward over the copy's, for the first op, dtype, mode and number of ranks of the file."""
    both = [row for row in rows if row["pass"] == "both"]
    rows, caption = like_the_first(both, ("op", "dtype", "mode", "ranks"))
    layouts, names = unique(rows, "layout"), unique(rows, "variant")
    figure, axes = plt.subplots(len(layouts), 1, figsize=(9, 3 * len(layouts)), squeeze=False, layout="constrained")
    for axis, layout in zip(axes[:, 0], layouts, strict=True):
        panel = [row for row in rows if row["layout"] == layout]
        shapes = unique(panel, "shape")
        copies = {row["shape"]: float(row["ms"]) for row in panel if row["variant"] == "copy"}
        for at, name in enumerate(names):
            mine = [row for row in panel if row["variant"] == name]
            places = [shapes.index(row["shape"]) + (at - len(names) / 2 + 0.5) * 0.8 / len(names) for row in mine]
            times = [[float(row[of]) / copies[row["shape"]] for of in ("ms", "ms_p20", "ms_p80")] for row in mine]
            spread = [[m - p for m, p, _ in times], [p - m for m, _, p in times]]
            style = {"label": name, "color": COLOURS[at % len(COLOURS)], "error_kw": {"elinewidth": 0.7}}
            axis.bar(places, [m for m, _, _ in times], 0.8 / len(names), yerr=spread, **style)
        axis.set_xticks(range(len(shapes)), shapes, rotation=20, ha="right", rotation_mode="anchor")
        axis.set_ylabel(f"{layout}\ntime / time of two copies")
        axis.set_yscale("log" if axis.get_ylim()[1] > MOST_LINEAR else "linear")
    axes[0, 0].legend(ncols=6, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.suptitle(f"Forward + backward of one layer, median and 20/80 percentiles\n{caption}")
    return figure


def kernels(rows: list[Row]) -> Any:
    """Points: bytes per second by bytes; a panel per verb; the copy is the roof."""
    rows, caption = like_the_first(rows, ("epilogue", "dtype", "cache"))
    verbs = unique(rows, "verb")
    size = {"figsize": (3.4 * len(verbs), 3.8), "sharey": True, "squeeze": False}
    figure, axes = plt.subplots(1, len(verbs), **size, layout="constrained")
    for axis, verb in zip(axes[0], verbs, strict=True):
        panel = [row for row in rows if row["verb"] == verb]
        for name, colour in zip(unique(panel, "variant"), COLOURS, strict=False):
            _points(axis, name, [row for row in panel if row["variant"] == name], colour)
        axis.set(xscale="log", xlabel="megabytes it must move", title=verb)
        axis.legend(fontsize=6, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    axes[0, 0].set_ylabel("gigabytes per second")
    figure.suptitle(caption)
    return figure


def _points(axis: Any, name: str, rows: list[Row], colour: str) -> None:
    """One variant: circles for contiguous, squares for channels_last; the copy is a line of its best."""
    points = sorted((float(row["bytes"]) / 1e6, float(row["gigabytes_per_second"]), row["layout"]) for row in rows)
    if name == "copy":
        best = {size: speed for size, speed, _ in points}  # of equal sizes the fastest comes last
        axis.plot(list(best), list(best.values()), "-", label="copy", color=colour)
    for layout, marker in () if name == "copy" else (("contiguous", "o"), ("channels_last", "s")):
        if chosen := [point[:2] for point in points if point[2] == layout]:
            axis.plot(*zip(*chosen, strict=True), marker, label=f"{name}, {layout}", color=colour, ms=4)


def wire(rows: list[Row]) -> Any:
    """Lines: megabytes received by a rank in a step, by world size, both axes logarithmic."""
    figure, axis = plt.subplots(figsize=(5, 3.4))
    for colour, scheme in zip(COLOURS[1:], unique(rows, "scheme"), strict=False):
        chosen = [row for row in rows if row["scheme"] == scheme and row["pass"] == "step"]
        sizes, received = ([int(row[of]) for row in chosen] for of in ("world_size", "ring_received"))
        axis.plot(sizes, [each / 1e6 for each in received], "o-", label=scheme, color=colour, ms=4)
    axis.set_xscale("log", base=2)
    axis.set(yscale="log", xlabel="ranks", ylabel="megabytes received per rank and step")
    axis.set_title(f"Batch norm of {rows[0]['model']}, {rows[0]['layers']} layers, ring collectives")
    axis.legend(frameon=False)
    return figure


def batch_size(rows: list[Row]) -> Any:
    """Lines with bands over the seeds; of batch norm also with recomputed statistics."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    sizes = sorted({int(row["batch_per_rank"]) for row in rows})
    names = {"SyncBatchNorm": "syncbn", "BatchNorm": "batch", "GroupNorm": "group", "InstanceNorm": "instance"}
    lines = [(label, norm, "accuracy", "-") for label, norm in names.items()]
    lines.insert(2, ("BatchNorm, statistics recomputed", "batch", "recomputed_accuracy", "--"))
    for colour, (label, norm, column, style) in zip(COLOURS[1:], lines, strict=False):
        measured = [row for row in rows if row["norm"] == norm and row[column]]  # a run may have been interrupted
        at = {s: [100 - 100 * float(r[column]) for r in measured if int(r["batch_per_rank"]) == s] for s in sizes}
        at = {s: errors for s, errors in at.items() if errors}
        axis.plot(list(at), list(map(mean, at.values())), style, marker="o", markersize=3, color=colour, label=label)
        axis.fill_between(list(at), [*map(min, at.values())], [*map(max, at.values())], color=colour, alpha=0.15, lw=0)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.set(yscale="log", xlabel=f"images a rank, {rows[0]['ranks']} ranks", ylabel="test error (%)")
    axis.set_title(f"{rows[0]['data']}, {rows[0]['epochs']} epochs, {len(unique(rows, 'seed'))} seeds")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def like_the_first(rows: list[Row], keys: tuple[str, ...]) -> tuple[list[Row], str]:
    """The rows that are like the first one in these columns, and a caption: where, what and with what."""
    first = rows[0]
    shown = [first["device"], *(f"{key} {first[key]}" for key in (*keys, "torch", "commit"))]
    return [row for row in rows if all(row[key] == first[key] for key in keys)], ", ".join(shown)


def unique(rows: list[Row], column: str) -> list[str]:
    """In order of first appearance."""
    return list(dict.fromkeys(row[column] for row in rows))


if __name__ == "__main__":
    main()
