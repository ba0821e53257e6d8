"""Ten thousand generated wrong arguments: each is an error of ours in words, and leaves everything as it was."""

import re
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import syncbn

GOT = re.compile(r"got .+\. [A-Z].+|has no .+\. [A-Z].+|come together; got|Expected more than 1 value", re.DOTALL)
"""What was received, and then a sentence of advice."""
NOT_REAL = (torch.int64, torch.bool, torch.complex64, torch.uint8)
C = 4
NUMBERS = st.sampled_from(
    [float("nan"), float("inf"), -float("inf"), "0.1", 1j, [], {}, torch.ones(2), torch.ones(1, 1)]
)


def many(examples: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return settings(
        max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
    )


def refused(call: Callable[[], Any], *unchanged: Tensor) -> None:
    """By an error that our code raised, with its text, and with these tensors as they were."""
    before = [t.clone() for t in unchanged]
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        call()
    raised_in = traceback.extract_tb(caught.tb)[-1].filename.replace("\\", "/")
    assert "/syncbn/" in raised_in, (raised_in, str(caught.value))
    assert GOT.search(str(caught.value)), str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, unchanged, strict=True))


@st.composite
def arguments(draw: st.DrawFn) -> tuple[dict[str, Any], list[Tensor]]:
    """Of the function, right but for one of them."""
    shape = (draw(st.integers(2, 3)), C, *draw(st.lists(st.integers(1, 3), max_size=3)))
    mean, var, tracked = torch.zeros(C), torch.ones(C), torch.tensor(3)
    right: dict[str, Any] = {"input": torch.randn(shape), "running_mean": mean, "running_var": var, "training": True}
    right |= {"weight": torch.ones(C), "bias": torch.zeros(C), "num_batches_tracked": tracked}
    right |= {"residual": torch.randn(shape), "mask": torch.ones(shape[0], *shape[2:], dtype=torch.bool)}
    other_shape = st.sampled_from([(C + 1,), (C, 1), (), (1, C), (0,)])
    wrong_vector = st.one_of(
        other_shape.map(torch.zeros),
        st.sampled_from(NOT_REAL).map(lambda d: torch.zeros(C).to(d)),
        st.sampled_from([0.0, "x", [0.0] * C, torch.zeros(C).to_sparse()]),
    )
    meta = torch.zeros(C, device="meta")
    wrongs: dict[str, st.SearchStrategy[Any]] = {
        "input": st.one_of(
            st.sampled_from([[1.0], "x", 3.0, {}]),
            st.sampled_from(NOT_REAL).map(lambda d: torch.ones(shape).to(d)),
            st.sampled_from([torch.randn(C), torch.randn(()), torch.randn(2, 0, 3), torch.randn(shape).to_sparse()]),
        ),
        "residual": st.one_of(
            st.sampled_from([1.0, "x", []]),
            st.sampled_from(NOT_REAL).map(lambda d: torch.ones(shape).to(d)),
            st.sampled_from([torch.randn(C), torch.randn(*shape, 2)]),
        ),
        "mask": st.one_of(
            st.sampled_from([True, "x", [True]]), st.just(torch.ones(shape[0])), st.just(torch.ones(7, 7) > 0)
        ),
        "activation": st.sampled_from(["gelu", "RELU", "", 3, True]),
        "eps": st.one_of(NUMBERS, st.sampled_from([-1e-5, 0.0, None])),
        "momentum": NUMBERS,
        "num_batches_tracked": st.sampled_from(
            [torch.zeros(2, dtype=torch.int64), torch.tensor(0.5), torch.tensor(True), 0, torch.tensor([0]).to_sparse()]
        ),
    }
    vectors = ("weight", "bias", "running_mean", "running_var")
    wrongs |= {name: st.one_of(wrong_vector, st.just(meta)) for name in vectors}
    wrongs["running_mean"] = st.one_of(wrongs["running_mean"], st.none())
    name = draw(st.sampled_from(sorted(wrongs)))
    right[name] = draw(wrongs[name])
    return right, [t for t in (mean, var, tracked) if right["running_mean"] is not t or name not in vectors]


@many(6000)
@given(arguments())
def test_the_function(given_arguments: tuple[dict[str, Any], list[Tensor]]) -> None:
    """6,000 calls with one wrong argument."""
    keywords, buffers = given_arguments
    refused(lambda: syncbn.functional.sync_batch_norm(**keywords), *buffers)


@many(1500)
@given(st.data())
def test_the_module(data: st.DataObject) -> None:
    """1,500 calls of a layer with a wrong input, residual or mask; a right call afterwards counts one."""
    layer = syncbn.SyncBatchNorm2d(C) if data.draw(st.booleans()) else syncbn.SyncBatchNorm(C)
    shape = (2, C, 3, 2)
    wrong = data.draw(
        st.one_of(
            st.sampled_from(NOT_REAL).map(lambda d: (torch.ones(shape).to(d), None, None)),
            st.just((torch.randn(2, C + 1, 3, 2), None, None)),
            st.sampled_from(NOT_REAL).map(lambda d: (torch.ones(shape), torch.ones(shape).to(d), None)),
            st.sampled_from([torch.ones(2), torch.ones(5, 5) > 0, "x"]).map(lambda m: (torch.ones(shape), None, m)),
        )
    )
    refused(lambda: layer(*wrong), *layer.buffers())
    layer(torch.randn(shape))
    assert layer.num_batches_tracked == 1


@many(1500)
@given(st.data())
def test_constructors(data: st.DataObject) -> None:
    """1,500 layers that cannot be."""
    cls = data.draw(st.sampled_from([syncbn.SyncBatchNorm, syncbn.SyncBatchNorm1d, syncbn.SyncBatchNorm3d]))
    keywords = data.draw(
        st.one_of(
            st.sampled_from([0, -3, 2.5, "4", None, True, [4]]).map(lambda n: {"num_features": n}),
            NUMBERS.map(lambda n: {"num_features": C, "eps": n}),
            NUMBERS.map(lambda n: {"num_features": C, "momentum": n}),
            st.sampled_from(["gelu", 3, True, ""]).map(lambda a: {"num_features": C, "activation": a}),
        )
    )
    refused(lambda: cls(**keywords))


@many(1000)
@given(st.data())
def test_conversion_groups_and_loaders(data: st.DataObject) -> None:
    """1,000 wrong arguments of the rest."""
    call = data.draw(
        st.one_of(
            st.sampled_from(["ignore", 3, None]).map(
                lambda u: lambda: syncbn.convert_sync_batchnorm(nn.BatchNorm1d(C), on_unknown=u)
            ),
            st.sampled_from([0, -1, 2.5, "rack", None, True, []]).map(lambda s: lambda: syncbn.new_group(s)),
            st.sampled_from([3, None, 2.5, object()]).map(lambda x: lambda: syncbn.EvenLoader(x)),
            st.sampled_from(["x", 3]).map(lambda e: lambda: syncbn.EvenLoader([1], empty=e)),
            st.sampled_from([[], None, 3, "model"]).map(lambda m: lambda: syncbn.name_layers(m)),
        )
    )
    refused(call)
