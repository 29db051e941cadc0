"""Six faults of `benchmarks.faults` in one run; `tests/slow/test_faults.py` has all, one by one."""

from pathlib import Path

from benchmarks import faults as bench
from benchmarks.fault_cases import STEP, config_of, faults
from benchmarks.fault_shard import order
from moe_router_cluster.session import ray_session

AT = {  # steps that are committed when a rank is killed
    "mid-dispatch": 1,
    "in backward": 2,
    "in the optimizer step": 3,
    "in a checkpoint write": 5,
    "while experts move": STEP,
}


def test_a_rank_killed_at_five_points_and_the_gating_service_leave_no_trace(tmp_path):
    by_point = {fault.point: fault for fault in faults(2) if fault.name.startswith("SIGKILL")}
    moving = by_point["while experts move"]
    with ray_session(config_of(tmp_path, "first", 2).cluster):
        clean = bench.clean_run(moving, tmp_path, 2)
        config = config_of(tmp_path, "six", 2, moving)
        order(Path(config.run.dir) / "six", *((by_point[point], AT[point]) for point in AT))
        with bench.faulty_ranks(), bench.gating_killed("six"):
            facts = bench.train_once(config)
    assert facts["recoveries"] == len(AT), facts["recovery_log"]
    assert [loss["killed"] for loss in facts["recovery_log"]] == [False] * len(AT)
    assert bench.learned(config) == clean
