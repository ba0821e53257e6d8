"""Check mode: what differs between the ranks is said before anything is sent."""

import pytest

from tests.support import wrong_ranks
from tests.support.faults import WITHIN, named, strike, unmoved

CHECKED = [
    wrong_ranks.skips,
    wrong_ranks.skips_another_size,
    wrong_ranks.calls_twice,
    wrong_ranks.one_goes_back,
    wrong_ranks.has_more_channels,
    wrong_ranks.has_another_activation,
]
CHECKED += [wrong_ranks.has_another_dtype, wrong_ranks.needs_no_gradient, wrong_ranks.goes_back_in_another_order]


@pytest.mark.parametrize("fault", CHECKED)
def test_check_mode_finds_it_before_anything_is_sent(fault: object) -> None:
    """Also where sizes differ: a RuntimeError on all ranks with a table of all, no abort, no moved buffer."""
    for said in (faulty := strike(fault, 3, SYNCBN_CHECK="1")):
        named(said, "RuntimeError", "in check mode", "rank 0: '", "rank 1: '", "rank 2: '", "Nothing was sent")
        assert said.exit == 1
    if fault in (
        wrong_ranks.skips,
        wrong_ranks.skips_another_size,
        wrong_ranks.has_another_dtype,
        wrong_ranks.needs_no_gradient,
    ):
        unmoved(faulty)


@pytest.mark.parametrize("fault", [wrong_ranks.validates_in_train_mode, wrong_ranks.is_stuck_in_its_loader])
def test_check_mode_waits_no_longer_than_the_patience(fault: object) -> None:
    """A rank that does not come is an error that says where it is."""
    first, _ = strike(fault, within=WITHIN, SYNCBN_CHECK="1")
    named(first, "layer 'first' (forward, call 2, 4 channels)", "rank 1", "in no synchronized layer")
