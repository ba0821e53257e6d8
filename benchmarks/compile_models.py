"""What compile.py times: a small ResNet's step with a norm, eager or compiled, once it is right."""

import contextlib
import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch._dynamo.utils
import torch.distributed as dist
from torch import nn
from torch._inductor.graph import GraphLowering

from benchmarks.harness import Sample
from benchmarks.training import Setting, check, stepper
from tests.support.ranks import Collectives


class Entrant:
    """A model with its step; `found` is what its check and its first passes told."""

    def __init__(self, variant: str, mode: str, setting: Setting, compiler: str, rank: int) -> None:
        self.on_gpu = setting.device.type == "cuda"
        model = setting.model(variant)
        called = compiled(model, compiler) if mode == "compiled" else model
        autocast = partial(torch.autocast, "cuda", torch.bfloat16) if self.on_gpu else contextlib.nullcontext
        self.step = partial(stepper(model, called, autocast), setting.data(rank))
        self.found: dict[str, Any] = {"graphs": "", "graph_breaks": "", "kernels": ""}
        checked = partial(check, setting, variant, model, called, rank, dist.get_world_size())
        self.found["error"] = max(self.first(checked, mode, True))
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

    def repetition(self) -> Sample:
        """Seconds of a step on this rank, all ranks starting together."""
        dist.barrier()
        if self.on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        self.step()
        if self.on_gpu:
            torch.cuda.synchronize()
        return {"step": time.perf_counter() - start}


def compiled(model: nn.Module, compiler: str) -> nn.Module:
    """The model as it is called, with Dynamo's counters at 0."""
    torch._dynamo.utils.counters.clear()
    made: nn.Module = torch.compile(model, fullgraph=True, backend=compiler)
    return made


def generated_calls(code: str) -> int:
    """Calls of generated kernels in a graph's wrapper."""
    return len(re.findall(r"^ +(?:cpp_fused\w*\(|triton_\w+\.run\()", code, re.MULTILINE))
