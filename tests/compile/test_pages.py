"""The kernels of the paged cache compile for sm_90 without spills; see `test_sm90`."""

import pytest

from tests.compile.test_sm90 import machine_code, spills

paged_attention = pytest.importorskip("moe_router_kernels.paged_attention")

HALVES = ("q_ptr", "k_ptr", "v_ptr", "pages_ptr", "out_ptr", "q_out_ptr", "k_out_ptr")
FLOATS = ("cos_ptr", "sin_ptr", "sum_ptr", "best_ptr", "total_ptr")
INTS = ("table_ptr", "row_ptr", "slot_ptr", "seen_ptr")
TYPES = dict.fromkeys(HALVES, "*bf16") | dict.fromkeys(FLOATS, "*fp32")
TYPES |= dict.fromkeys(INTS, "*i32") | {"scale": "fp32"}
TYPES |= {"H": "i32", "J": "i32", "stride_table": "i32", "stride_values": "i64"}


def compiled(kernel, constants, tmp_path, **options):
    pointers = [n for n in kernel.arg_names if n.endswith("_ptr")]
    return machine_code(kernel, TYPES, constants, tmp_path, pointers, **options)


@pytest.mark.parametrize("channels, split", [(16, 1), (64, 16), (128, 1), (128, 64)])
def test_attend(channels, split, tmp_path):
    constants = {"C": channels, "PAGE": 64, "HEADS": 16, "SPLITS": split, "PRECISION": "tf32"}
    kernel = paged_attention._attend_kernel
    sass = compiled(kernel, constants, tmp_path, num_warps=4, num_stages=3)
    assert spills(sass) == 0 and "HMMA" in sass and "LDGSTS" in sass


@pytest.mark.parametrize("channels", [16, 128])
def test_join(channels, tmp_path):
    constants = {"C": channels, "SPLITS": 64}
    assert spills(compiled(paged_attention._join_kernel, constants, tmp_path, num_warps=4)) == 0


@pytest.mark.parametrize("channels", [16, 128])
def test_store(channels, tmp_path):
    constants = {"C": channels, "PAGE": 64}
    assert spills(compiled(paged_attention._store_kernel, constants, tmp_path, num_warps=1)) == 0
