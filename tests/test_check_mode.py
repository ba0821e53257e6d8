"""Check mode: what differs between the ranks is said before anything is sent."""

import pytest

from tests import astray
from tests.faults import WITHIN, named, strike, unmoved

CHECKED = [
    astray.skips,
    astray.skips_another_size,
    astray.calls_twice,
    astray.one_goes_back,
    astray.has_more_channels,
    astray.has_another_activation,
]
CHECKED += [astray.has_another_dtype, astray.needs_no_gradient, astray.goes_back_in_another_order]


@pytest.mark.parametrize("fault", CHECKED)
def test_check_mode_finds_it_before_anything_is_sent(fault: object) -> None:
    """Also where sizes differ: a RuntimeError on all ranks with a table of all, no abort, no moved buffer."""
    for said in (faulty := strike(fault, 3, SYNCBN_CHECK="1")):
        named(said, "RuntimeError", "in check mode", "rank 0: '", "rank 1: '", "rank 2: '", "Nothing was sent")
        assert said.exit == 1
    if fault in (astray.skips, astray.skips_another_size, astray.has_another_dtype, astray.needs_no_gradient):
        unmoved(faulty)


@pytest.mark.parametrize("fault", [astray.validates_in_train_mode, astray.is_stuck_in_its_loader])
def test_check_mode_waits_no_longer_than_the_patience(fault: object) -> None:
    """A rank that does not come is an error that says where it is."""
    first, _ = strike(fault, within=WITHIN, SYNCBN_CHECK="1")
    named(first, "layer 'first' (forward, call 2, 4 channels)", "rank 1", "in no synchronized layer")
