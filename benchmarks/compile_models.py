"""What compile.py times: a small ResNet's step with a norm, eager or compiled, once it is right."""

import contextlib
import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch._dynamo.utils
import torch.distributed as dist
from torch import nn
from torch._inductor.graph import GraphLowering

from benchmarks.harness import Sample
from benchmarks.resnet import NORMS, ResNet50
from benchmarks.training import FORMATS, Batch, hold, outcome, random_batch, stepper
from tests.support.ranks import Collectives


class Setting(NamedTuple):
    """One comparison: its batch on each rank, its layout, and where."""

    batch: int
    image: int
    layout: str
    width: int
    blocks: tuple[int, ...]
    compiler: str
    device: torch.device
    ranks: int

    def __str__(self) -> str:
        return f"batch {self.batch} {self.layout}"

    def columns(self) -> dict[str, Any]:
        """Those of a row."""
        dtype = "bfloat16" if self.device.type == "cuda" else "float32"
        shared: dict[str, Any] = {"model": f"resnet {self.width} x {len(self.blocks)}", "dtype": dtype}
        return shared | {"batch": self.batch, "image": self.image, "layout": self.layout}

    def model(self, variant: str) -> ResNet50:
        """The same weights for every variant."""
        torch.manual_seed(0)
        model = ResNet50(NORMS[variant], classes=10, width=self.width, blocks=self.blocks).to(self.device)
        return model.to(memory_format=FORMATS[self.layout]).train()

    def data(self, rank: int) -> Batch:
        """A rank's images and labels, the same wherever they are made."""
        return random_batch(self.batch, self.image, 10, self.layout, self.device, seed=1 + rank)


class Entrant:
    """A model with its step; `found` is what its check and its first passes told."""

    def __init__(self, variant: str, mode: str, setting: Setting, rank: int) -> None:
        self.variant, self.setting, self.rank = variant, setting, rank
        self.batch, self.model = setting.data(rank), setting.model(variant)
        self.called = called(self.model, mode, setting.compiler)
        cuda = setting.device.type == "cuda"
        autocast = partial(torch.autocast, "cuda", torch.bfloat16) if cuda else contextlib.nullcontext
        self.step = partial(stepper(self.model, self.called, autocast), self.batch)
        self.found: dict[str, Any] = {"graphs": "", "graph_breaks": "", "kernels": ""}
        self.found["error"] = self.first(self.check, mode, True)
        self.first(self.step, mode, False)  # on a GPU under autocast: another graph
        if mode == "compiled":
            counters = torch._dynamo.utils.counters
            self.found["graphs"] = counters["stats"]["unique_graphs"]
            self.found["graph_breaks"] = sum(counters["graph_break"].values())
        with Collectives() as collectives:
            self.step()
        self.found["collectives"] = collectives.count

    def first(self, work: Callable[[], Any], mode: str, is_check: bool) -> Any:
        """work's result; its seconds and generated kernels are noted if it is the check, or if it compiled."""
        codes: list[str] = []
        start = time.perf_counter()
        with mock.patch.object(GraphLowering, "save_output_code", codes.append):
            result = work()
        if is_check or codes:
            self.found["first_seconds"] = time.perf_counter() - start
            self.found["kernels"] = sum(map(generated_calls, codes)) if mode == "compiled" else ""
        return result

    def check(self) -> float:
        """The larger relative error of a float32 pass's logits and first gradient; raises if it is too large."""
        setting = self.setting
        ranks = [self.rank] if self.variant == "nn.BatchNorm" else list(range(setting.ranks))
        logits, gradient = outcome(self.model, self.called, *self.batch, "sum")
        gradient = gradient.double()
        if len(ranks) > 1:
            dist.all_reduce(gradient)
        right = setting.model("nn.BatchNorm").double()
        images, labels = map(torch.cat, zip(*map(setting.data, ranks), strict=True))
        every, right_gradient = outcome(right, right, images.double(), labels, "sum")
        mine = every.split(setting.batch)[ranks.index(self.rank)]
        return max(hold((logits, gradient), (mine, right_gradient)))


def repetition(entrant: Entrant) -> Sample:
    """Seconds of a step on this rank, all ranks starting together."""
    cuda = entrant.setting.device.type == "cuda"
    dist.barrier()
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    entrant.step()
    if cuda:
        torch.cuda.synchronize()
    return {"step": time.perf_counter() - start}


def called(model: nn.Module, mode: str, compiler: str) -> nn.Module:
    """The model as it is called, with Dynamo's counters at 0."""
    if mode == "eager":
        return model
    torch._dynamo.utils.counters.clear()
    compiled: nn.Module = torch.compile(model, fullgraph=True, backend=compiler)
    return compiled


def generated_calls(code: str) -> int:
    """Calls of generated kernels in a graph's wrapper."""
    return len(re.findall(r"^ +(?:cpp_fused\w*\(|triton_\w+\.run\()", code, re.MULTILINE))
