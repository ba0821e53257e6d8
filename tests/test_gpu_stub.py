"""What a driver is given by the GPU back-end: Triton's real launcher on a driver that runs nothing."""

from collections.abc import Iterator

import pytest
import torch

from tests.support import stub_device, stub_direct_jobs, stub_jobs
from tests.support.stub_jobs import Given
from tests.support.triton_process import TritonProcess

pytest.importorskip("triton", reason="triton is made for Linux only")


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonProcess]:
    if reason := stub_device.why_not():
        pytest.skip(reason)
    process = TritonProcess(stub_device.build(tmp_path_factory.mktemp("driver")), stub_device.install)
    yield process
    process.close()


GIVEN = {
    "planes": Given((4, 64, 14, 16)),
    "rows, cumulative": Given((4, 64, 14, 14), "channels_last", momentum=None),
    "small planes, float16": Given((4, 64, 7, 7), dtype=torch.float16, activation="silu"),
    "masked": Given((4, 64, 7, 7), masked=True, activation="leaky_relu"),
    "3 channels": Given((4, 3, 9, 9), "channels_last", residual=False, activation=None),
    "no parameters, one sample": Given((1, 1, 1, 2), residual=False, activation=None, affine=False, track=False),
    "float64": Given((16, 5), dtype=torch.float64),
    "empty": Given((0, 5, 3, 3)),
    "one value a channel": Given((1, 16, 1, 1)),
    "a crop": Given((4, 6, 5, 8), "sliced"),
    "off its alignment": Given((4, 64, 14, 16), offset=3),
    "an integer momentum": Given((4, 16, 8, 8), momentum=1),
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_every_argument_arrives(device: TritonProcess, given: Given) -> None:
    """First call and kept kernel: each parameter that the machine code declares has the value that was given for it."""
    assert device.run(stub_jobs.every_argument_arrives, given) >= 10


CAPTURED = {
    "one group": Given((8, 16, 9, 9), "channels_last"),
    "planes": Given((4, 64, 14, 16)),
    "40 channels": Given((8, 40, 9, 9)),
    "cumulative": Given((4, 64, 14, 14), "channels_last", momentum=None),
}


@pytest.mark.parametrize("given", CAPTURED.values(), ids=CAPTURED)
def test_captured_calls_load_nothing(device: TritonProcess, given: Given) -> None:
    """Under graph capture nothing is compiled, whatever the addresses, and no two launches share semaphores."""
    device.run(stub_jobs.captured_calls_load_nothing, given)


def test_parameters_may_begin_anywhere(device: TritonProcess) -> None:
    """A parameter's alignment costs no compilation."""
    assert device.run(stub_jobs.parameters_may_begin_anywhere) == 0


def test_devices_have_their_own_kernels(device: TritonProcess) -> None:
    """Two devices keep their own compiled kernels."""
    device.run(stub_jobs.devices_have_their_own_kernels)


KINDS = ("dtype", "strides")
DIRECT = {
    "rows": Given((4, 64, 14, 14), "channels_last"),
    "planes": Given((4, 64, 14, 16), residual=False),
    "small planes, no activation": Given((4, 64, 7, 7), activation=None),
    "float64": Given((16, 5), dtype=torch.float64, activation="silu"),
    "float32": Given((2, 6, 40), dtype=torch.float32, activation=None, residual=False),
}


@pytest.mark.parametrize("given", DIRECT.values(), ids=DIRECT)
def test_the_direct_way_is_the_same(device: TritonProcess, given: Given) -> None:
    """A layer's later steps go the direct way, with the first one's kernels, grids and numbers, each given its own."""
    assert device.run(stub_direct_jobs.the_direct_way_is_the_same, given) == ["direct"] * 2


@pytest.mark.parametrize("given", DIRECT.values(), ids=DIRECT)
def test_both_ways_tell_the_device_alike(device: TritonProcess, given: Given) -> None:
    """On two ranks all four kernels get their call's tag, the two after a sum its turn and where to report."""
    assert device.run(stub_direct_jobs.both_ways_tell_the_device_alike, given) == ["direct"] * 2


def test_a_forced_layer_is_direct(device: TritonProcess) -> None:
    """What step.py times with collectives goes the way that a layer with peers goes."""
    given = DIRECT["rows"]
    assert device.run(stub_direct_jobs.a_forced_layer_is_direct, given) == ["direct"] * 2


UNUSUAL = ["hook", "capture", "address", "dtype", *(f"{k} at the same address" for k in KINDS)]
USUAL = ["nothing", "data", "parameter"]


@pytest.mark.parametrize(("what", "then"), [*((what, True) for what in USUAL), *((what, False) for what in UNUSUAL)])
def test_what_is_unusual_goes_the_readable_way(device: TritonProcess, what: str, then: bool) -> None:
    """A hook on launches hears all four; a capture, an odd address, another dtype are not launched directly.

    Another parameter of the same kind is.
    """
    at_once = what != "strides at the same address"  # a slice never is
    assert device.run(stub_direct_jobs.ways_of, what) == [False, True, then, at_once]


@pytest.mark.parametrize("what", ["nothing", "weight", "bias", "x", "dy", "a batch of dy"])
def test_a_backward_sees_what_was_changed(device: TritonProcess, what: str) -> None:
    """A backward whose dy, x or parameters are of another kind than in forward goes the readable way."""
    assert device.run(stub_direct_jobs.backward_is_direct, what) == (what == "nothing")


def test_a_forced_backend_is_obeyed(device: TritonProcess) -> None:
    """A known call goes to the back-end that is asked for."""
    assert device.run(stub_direct_jobs.a_forced_backend_is_obeyed) == 0


def test_knowing_a_call_costs_no_memory(device: TritonProcess) -> None:
    """Nothing of an activation's size is allocated after ranks have communicated."""
    assert device.run(stub_direct_jobs.knowing_a_call_costs_no_memory) == []


def test_unusual_calls_are_known_as_such(device: TritonProcess) -> None:
    """What can never be launched directly is found out once."""
    assert device.run(stub_direct_jobs.unusual_calls_are_known_as_such) == 1
