"""How many operations a step of a method dispatches beside the network: on a GPU each is a launch, or nearly."""

import pytest

from benchmarks.inversion.looks import operations
from stages.inversion.settings import DdimMethod, FixedPointMethod, InversionMethod, LboMethod


@pytest.mark.parametrize(
    ("method", "most"),
    [(DdimMethod(), 60), (FixedPointMethod(acceleration="anderson"), 135), (LboMethod(), 190)],
    ids=["ddim", "anderson", "lbo"],
)
def test_a_step_stays_as_short_as_it_was_made(method: InversionMethod, most: int) -> None:
    found = operations(method)
    assert 0 < found["computing"] < found["operations"] <= most
