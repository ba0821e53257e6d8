"""Draw a results file: python -m benchmarks.plot results/layer-<machine>.csv out.svg

    layer-*.csv     time of each variant over the copy's, by shape and pass; a panel per layout
    kernels-*.csv   bytes per second of each verb by its bytes, against the copy: the roofline
    wire.csv        bytes arriving at a rank per step, by world size

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
    figure = {"layer": layer, "kernels": kernels, "wire": wire}[kind](rows)
    figure.savefig(out, bbox_inches="tight", metadata={"Date": None} if out.suffix == ".svg" else None, dpi=120)
    plt.close(figure)


def layer(rows: list[Row]) -> Any:
    """Bars: over_copy of forward + backward, for the first mode, op, dtype and number of ranks of the file."""
    first = rows[0]
    fixed = ("op", "dtype", "mode", "ranks")
    rows = [row for row in rows if all(row[key] == first[key] for key in fixed) and row["pass"] == "both"]
    layouts = unique(row["layout"] for row in rows)
    figure, axes = plt.subplots(len(layouts), 1, figsize=(9, 3.2 * len(layouts)), squeeze=False)
    for axis, layout in zip(axes[:, 0], layouts, strict=True):
        part = [row for row in rows if row["layout"] == layout]
        shapes, names = unique(row["shape"] for row in part), unique(row["variant"] for row in part)
        for at, name in enumerate(names):
            found = {row["shape"]: row for row in part if row["variant"] == name}
            places = [x + (at - len(names) / 2 + 0.5) * 0.8 / len(names) for x in range(len(shapes))]
            copies = {row["shape"]: float(row["ms"]) for row in part if row["variant"] == "copy"}
            present = [
                (x, found[shape], copies[shape]) for x, shape in zip(places, shapes, strict=True) if shape in found
            ]
            heights = [float(row["ms"]) / copy for _, row, copy in present]
            spread = [[(float(r["ms"]) - float(r["ms_p20"])) / c for _, r, c in present]]
            spread += [[(float(r["ms_p80"]) - float(r["ms"])) / c for _, r, c in present]]
            colour = COLOURS[at % len(COLOURS)]
            axis.bar([x for x, *_ in present], heights, 0.8 / len(names), label=name, color=colour, yerr=spread)
        axis.set_xticks(range(len(shapes)), shapes, rotation=20)
        axis.set_ylabel(f"{layout}\ntime / time of two copies")
        axis.axhline(1, color="black", linewidth=0.5)
    axes[0, 0].legend(ncols=4, frameon=False)
    caption = ", ".join(f"{key} {first[key]}" for key in fixed)
    axes[0, 0].set_title(
        f"Forward + backward; bars: 20th to 80th percentile. {first['device']}, {caption}, {origin(first)}"
    )
    return figure


def kernels(rows: list[Row]) -> Any:
    """Points: bytes per second by bytes; a panel per verb; the copy is the roof."""
    first = rows[0]
    fixed = ("epilogue", "dtype", "cache")
    rows = [row for row in rows if all(row[key] == first[key] for key in fixed)]
    verbs = unique(row["verb"] for row in rows)
    figure, axes = plt.subplots(1, len(verbs), figsize=(3.4 * len(verbs), 3.4), sharey=True, squeeze=False)
    for axis, verb in zip(axes[0], verbs, strict=True):
        part = [row for row in rows if row["verb"] == verb]
        settings = unique((row["variant"], row["layout"]) for row in part)
        for at, (name, layout) in enumerate(settings):
            chosen = [row for row in part if (row["variant"], row["layout"]) == (name, layout)]
            points = sorted((float(row["bytes"]) / 1e6, float(row["gigabytes_per_second"])) for row in chosen)
            marker, style = ("o" if layout == "contiguous" else "s"), ("-" if name == "copy" else "")
            axis.plot(*zip(*points, strict=True), style + marker, label=f"{name} {layout}", color=COLOURS[at % 7], ms=4)
        axis.set_xscale("log")
        axis.set_xlabel("megabytes it must move")
        axis.set_title(verb)
        axis.legend(fontsize=6, frameon=False)
    axes[0, 0].set_ylabel("gigabytes per second")
    figure.suptitle(f"{first['device']}, {', '.join(f'{k} {first[k]}' for k in fixed)}, {origin(first)}", y=1.02)
    return figure


def wire(rows: list[Row]) -> Any:
    """Lines: megabytes received by a rank in a step, by world size, both axes logarithmic."""
    figure, axis = plt.subplots(figsize=(5, 3.4))
    for colour, scheme in zip(COLOURS[1:], unique(row["scheme"] for row in rows), strict=False):
        chosen = [row for row in rows if row["scheme"] == scheme and row["pass"] == "step"]
        sizes = [int(row["world_size"]) for row in chosen]
        axis.plot(sizes, [int(row["ring_received"]) / 1e6 for row in chosen], "o-", label=scheme, color=colour, ms=4)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("ranks")
    axis.set_ylabel("megabytes received per rank and step")
    axis.set_title(f"Batch norm of {rows[0]['model']}, {rows[0]['layers']} layers, ring collectives")
    axis.legend(frameon=False)
    return figure


def unique(values: Any) -> list[Any]:
    """In order of first appearance."""
    return list(dict.fromkeys(values))


def origin(row: Row) -> str:
    return f"torch {row['torch']}, commit {row['commit']}"


if __name__ == "__main__":
    main()
