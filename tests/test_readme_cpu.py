"""The figures of a CPU in benchmarks/README.md are those of the committed rows."""

import csv

from tests.test_readme import MEASURED, ROOT, of_a


def kind_of(row: dict[str, str]) -> str:
    """The line of the CPU table that a row belongs to."""
    if row["op"] != "bn":
        return f"float32 with addition and ReLU, {row['layout']}"
    if row["dtype"] != "float32":
        return row["dtype"]
    if row["shape"].startswith("2x64x4x4"):
        return "float32, 8 KB"
    return "float32, (N, C)" if row["shape"].count("x") == 1 else f"float32, {row['layout']}"


def test_the_cpu_figures_are_those_of_the_rows() -> None:
    """The ratios that are given for the layer on CPU are the extremes of the committed rows."""
    rows = list(csv.DictReader((ROOT / "benchmarks/results/layer-amd-epyc-2-cores.csv").read_text().splitlines()))
    alone: dict[str, list[float]] = {}
    for threads in ("1", "2"):
        for key in {(row["op"], row["dtype"], row["shape"], row["layout"]): None for row in rows}:
            of = dict(zip(("op", "dtype", "shape", "layout"), key, strict=True))
            chosen = of_a("amd-epyc-2-cores", "layer", **of, **{"pass": "both", "ranks": "1", "threads": threads})
            ms = {row["variant"]: float(row["ms"]) for row in chosen}
            alone.setdefault(kind_of(chosen[0]), []).append(ms["syncbn_alone"] / ms["nn.BatchNorm"])
    assert len(alone) == 7
    for kind, ratios in alone.items():
        assert f"| {kind} | {min(ratios):.2f} to {max(ratios):.2f} |" in MEASURED
    ms_of: dict[tuple[str, ...], dict[str, float]] = {}
    for row in of_a("amd-epyc-2-cores", "layer", **{"pass": "both", "ranks": "2", "op": "bn"}):
        ms_of.setdefault((row["dtype"], row["shape"], row["layout"]), {})[row["variant"]] = float(row["ms"])
    composed = [m["syncbn"] / m["naive_sync"] for m in ms_of.values()]
    assert f"takes {min(composed):.2f} to {max(composed):.2f} times as long" in MEASURED
    assert f"less on {sum(ratio < 1 for ratio in composed)} of the {len(composed)}." in MEASURED


def test_the_compiled_figures_are_those_of_the_rows() -> None:
    """So are those of a compiled step, its graph and its collectives."""
    rows = list(csv.DictReader((ROOT / "benchmarks/results/compile-amd-epyc-2-cores.csv").read_text().splitlines()))
    ours = [row for row in rows if row["mode"] == "compiled" and row["variant"].startswith("syncbn")]
    assert {(row["graphs"], row["graph_breaks"]) for row in ours} == {("1", "0")}
    assert {row["collectives"] for row in ours if row["ranks"] == "2"} == {"34"}
    for ranks, over_bn, over_eager in (
        ("1", "takes {:.2f} to {:.2f} times as long as one with `nn.BatchNorm`", "and {:.2f} to {:.2f} times as long"),
        ("2", "{:.2f} to {:.2f} times as long as `nn.BatchNorm`, which", "and {:.2f} to {:.2f} times as long"),
    ):
        for column, words in (("over_bn", over_bn), ("over_eager", over_eager)):
            ratios = [float(row[column]) for row in ours if row["ranks"] == ranks]
            assert words.format(min(ratios), max(ratios)) in MEASURED
