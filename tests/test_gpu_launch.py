"""Which back-end serves a tensor, and how a kernel is launched; without a device, on stand-ins."""

import inspect
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from syncbn import backends
from syncbn.backends import gpu_launch, gpu_workspace
from tests.support.cpu_backends import ON_CPU


class Recorder:
    """A kernel: `recorder[grid](...)` notes the call and returns what was compiled, if anything."""

    arg_names = ("x_ptr", "weight_ptr", "n", "SECOND", "FIRST")
    params = tuple(
        SimpleNamespace(name=name, is_constexpr=name.isupper(), do_not_specialize_on_alignment=name == "weight_ptr")
        for name in arg_names
    )

    def __init__(self, compiled: Any) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.compiled = compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.calls.append((grid, args, options))
            return self.compiled

        return call


def test_a_compiled_kernel_is_launched_directly() -> None:
    """The second launch with x aligned alike bypasses Triton's dispatch, constants in the kernel's order; the alignment
    of a parameter does not count."""
    compiled = Recorder(None)
    compiled.packed_metadata = ()  # type: ignore[attr-defined]
    function = Recorder(compiled)
    kernel = gpu_launch.Kernel(function, {"FIRST": 1, "SECOND": 2}, 4)
    storage = torch.zeros(64)
    aligned, odd = storage[:8], storage[1:9]
    for x, weight in ((aligned, aligned), (aligned, odd), (storage[4:], odd), (None, aligned)):
        gpu_launch.launch(kernel, 7, (x, weight), (3,))
    assert [len(function.calls), len(compiled.calls)] == [1, 3]
    assert function.calls[0][0] == (7, 1, 1)
    assert function.calls[0][2] == {"FIRST": 1, "SECOND": 2, "num_warps": 4, "enable_fp_fusion": False}
    assert compiled.calls[0][0] == (7, 1, 1)
    assert compiled.calls[0][1][2:] == (3, 2, 1)
    gpu_launch.launch(kernel, 7, (odd, aligned), (3,))
    assert [len(function.calls), len(compiled.calls)] == [2, 3]


def test_the_interpreter_is_always_called() -> None:
    """What returns no compiled kernel is not kept."""
    function = Recorder(None)
    kernel = gpu_launch.Kernel(function, {}, 4)
    for _ in range(3):
        gpu_launch.launch(kernel, 1, (torch.zeros(4), None), ())
    assert len(function.calls) == 3
    assert kernel.compiled == {}


def test_captured_launches_have_their_own_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """No two captured launches share a semaphore; where none are left the graph fills its own."""
    arena = torch.zeros(10, dtype=torch.int32)
    monkeypatch.setitem(gpu_workspace._arenas, 0, [arena])
    device = torch.device("cpu")
    first, second, third = (gpu_workspace._captured_zeros(device, size) for size in (4, 4, 4))
    first += 1
    second += 2
    assert arena.tolist() == [1] * 4 + [2] * 4 + [0] * 2
    assert third.tolist() == [0] * 4


def fake(device: str, dtype: torch.dtype = torch.float32) -> Any:
    return SimpleNamespace(device=SimpleNamespace(type=device), dtype=dtype)


def test_cuda_tensors_take_these_kernels() -> None:
    """With triton installed, every real floating dtype on a CUDA device is served here."""
    pytest.importorskip("triton", reason="triton is made for Linux only")
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert backends.name_for(fake("cuda", dtype)) == "gpu"
    assert backends.name_for(fake("cpu")) == ON_CPU


def test_the_slow_path_says_so_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Without triton, or with a dtype no kernel is made for, plain operations serve and one debug line says why."""
    backends._say_reference.cache_clear()
    monkeypatch.setattr(backends, "_has_triton", lambda: False)
    with caplog.at_level(logging.DEBUG, logger="syncbn"):
        assert [backends.name_for(fake("cuda")) for _ in range(3)] == ["reference"] * 3
        assert backends.name_for(fake("cuda", torch.float8_e4m3fn)) == "reference"
    assert [record.getMessage() for record in caplog.records] == [
        "torch.float32 tensors on cuda take plain torch operations: triton is not installed",
        "torch.float8_e4m3fn tensors on cuda take plain torch operations: no back-end is made for them",
    ]


@pytest.mark.parametrize("verb", ["batch_sums", "normalize", "grad_sums", "grad_input"])
def test_signatures_are_the_protocols(verb: str) -> None:
    """Names and order of the arguments are those of the Protocol."""
    pytest.importorskip("triton", reason="triton is made for Linux only")
    ours = inspect.signature(getattr(backends._load("gpu"), verb))
    protocol = inspect.signature(getattr(backends.Backend, verb))
    assert list(ours.parameters) == list(protocol.parameters)[1:]


def test_a_launcher_of_another_kind_is_called_as_it_is() -> None:
    """Without what Triton's CUDA launcher has, such as HIP's, a compiled kernel is launched by its own way."""
    gpu_triton = pytest.importorskip("syncbn.backends.gpu_triton", reason="triton is made for Linux only")
    calls = []

    class Run:
        global_scratch_size = profile_scratch_size = 0
        launch_cooperative_grid = False

        def __call__(self, *args: Any) -> None:
            calls.append(args)

    compiled = SimpleNamespace(run=Run(), function=1, packed_metadata=())
    gpu_triton.direct_launch(compiled, 7, (5,))(3, 64)
    assert calls == [(7, 1, 1, 3, 1, (), None, None, None, 64, 5)]
