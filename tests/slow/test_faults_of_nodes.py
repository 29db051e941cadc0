"""The faults of `benchmarks.faults` that take their Ray with them: a module of their own, for a Ray
of another module's tests must be gone."""

import pytest

from benchmarks import faults as bench
from benchmarks.fault_cases import CHECKPOINT_EVERY, faults

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
OWN_RAY = [fault for fault in faults(2) if fault.victim in bench.OWN_RAY]


@pytest.mark.parametrize("fault", OWN_RAY, ids=lambda fault: fault.name)
def test_a_lost_driver_and_a_lost_node_leave_no_trace(fault, tmp_path):
    row = bench.measure(fault, tmp_path, 2, bench.clean_run(fault, tmp_path, 2))
    assert row["correct"], row
    assert row["from_step"] >= CHECKPOINT_EVERY, row
