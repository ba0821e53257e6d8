"""The benchmarks' own claims: right statistics, no timing of a wrong layer, true counts, whole files."""

import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import (
    compile,
    compile_models,
    every_kernel,
    harness,
    host,
    kernels,
    layer,
    machine,
    resnet,
    resources,
    shapes,
    step,
    tables,
    variants,
    wire,
)
from benchmarks.checking import check, make_case, oracle
from benchmarks.shapes import Plan
from tests.support.cpu_backends import ON_CPU

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
PLAN = Plan((4, 6, 5, 5), "float32", "channels_last")
COLUMNS = {"layer": layer.COLUMNS, "kernels": kernels.COLUMNS, "step": step.COLUMNS, "wire": wire.COLUMNS}
COLUMNS |= {"compile": compile.COLUMNS, "host": host.COLUMNS}
DTYPE_ORDER = ["bfloat16", "float16", "float32"].index


def test_summary() -> None:
    """Median and 20th and 80th percentile are those of all repetitions, in milliseconds."""
    seconds = [0.005, 0.001, 0.004, 0.002, 0.003, 0.006]
    median, p20, p80, reps = tables.summarize(seconds)
    assert (median, reps) == (pytest.approx(3.5), 6)
    expected = torch.tensor(seconds).quantile(torch.tensor([0.2, 0.8])) * 1e3
    assert [p20, p80] == pytest.approx(expected.tolist())
    assert tables.summarize([0.002]) == (2.0, 2.0, 2.0, 1)


def test_interleave_takes_turns() -> None:
    """Every round has every variant once, another one first each time, and all repetitions are kept."""
    order: list[str] = []

    def sampler(name: str) -> dict[str, float]:
        order.append(name)
        return {"forward": float(len(order)), "backward": 0.0}

    times = harness.interleave({name: partial(sampler, name) for name in "abc"}, reps=3, warmup=1)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert times["a", "forward"] == [4.0, 9.0, 11.0]
    assert set(times) == {(name, phase) for name in "abc" for phase in ("forward", "backward")}
    assert harness.interleave({}, reps=3) == {}


def test_results_are_whole_after_every_row(tmp_path: Path) -> None:
    """A row is in the file at once; one with other columns is refused, and so is appending to other columns."""
    path = tmp_path / "deep" / "r.csv"
    results = tables.Results(path, ("a", "b"))
    results.add({"b": 1.23456, "a": "x, y"})
    assert tables.read_rows(path) == [{"a": "x, y", "b": "1.235"}]
    with pytest.raises(ValueError, match="is in one only"):
        results.add({"a": 1})
    more = tables.Results(path, ("a", "b"), append=True)
    row = more.add({"a": 2, "b": ""})
    assert tables.read_rows(path) == [{"a": "x, y", "b": "1.235"}, {"a": "2", "b": ""}]
    more.add({"a": 4, "b": 5})
    more.amend(row, {"b": 3.0})
    assert [row["b"] for row in tables.read_rows(path)] == ["1.235", "3", "5"]
    assert [each.name for each in path.parent.iterdir()] == ["r.csv"]
    with pytest.raises(ValueError, match="Write to another file"):
        tables.Results(path, ("a", "c"), append=True)


def test_environment_says_where_and_with_what() -> None:
    """The environment of a row fills its columns; a machine may be named."""
    row = machine.environment(None, CPU, ranks=2)
    assert tuple(row) == tables.ENVIRONMENT
    assert row["torch"] == torch.__version__
    assert row["threads"] == torch.get_num_threads()
    assert re.fullmatch(r"[a-z0-9-]+", row["machine"])
    assert machine.environment("here", CPU)["machine"] == "here"


def test_commit_is_git_s_or_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit is a short hash, marked when dirty; where there is no repository it can be given."""
    assert re.fullmatch(r"[0-9a-f]{10}(\+dirty)?|unknown", machine.commit.__wrapped__())
    monkeypatch.setenv("COMMIT", "abc")
    assert machine.commit.__wrapped__() == "abc"


Backward = Callable[[Tensor], tuple[Tensor, ...]]


def _checked(change: Callable[[list[Tensor]], None], fused: bool = False) -> float:
    """The check's answer for our layer after a change of its [y, dx, dweight, dbias, …]."""
    case = make_case(PLAN, CPU, fused=fused)
    ours = variants.variant("ours", variants.ours(case, fused=fused))
    y = ours.forward(case)
    outcome = [y.detach().clone(), *(t.clone() for t in ours.backward(case, y))]
    change(outcome)
    return check("ours", lambda: outcome[0], lambda _: tuple(outcome[1:]), oracle([case], 0, fused))


@pytest.mark.parametrize("fused", [False, True])
def test_check_accepts_our_layer(fused: bool) -> None:
    """Our layer passes its own tolerance, with and without residual and ReLU."""
    assert _checked(lambda _: None, fused) < 3e-6


WRONG = {
    "y": lambda t: t[0].mul_(1.00001),
    "dx is zero": lambda t: t[1].zero_(),
    "dx of one element": lambda t: t[1].view(-1)[:1].add_(1e-4),
    "dweight averaged": lambda t: t[2].div_(2),
    "dbias": lambda t: t[3].add_(1e-3),
    "nan": lambda t: t[0].view(-1)[:1].fill_(float("nan")),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_check_refuses_a_wrong_layer(wrong: Callable[[list[Tensor]], None]) -> None:
    """An output or gradient that is off by more than rounding is not timed."""
    with pytest.raises(AssertionError, match="it is not timed"):
        _checked(lambda outcome: wrong(_contiguous(outcome)))


def _contiguous(outcome: list[Tensor]) -> list[Tensor]:
    outcome[:] = [t.contiguous() for t in outcome]
    return outcome


def test_check_refuses_a_layer_that_does_not_synchronise() -> None:
    """A layer with the statistics of its own batch is wrong where those of two ranks are wanted."""
    cases = [make_case(PLAN, CPU, rank) for rank in range(2)]
    alone = variants.variant("alone", variants.ours(cases[0]))
    forward, backward = partial(alone.forward, cases[0]), partial(alone.backward, cases[0])
    check("alone", forward, backward, oracle(cases[:1], 0, False))
    with pytest.raises(AssertionError, match="y is off"):
        check("alone", forward, backward, oracle(cases, 0, False), ours=False)


def test_the_shapes_are_resnet50_s() -> None:
    """The listed inputs are those that the 53 norms of the model in benchmarks/resnet.py receive."""
    seen: list[tuple[int, ...]] = []
    with torch.device("meta"):
        model = resnet.ResNet50(resnet.NORMS["nn.BatchNorm"])
        for module in model.modules():
            if isinstance(module, resnet.Unfused):
                module.bn.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape)))
        model(torch.empty(2, 3, 224, 224))
    assert len(seen) == 53
    assert sorted(seen) == sorted(shapes.resnet50_norms(2))
    assert set(shapes.resnet50_norms(32)) <= set(shapes.gpu_shapes())
    assert list(shapes.resnet50_norms(2, 64))[::52] == [(2, 64, 32, 32), (2, 2048, 2, 2)]


@pytest.mark.parametrize("world_size", [2, 16])
@pytest.mark.parametrize("channels", [1, 64])
def test_wire_counts_a_layer(world_size: int, channels: int) -> None:
    """Ours is an all-reduce each way, 16C + 24 and 16C + 16 bytes; torch's gathers 8C + 4 bytes and reduces 8C."""
    with wire.fake_world(world_size):
        ours, torchs = (wire.record(scheme, [channels]) for scheme in wire.SCHEMES)
    assert ours["forward"] == [wire.Collective("all_reduce", 16 * channels + 24)]
    assert ours["backward"] == [wire.Collective("all_reduce", 16 * channels + 16)]
    assert torchs["forward"] == [wire.Collective("all_gather", 8 * channels + 4)]
    assert torchs["backward"] == [wire.Collective("all_reduce", 8 * channels)]


def test_wire_ring_bytes() -> None:
    """On a ring a rank receives 2(n − 1)/n of an all-reduced payload, and n − 1 gathered ones."""
    assert wire.Collective("all_reduce", 1000).ring_received(4) == 1500
    assert wire.Collective("all_gather", 1000).ring_received(4) == 3000


def test_wire_file_is_what_is_counted_now() -> None:
    """The committed rows of 2 and 256 ranks are what the code issues today."""
    committed = tables.read_rows(tables.RESULTS / "wire.csv")
    assert {int(row["world_size"]) for row in committed} == set(wire.WORLD_SIZES)
    channels = [shape[1] for shape in shapes.resnet50_norms(1)]
    for world_size in (2, 256):
        then = [row for row in committed if row["world_size"] == str(world_size)]
        now = [{key: str(value) for key, value in row.items()} for row in wire.rows(channels, "resnet50", world_size)]
        assert [{key: row[key] for key in now[0]} for row in then] == now


@pytest.mark.parametrize("smoke", [True, False])
def test_every_kernel_meets_every_case(smoke: bool) -> None:
    """The list has each call of the plain list once, with every shape, dtype, layout and epilogue."""
    ordered = every_kernel.cases(smoke)
    assert sorted(map(str, ordered)) == sorted(map(str, every_kernel._listed(smoke)))
    assert {(c.activation, c.residual, c.mask) for c in ordered} == set(every_kernel.EPILOGUES)
    combinations = {(c.shape, c.dtype, c.layout) for c in ordered}
    assert len(combinations) == len({c.shape for c in ordered}) * len(shapes.DTYPES) * len(every_kernel.LAYOUTS)


def test_every_kernel_begins_with_a_bit_of_everything() -> None:
    """The first twenty calls have every layout with every mask and residual, every shape and every dtype."""
    first, every = every_kernel.cases(False)[:20], every_kernel.cases(False)
    for part in (lambda c: (c.layout, c.mask, c.residual), lambda c: c.shape, lambda c: c.dtype):
        assert set(map(part, first)) == set(map(part, every))


def test_every_kernel_counts_its_calls(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The budget begins after the first call; a wrong call is counted, the others are made, and the script fails."""
    calls: list[every_kernel.Small] = []

    def run(case: every_kernel.Small, device: torch.device) -> float:
        calls.append(case)
        time.sleep(0.2 if len(calls) == 1 else 0)
        assert len(calls) != 3, "it is wrong"
        return 0.5

    monkeypatch.setattr(every_kernel, "run", run)
    with pytest.raises(SystemExit):
        every_kernel.main(["--smoke", "--device", "cpu", "--budget", "0.1"])
    said = capsys.readouterr().err
    assert len(calls) == 18
    assert f"18 of 18 calls, back-end {ON_CPU}" in said
    assert "made 18 calls of all verbs, 1 wrong, error at most 5.0e-01" in said


def test_gpu_plans_begin_with_what_the_goals_are_about() -> None:
    """Large bfloat16 inputs in both layouts first for the verbs; small ones, and fused float16 soon, for the layer."""
    assert [plan.shape for plan in shapes.gpu_plans()[:12:2]] == list(shapes.TYPICAL[:6])
    assert [plan.layout for plan in shapes.gpu_plans()[:4]] == ["channels_last", "contiguous"] * 2
    assert [plan.dtype for plan in shapes.gpu_plans()] == sorted((p.dtype for p in shapes.gpu_plans()), key=DTYPE_ORDER)
    layers = shapes.layer_plans()
    assert len(layers) == len(set(layers)) == 2 * len(shapes.gpu_plans())
    half = [at for at, (plan, op) in enumerate(layers) if (plan.dtype, op) == ("float16", "bn_add_relu")]
    assert len({layers[at][0].shape for at in half[:4]}) == 2
    assert half[3] < 16


def test_tally_counts_the_step_only() -> None:
    """Launches and synchronisations outside the step, such as the profiler's own, do not count."""
    events = [("cudaLaunchKernel", 0.0, 1.0), ("the step", 2.0, 9.0), ("cudaLaunchKernel", 3.0, 4.0)]
    events += [("cuLaunchKernelEx", 4.0, 5.0), ("cudaStreamSynchronize", 5.0, 8.0), ("aten::add", 5.0, 6.0)]
    events += [("cudaDeviceSynchronize", 10.0, 11.0)]
    assert resources.tally(events) == {"launches": 2, "host_syncs": 1}


def test_generated_calls_are_counted_in_a_wrapper() -> None:
    """Calls of generated C++ and Triton kernels count; their definitions, convolutions and collectives do not."""
    code = "cpp_fused_add_0 = async_compile.cpp()\n    cpp_fused_add_0(a, b)\n        triton_poi_1.run(a, grid)\n"
    code += "    buf = extern_kernels.convolution(a)\n    torch.ops._c10d_functional.all_reduce_.default(buf)\n"
    assert compile_models.generated_calls(code) == 2


def test_every_results_file_parses() -> None:
    """Each committed file has the columns of its script, at least one row, and positive times."""
    ours = [path for path in tables.RESULTS.glob("*.csv") if path.stem.partition("-")[0] in COLUMNS]
    assert ours, "wire.csv at least is committed"
    for path in ours:
        tables.check_columns(path, COLUMNS[path.stem.partition("-")[0]])
        rows = tables.read_rows(path)
        assert rows, path
        assert all(float(row["ms_p20"]) <= float(row["ms"]) <= float(row["ms_p80"]) for row in rows if "ms" in row), (
            path
        )


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md"])
def test_cited_results_exist(page: str) -> None:
    """A results file or picture that a page names is in the repository."""
    for name in re.findall(r"results/([\w.-]+\.(?:csv|svg|png))", (ROOT / page).read_text()):
        assert (tables.RESULTS / name).exists(), f"{page} cites {name}"
