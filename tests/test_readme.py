"""README.md is true: its snippets run, its links lead somewhere, its numbers are those of the rows it cites."""

import csv
import re
import statistics
from pathlib import Path

import pytest
import torch
from torch import nn

import syncbn

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SECTION = README.split("## Swapping layers")[1].split("\n## ")[0]


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
    assert len(re.findall(r"```python\n", SECTION)) == 5


def test_links_lead_somewhere() -> None:
    """Every file README links to exists."""
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert all((ROOT / link).exists() for link in links)


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
        assert line in README


def test_the_cpu_figures_are_those_of_the_rows() -> None:
    """The ratios that README gives for the layer on CPU are the extremes of the committed rows."""
    rows = list(csv.DictReader((ROOT / "benchmarks/results/layer-amd-epyc-2-cores.csv").read_text().splitlines()))
    ms: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        if row["ranks"] == "2" and row["pass"] == "both":
            ms.setdefault((row["dtype"], row["shape"], row["layout"]), {})[row["variant"]] = float(row["ms"])
    composed = [m["syncbn"] / m["naive_sync"] for m in ms.values()]
    assert f"takes {min(composed):.2f} to {max(composed):.2f} times as long" in README
    assert f"less on {sum(ratio < 1 for ratio in composed)} of the {len(composed)}." in README
    for dtype, words in (
        ("float32", "takes {:.2f} to {:.2f} times as long as"),
        ("bfloat16", "{:.2f} to {:.2f} times in"),
    ):
        alone = [m["syncbn_alone"] / m["nn.BatchNorm"] for key, m in ms.items() if key[0] == dtype]
        assert words.format(min(alone), max(alone)) in README


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
            assert words.format(min(ratios), max(ratios)) in README


def test_commands_exist() -> None:
    """The scripts README names are there."""
    named = set(re.findall(r"(?:launch|tests|benchmarks)/[a-z_]+\.(?:sh|py|sbatch)", README))
    assert named >= {"launch/quickstart.sh", "tests/run.sh"}
    assert all((ROOT / name).exists() for name in named)


def test_rows_name_tests_that_there_are() -> None:
    """Every row of the table of what it works with names tests, and each of them exists."""
    rows = README.split("## Works with")[1].split("\n## ")[0].split("|---|---|---|\n")[1].strip().splitlines()
    assert len(rows) >= 15
    for row in rows:
        file = ""
        names = re.findall(r"`(test_\w+\.py)?::(test_\w+)`", row)
        assert names, row
        for named_file, name in names:
            file = named_file or file
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(), f"{file}::{name}"
