"""The shared expert runs while rows travel, there and back."""

import pytest

from tests.dispatch import work
from tests.gloo import run_ranks

VARIANT = {"experts": 4, "top_k": 2, "hidden": 12, "shared_hidden": 6}


@pytest.mark.parametrize("name", work.STARTS)
def test_the_shared_expert_runs_between_departure_and_arrival(name):
    forward = ["rows leave", "shared expert", "rows are waited for"]
    backward = ["rows leave", "shared expert, backward", "rows are waited for"]
    # a combine of the others, and its backward, does not start and wait in two calls
    combine = ["rows leave", "rows are waited for"] * 2 if name == "peer_memory" else []
    assert run_ranks(2, work.run_with_log, name, VARIANT) == [forward + combine + backward] * 2
