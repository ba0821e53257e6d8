"""Forward, backward and running statistics against the float64 oracle, over real ranks."""

import itertools

import pytest
import torch

from tests.support.cpu_backends import BACKENDS
from tests.support.layer_runs import check
from tests.support.oracle import Case
from tests.support.ranks import RankPool

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EVEN = ((4, 5, 6, 7),) * 2
UNEVEN = ((4, 5, 6, 7), (1, 5, 3, 9), (7, 5, 2, 2))
EMPTY = ((4, 5, 6, 7), (0, 5, 6, 7))
IMAGE, VOLUME = ((3, 5, 4, 6), (2, 5, 4, 6)), ((2, 5, 3, 4, 2), (3, 5, 3, 4, 2))
VECTOR, SEQUENCE = ((6, 5), (9, 5)), ((3, 5, 8), (2, 5, 7))
ACTIVATIONS = (None, "relu", "leaky_relu", "silu")


def param_cases(*cases: Case) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(case, id=str(case)) for case in cases])


@param_cases(
    *(
        Case(shapes, dtype, backend=backend)
        for backend, dtype, shapes in itertools.product(
            BACKENDS,
            DTYPES,
            (
                EVEN[:1],
                EVEN,
                UNEVEN,
                EMPTY,
                ((0, 5, 6, 7), (4, 5, 6, 7), (1, 5, 1, 1), (2, 5, 3, 1)),
                ((0, 5, 6, 7),) * 2,
                ((1, 5),) * 4,
                ((1, 5, 1, 1), (0, 5, 1, 1)),
            ),
        )
    )
)
def test_batches_of_any_sizes_equal_one_process_with_all_of_them(ranks: RankPool, case: Case) -> None:
    """Even, uneven, empty and one-value ranks give what one process with the concatenated batch gives."""
    check(ranks, case)


@param_cases(
    *(
        Case(shapes, dtype, layout=layout, dy_layout=dy_layout, activation="leaky_relu", backend=backend)
        for backend, dtype, shapes, (layout, dy_layout) in itertools.product(
            BACKENDS,
            (torch.float32, torch.bfloat16),
            (VECTOR, SEQUENCE, IMAGE, VOLUME),
            (
                ("contiguous", "contiguous"),
                ("contiguous", "channels_last"),
                ("channels_last", "channels_last"),
                ("channels_last", "contiguous"),
                ("channels_first", "sliced"),
                ("sliced", "sliced"),
                ("sliced", "expanded"),
                ("channels_last", "expanded"),
                ("expanded", "contiguous"),
            ),
        )
    )
)
def test_strides_do_not_change_the_numbers(ranks: RankPool, case: Case) -> None:
    """x and dy of any rank and any strides, dense, sliced or expanded, give the numbers of contiguous ones."""
    check(ranks, case)


@param_cases(
    *(
        Case(UNEVEN[:2], dtype, activation=activation, residual=residual, layout=layout, backend=backend)
        for backend, dtype, activation, residual, layout in itertools.product(
            BACKENDS, DTYPES, ACTIVATIONS, (False, True), ("contiguous", "channels_last")
        )
        if activation is not None or residual
    )
)
def test_residual_and_activation(ranks: RankPool, case: Case) -> None:
    """activation(bn(x) + residual) and its gradients are those of the composed formula."""
    check(ranks, case)


@param_cases(
    *(
        Case(UNEVEN[:2], dtype, affine=affine, bias=bias, track=track, momentum=momentum, activation="relu")
        for dtype, (affine, bias), (track, momentum) in itertools.product(
            (torch.float64, torch.float32),
            ((True, False), (False, True), (True, True)),
            ((True, None), (True, 0.0), (False, 0.1), (True, 1.0)),
        )
    )
)
def test_flags(ranks: RankPool, case: Case) -> None:
    """Every combination of affine, bias, track_running_stats and momentum keeps its meaning, over three steps."""
    check(ranks, case, steps=3)


@param_cases(
    *(
        Case(shapes, dtype, masked=True, residual=residual, activation=activation, layout=layout, backend=backend)
        for backend, dtype, (residual, activation), (shapes, layout) in itertools.product(
            BACKENDS,
            (torch.float64, torch.float32, torch.bfloat16),
            ((False, None), (True, "relu"), (True, None), (False, "silu")),
            (
                (((3, 5, 9), (2, 5, 9), (4, 5, 6), (1, 5, 4)), "channels_last"),
                (((3, 5, 9), (2, 5, 9)), "contiguous"),
                (IMAGE, "contiguous"),
                (((6, 5), (9, 5)), "contiguous"),
                (((2, 5, 0), (4, 5, 9)), "contiguous"),
            ),
        )
    )
)
def test_mask(ranks: RankPool, case: Case) -> None:
    """Masked-out positions count nowhere, give 0 and receive 0, though all their inputs are NaN."""
    check(ranks, case)


@param_cases(
    *(
        Case(UNEVEN, dtype, parameter_dtype, residual=True, activation="relu", backend=backend)
        for backend, (dtype, parameter_dtype) in itertools.product(
            BACKENDS,
            (
                (torch.float16, torch.float32),
                (torch.bfloat16, torch.float32),
                (torch.float32, torch.float64),
                (torch.float64, torch.float32),
                (torch.float32, torch.float16),
                (torch.bfloat16, torch.float16),
            ),
        )
    )
)
def test_parameters_may_have_another_dtype(ranks: RankPool, case: Case) -> None:
    """Any mix of input and parameter dtypes works and is as exact as each tensor's dtype allows."""
    check(ranks, case)


@param_cases(
    *(
        Case(((40, 3, 60, 60), (3, 3, 60, 60)), dtype, layout=layout)
        for dtype, layout in itertools.product((torch.float16, torch.bfloat16), ("contiguous", "channels_last"))
    )
)
def test_half_modules_count_beyond_the_largest_float16(ranks: RankPool, case: Case) -> None:
    """A fully half module with more than 65,504 values per channel is as exact as a small one."""
    check(ranks, case)


@param_cases(
    *(
        Case(shapes, layout=layout, residual=True, activation="silu")
        for shapes in (((2, 3, 400, 500),), ((9, 700, 60),), ((300000, 2),), ((1, 2, 300000),))
        for layout in ("contiguous", "channels_last")
    ),
    *(Case(((2, 3, 700, 800),), layout=layout) for layout in ("contiguous", "channels_last")),
)
def test_inputs_larger_than_a_block(ranks: RankPool, case: Case) -> None:
    """Inputs that are worked on in several blocks, split along any dimension, are exact."""
    check(ranks, case)


@param_cases(
    *(
        Case(shapes, layout=layout, backend=backend)
        for shapes in (IMAGE, ((2, 3, 4, 4), (0, 3, 4, 4)), ((0, 3, 2, 4, 4), (2, 3, 2, 4, 4)))
        for layout in ("contiguous", "channels_last")
        for backend in BACKENDS
    )
)
def test_outputs_keep_the_memory_format(ranks: RankPool, case: Case) -> None:
    """y and dx have the strides of a dense x, also of a rank without a sample."""
    for outcome in check(ranks, case):
        assert outcome.strides["y"] == outcome.strides["x"] == outcome.strides["dx"]


@param_cases(*(Case(UNEVEN, dtype, activation="silu", residual=True) for dtype in (torch.float32, torch.bfloat16)))
def test_same_inputs_same_bits(ranks: RankPool, case: Case) -> None:
    """Running a step again gives the same bits, on every rank."""
    for first, second in zip(check(ranks, case), check(ranks, case), strict=True):
        for name in ("y", "dx", "dweight", "dbias", "dresidual", "running_mean", "running_var"):
            assert torch.equal(getattr(first, name), getattr(second, name)), name
