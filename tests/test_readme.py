"""README.md and the pages it leads to are true: snippets run, links lead somewhere, numbers are those of the rows."""

import csv
import importlib
import pkgutil
import re
import statistics
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import syncbn
from benchmarks import goals

ROOT = Path(__file__).parent.parent
README, MEASURED, TESTED, LAUNCHED = (
    (ROOT / folder / "README.md").read_text() for folder in ("", "benchmarks", "tests", "launch")
)
SECTION = README.split("## Use")[1].split("\n### ")[0]


class Model(nn.Module):
    """What the snippets call model: a backbone and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x).mean((2, 3)))


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL))
def test_swapping_snippets_run(snippet: str, tmp_path: Path) -> None:
    """Every snippet of the section runs as it stands, on a converted model."""
    names = {
        "torch": torch,
        "syncbn": syncbn,
        "model": syncbn.convert_sync_batchnorm(Model()),
        "images": torch.randn(2, 3, 8, 8),
        "path": tmp_path / "model.pt",
        "evaluate": lambda model: float(model(torch.randn(2, 3, 8, 8)).detach().sum()),
    }
    exec(snippet, names)


def test_the_section_has_its_snippets() -> None:
    """The pattern above finds what is there."""
    assert len(re.findall(r"```python\n", SECTION)) == 3


def test_links_lead_somewhere() -> None:
    """Every file that a page links to exists, and has the section that it is to lead to."""
    for folder, page in (("", README), ("benchmarks", MEASURED), ("tests", TESTED), ("launch", LAUNCHED)):
        links = re.findall(r"\]\(([^)#:]+)(?:#([^)]+))?\)", page)
        for link, section in links:
            target = ROOT / folder / link
            assert target.exists(), link
            heads = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if section else []
            assert section in [*(head.lower().replace(" ", "-") for head in heads), ""], section
    assert len(README.splitlines()) <= 160


def test_names_are_there() -> None:
    """Every name of ours that README writes can be imported, and every module whose docstring it leads to is there."""
    for name in set(re.findall(r"\bsyncbn\.[a-zA-Z_.0-9]*[a-zA-Z0-9]", README)) - {"syncbn.forward", "syncbn.backward"}:
        assert pkgutil.resolve_name(name) is not None
    for name, members in re.findall(r"from (syncbn[a-z.]*) import ([A-Za-z_, ]+)`", README):
        module = importlib.import_module(name) if name != "syncbn.compat.lightning" else None
        assert module is None or all(hasattr(module, member) for member in members.split(", "))


def test_the_norms_table_is_that_of_the_rows() -> None:
    """Accuracy, loss and time by norm are those of the committed rows."""
    rows = list(csv.DictReader((ROOT / "benchmarks/results/norms-epyc-2-cores.csv").read_text().splitlines()))
    label = {
        "syncbn": "SyncBatchNorm",
        "group": "GroupNorm",
        "batch": "BatchNorm, unsynchronized",
        "instance": "InstanceNorm",
    }
    for norm, name in label.items():
        accuracy = [100 * float(row["accuracy"]) for row in rows if row["norm"] == norm]
        loss = statistics.mean(float(row["loss"]) for row in rows if row["norm"] == norm)
        assert len(accuracy) == 3
        ms = statistics.mean(float(row["ms_per_step"]) for row in rows if row["norm"] == norm)
        line = (
            f"| {name} | {statistics.mean(accuracy):.1f} ± {statistics.stdev(accuracy):.1f} | {loss:.3f} | {ms:.0f} |"
        )
        assert line in MEASURED


def test_the_recomputed_figures_are_those_of_the_rows() -> None:
    """So are the accuracies with running and with recomputed statistics."""
    rows = list(csv.DictReader((ROOT / "benchmarks/results/recomputed-epyc-2-cores.csv").read_text().splitlines()))
    for norm, name in (("batch", "BatchNorm, unsynchronized"), ("syncbn", "SyncBatchNorm")):
        columns = ("accuracy", "recomputed_accuracy")
        cells = [[100 * float(row[column]) for row in rows if row["norm"] == norm] for column in columns]
        assert [len(values) for values in cells] == [3, 3]
        before, after = (f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" for values in cells)
        assert f"| {name} | {before} | {after} |" in MEASURED


def spread(rows: list[dict[str, str]], column: str, digits: int = 1, unit: float = 1) -> str:
    values = [unit * float(row[column]) for row in rows]
    assert len(values) == 3
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def test_the_examples_figures_are_those_of_the_rows() -> None:
    """So are the accuracies of the recurrent net and the bounds of the autoencoder."""
    speech, digits = (
        list(csv.DictReader((ROOT / f"benchmarks/results/{name}-epyc-2-cores.csv").read_text().splitlines()))
        for name in ("sequences", "vae")
    )
    masked, plain = (spread([r for r in speech if r["mask"] == m], "accuracy", 1, 100) for m in ("True", "False"))
    assert f"accuracy is {masked} % with it and {plain} % without" in LAUNCHED
    of = {norm: [row for row in digits if row["norm"] == norm] for norm in ("syncbn", "batch", "none")}
    sync, batch, none = (spread(rows, "bound") for rows in of.values())
    assert f"is {sync} nats an image with SyncBatchNorm, {batch} with BatchNorm and {none} without a norm" in LAUNCHED
    again = [spread(of[norm], "recomputed_bound") for norm in ("syncbn", "batch")]
    assert f"recomputed statistics {again[0]} and {again[1]};" in LAUNCHED


def test_the_batch_size_table_is_that_of_the_rows() -> None:
    """So are the accuracies by norm and images a rank."""
    rows = of_a("amd-epyc-2-cores", "batch-size")
    for label, norm, column in (
        ("SyncBatchNorm", "syncbn", "accuracy"),
        ("BatchNorm, unsynchronized", "batch", "accuracy"),
        ("the same, statistics recomputed", "batch", "recomputed_accuracy"),
        ("GroupNorm", "group", "accuracy"),
        ("InstanceNorm", "instance", "accuracy"),
    ):
        of = [[row for row in rows if (row["norm"], row["batch_per_rank"]) == (norm, n)] for n in "1 2 4 8 16".split()]
        assert f"| {label} | {' | '.join(spread(some, column, 1, 100) for some in of)} |" in MEASURED


def of_a(machine: str, script: str, **chosen: str) -> list[dict[str, str]]:
    """The committed rows with these values."""
    rows = list(csv.DictReader((ROOT / f"benchmarks/results/{script}-{machine}.csv").read_text().splitlines()))
    return [row for row in rows if chosen.items() <= row.items()]


of_an_h200 = partial(of_a, "h200")


def over(rows: list[dict[str, str]], mine: str, other: str) -> list[float]:
    """Times of mine over those of the other, wherever both were measured in a comparison."""
    columns = ("op", "shape", "layout", "dtype", "mode", "pass")
    ms = {(row["variant"], *map(row.get, columns)): float(row["ms"]) for row in rows}
    pairs = [(time, ms.get((other, *key))) for (variant, *key), time in ms.items() if variant == mine]
    return [mine_takes / other_takes for mine_takes, other_takes in pairs if other_takes is not None]


def said(words: str, values: list[float]) -> str:
    return words.format(min(values), max(values))


def test_the_gpu_figures_of_a_layer_are_those_of_the_rows() -> None:
    """So are the extremes of a layer on a GPU, by what it is compared with, and the host's time for a small one."""
    bf16 = of_an_h200("layer", dtype="bfloat16", **{"pass": "both"})
    graphs, eager = ([row for row in bf16 if row["mode"] == mode] for mode in ("graph", "eager"))
    last, planes = ([row for row in graphs if row["layout"] == layout] for layout in ("channels_last", "contiguous"))
    alone, alone_planes = (over(rows, "syncbn", "nn.BatchNorm") for rows in (last, planes))
    assert said("takes {:.2f} to {:.2f} times as long as `nn.BatchNorm` on ", alone) + f"{len(alone)} i" in MEASURED
    assert said("and {:.2f} to {:.2f} times on ", alone_planes) + f"{len(alone_planes)} contiguous ones" in MEASURED
    forced = over(graphs, "syncbn.forced", "nn.SyncBatchNorm.forced")
    assert said("takes {:.2f} to {:.2f} times as long as `nn.SyncBatchNorm` with", forced) in MEASURED
    large = [
        row for row in bf16 if row["mode"] == "graph" and row["op"] == "bn" and goals.megabytes(row) >= goals.LARGE
    ]
    assert said("take {:.2f} to {:.2f} times as long as two copies of them", over(large, "syncbn", "copy")) in MEASURED
    assert said("the layer takes {:.2f} to {:.2f} times", over(eager, "syncbn", "nn.BatchNorm")) in MEASURED
    host = {row["variant"]: float(row["us"]) for row in of_an_h200("host", shape="2x64x8x8", **{"pass": "both"})}
    assert f"{host['syncbn']:.0f} µs of the host's time where that takes {host['nn.BatchNorm']:.0f}" in MEASURED


def test_the_gpu_figures_of_kernels_are_those_of_the_rows() -> None:
    """So are the kernels' speeds over a copy's."""
    rows = of_an_h200("kernels", dtype="bfloat16", variant="syncbn", epilogue="none")
    for words, rows_of in (
        ("{:.2f} to {:.2f} of a copy's speed at 64 MB", [row for row in rows if goals.megabytes(row) >= 64]),
        ("{:.2f} to {:.2f} at 3 MB", [row for row in rows if goals.megabytes(row) <= goals.SMALL]),
    ):
        assert said(words, [1 / float(row["over_copy"]) for row in rows_of if row["cache"] != "hot"]) in MEASURED


def test_the_gpu_figures_of_a_step_are_those_of_the_rows() -> None:
    """So are those of a ResNet-50 step, as a graph and eager, and how often the host waits in it."""
    chosen = {"batch": "32", "layout": "channels_last"}
    eager, graph = (
        {row["variant"]: row for row in of_an_h200("step", comparison=name, **chosen)} for name in ("eager", "graph")
    )
    for step, drop_in, fused, collectives, torchs in (
        (
            graph,
            "graph, takes {} as long",
            "and {} with addition and ReLU in the layer, also",
            "",
            "it takes {} as long",
        ),
        (
            eager,
            "step takes {} as long",
            "and {} with addition",
            "collectives it takes {} as long",
            "and with those of {}",
        ),
    ):
        ratios = {name: f"{float(row['over_bn']):.2f} times" for name, row in step.items()}
        assert drop_in.format(ratios["syncbn"]) in MEASURED
        assert fused.format(ratios["syncbn.fused"]) in MEASURED
        assert torchs.format(ratios["nn.SyncBatchNorm.forced"]).replace("of ", "of `nn.SyncBatchNorm` ") in MEASURED
        assert collectives.format(ratios["syncbn.fused.forced"]) in MEASURED
    assert f"{float(graph['syncbn.fused.forced']['over_bn']):.2f}" == f"{float(graph['syncbn.fused']['over_bn']):.2f}"
    assert {row["host_syncs"] for name, row in eager.items() if name.startswith("syncbn")} == {"0"}
    assert f"that one {eager['nn.SyncBatchNorm.forced']['host_syncs']} times" in MEASURED
    earlier = {row["variant"]: float(row["over_bn"]) for row in of_a("h100", "step", **chosen)}
    ratios = [f"{earlier[name]:.2f}" for name in ("syncbn", "syncbn.fused", "syncbn.fused.forced")]
    assert "took {}, {} and, with collectives, {} times".format(*ratios) in MEASURED


def test_the_gpu_tests_and_sanitizers_were_clean() -> None:
    """What README says of them is what their rows say, and they are of the times' commits, whose kernels are alike."""
    parts = {row["part"]: row for row in of_an_h200("parts")}
    assert {parts[name]["status"] for name in goals.WATCHED} == {"0"}
    commits = {row["commit"] for script in ("parts", "layer", "kernels", "host", "step") for row in of_an_h200(script)}
    assert commits == {"1cf2868a74", "5555beb618"}


def test_the_compiled_figures_on_a_gpu_are_those_of_the_rows() -> None:
    """So are those of a compiled step there, which has no graph break either."""
    compiled = {row["variant"]: row for row in of_an_h200("compile", mode="compiled")}
    ours = [row for name, row in compiled.items() if name.startswith("syncbn")]
    assert {row["graph_breaks"] for row in ours} == {"0"}
    for column, words in (
        ("over_bn", "takes {:.2f} to {:.2f} times as long as with `nn.BatchNorm`, compiled too"),
        ("over_eager", "and {:.2f} to {:.2f} times as long as uncompiled: there"),
    ):
        assert said(words, [float(row[column]) for row in ours]) in MEASURED


def test_the_machine_code_table_is_that_of_the_rows() -> None:
    """benchmarks/README.md's table of the kernels' machine code, before and after, and their speed, is of the rows."""
    columns = ("kilobytes_in_flight_per_sm", "instructions_per_element", "instructions_once")
    rows = list(csv.DictReader((ROOT / "benchmarks/results/static-sm90.csv").read_text().splitlines()))
    chosen = {"shape": "2x256x200x336", "epilogue": "none"}
    for verb in ("batch_sums", "normalize", "grad_sums", "grad_input"):
        for name, layout in (("NHWC", "channels_last"), ("NCHW", "contiguous")):
            wanted = {"verb": verb, "layout": name, "dtype": "bf16", **chosen}
            states = {row["state"]: row for row in rows if wanted.items() <= row.items()}
            before, after = states["before"], states["after"]
            cells = [f"{before[column]} → {after[column]}" for column in (*columns, "bytes_last_program_reads")]
            wanted = {"verb": verb, "layout": layout, "dtype": "bfloat16", "variant": "syncbn", "cache": "cold"}
            (timed,) = of_an_h200("kernels", **wanted, **chosen)
            assert f"| {verb}, {name} | {' | '.join(cells)} | {1 / float(timed['over_copy']):.2f} |" in MEASURED


def test_commands_exist() -> None:
    """The scripts README names are there."""
    pages = "".join((README, MEASURED, TESTED, LAUNCHED))
    named = set(re.findall(r"(?:launch|tests|benchmarks)/[a-z_]+\.(?:sh|py|sbatch)", pages))
    assert named >= {"launch/quickstart.sh", "tests/run.sh"}
    assert all((ROOT / name).exists() for name in named)


@pytest.mark.parametrize(("section", "least"), [("Works with", 20), ("When ranks go astray", 15)])
def test_rows_name_tests_that_there_are(section: str, least: int) -> None:
    """Every row of the tables of what is held names tests, and each of them exists."""
    lines = TESTED.split(f"## {section}")[1].split("\n## ")[0].splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.endswith("| tests |")]
    assert len(rows) >= least
    for row in rows:
        file = ""
        names = re.findall(r"`(test_\w+\.py)?::(test_\w+)`", row)
        assert names, row
        for named_file, name in names:
            file = named_file or file
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(), f"{file}::{name}"


def test_the_first_table_is_that_of_the_rows() -> None:
    """README's one table has the extremes that benchmarks/README.md has, and the ratios of two layers' steps."""
    chosen = {"batch": "32", "layout": "channels_last"}
    for name, words in (("graph", "| 0.79; 0.73 | {:.2f} |"), ("eager", "| 1.08; 1.00 | {:.2f} |")):
        ms = {row["variant"]: float(row["ms"]) for row in of_an_h200("step", comparison=name, **chosen)}
        assert words.format(ms["syncbn.fused.forced"] / ms["nn.SyncBatchNorm.forced"]) in README
    for first, second in re.findall(r"\| (0\.\d\d to \d\.\d\d)(?:; (\d\.\d\d to \d\.\d\d))? \|", README):
        assert all(f" {extremes} " in MEASURED for extremes in (first, second) if extremes)
    for ratio in ("takes 0.79 times", "and 0.73 times", "takes 1.08 times", "and 1.00 times"):
        assert ratio in MEASURED
