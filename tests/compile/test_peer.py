"""The kernels of peer memory compile for sm_90: wide moves, and flags in system scope."""

import pytest

pytest.importorskip("triton")

from moe_router_kernels import peer
from tests.compile.test_sm90 import INTS, machine_code, spills

LONGS = "*i64"
FLAGS = {"peer_ptr": LONGS, "flag_ptr": LONGS, "epoch_ptr": LONGS, "told_ptr": INTS}
FLAGS |= {"rank": "i32", "bound": "i32"}
PUT = FLAGS | dict.fromkeys(["src_ptr", "start_ptr", "at_ptr"], INTS) | {"x_ptr": "*i16"}
PUT |= dict.fromkeys(["offset", "region", "R", "D"], "i32")


@pytest.mark.parametrize("gather", [True, False])
def test_put_moves_16_bytes_at_once(gather, tmp_path):
    constants = {"W": 2, "GATHER": gather, "ALIGNED": True, "HEAD": 4096, "BLOCK": 4096}
    aligned = ["x_ptr", "D", "offset", "region"]
    sass = machine_code(peer._put_kernel, PUT, constants, tmp_path, aligned, num_warps=8)
    assert spills(sass) == 0
    assert "LDG.E.128" in sass and "STG.E.128" in sass


def test_a_signal_releases_to_the_whole_system(tmp_path):
    sass = machine_code(peer._signal_kernel, FLAGS, {"W": 2}, tmp_path, num_warps=1)
    assert spills(sass) == 0 and "MEMBAR" in sass and "SYS" in sass and "ATOM" in sass


def test_a_wait_looks_again_until_a_bound(tmp_path):
    sass = machine_code(peer._wait_kernel, FLAGS, {"W": 2}, tmp_path, num_warps=1)
    assert spills(sass) == 0 and "SYS" in sass and "BRA" in sass and "BPT.TRAP" not in sass
