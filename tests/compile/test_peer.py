"""The kernels of peer memory compile for sm_90: wide moves, and flags in system scope."""

import pytest

pytest.importorskip("triton")

from moe_router_kernels import address, peer
from tests.compile.test_sm90 import INTS, machine_code, spills

LONGS = "*i64"
FLAGS = {"peer_ptr": LONGS, "flag_ptr": LONGS, "epoch_ptr": LONGS, "told_ptr": INTS}
FLAGS |= {"rank": "i32", "bound": "i32"}
PUT = FLAGS | dict.fromkeys(["src_ptr", "also_ptr", "start_ptr", "at_ptr"], INTS)
PUT |= {"x_ptr": "*i16"} | dict.fromkeys(["x_offset", "head_offset", "tail_offset"], "i32")
PUT |= dict.fromkeys(["turns", "D"], "i32")
ROWS = dict.fromkeys(
    ["target_ptr", "planned_ptr", "rank_of_ptr", "slot_of_ptr", "rank_ptr", "slot_ptr"], INTS
)
ROWS |= dict.fromkeys(["bits_ptr", "src_ptr", "row_ptr", "packed_ptr", "told_ptr"], INTS)
ROWS |= dict.fromkeys(["copies_ptr", "bound_ptr"], LONGS)
ROWS |= dict.fromkeys(["R", "C", "T"], "i32") | {"first_token": "i64"}


@pytest.mark.parametrize("gather, also", [(True, 16), (True, 0), (False, 8), (False, 0)])
def test_put_moves_16_bytes_at_once(gather, also, tmp_path):
    constants = {"W": 2, "GATHER": gather, "ALSO": also, "SPLIT": 8, "ALSO_PAD": 16}
    constants |= {"ALIGNED": True, "HEAD": 4096, "BLOCK": 4096}
    aligned = ["x_ptr", "D", "x_offset", "head_offset", "tail_offset"]
    sass = machine_code(peer._put_kernel, PUT, constants, tmp_path, aligned, num_warps=8)
    assert spills(sass) == 0
    assert "LDG.E.128" in sass and "STG.E.128" in sass and "SYS" in sass


def test_peers_meet_in_system_scope_and_within_a_bound(tmp_path):
    constants = {"W": 2, "HALF": 256}
    sass = machine_code(peer._meet_kernel, FLAGS, constants, tmp_path, num_warps=1)
    assert spills(sass) == 0 and "MEMBAR" in sass and "SYS" in sass and "ATOM" in sass
    assert "BRA" in sass and "BPT.TRAP" not in sass


@pytest.mark.parametrize("words", [1, 2])
def test_rows_are_laid_out_without_spills(words, tmp_path):
    constants = {"W": 2, "K": 8, "K_PAD": 8, "WORDS": words, "BLOCK_T": 512}
    sass = machine_code(address._lay_out_kernel, ROWS, constants, tmp_path, num_warps=8)
    assert spills(sass) == 0
    find = machine_code(address._find_kernel, ROWS, {"K": 8, "BLOCK": 1024}, tmp_path)
    assert spills(find) == 0
