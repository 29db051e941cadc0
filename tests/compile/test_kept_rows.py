"""The linear layer of kept tokens compiles for sm_90: no spills, loads in flight, tensor cores."""

import pytest

from tests.compile.test_sm90 import machine_code, spills

kept_rows = pytest.importorskip("moe_router_kernels.kept_rows")

TYPES = dict.fromkeys(["x_ptr", "w_ptr", "out_ptr"], "*bf16") | {"kept_ptr": "*i8"}
TYPES |= dict.fromkeys(["T", "N", "K", "stride_x"], "i32")
ALIGNED = ["x_ptr", "w_ptr", "out_ptr", "N", "K", "stride_x"]


@pytest.mark.parametrize("tokens", [16, 64, 256])
def test_linear_of_kept(tokens, tmp_path):
    constants = {"T_PAD": tokens, "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 256}
    constants |= {"PRECISION": "tf32"}
    kernel, options = kept_rows._linear_kernel, {"num_warps": 4, "num_stages": 4}
    sass = machine_code(kernel, TYPES, constants, tmp_path, ALIGNED, **options)
    assert spills(sass) == 0 and "HMMA" in sass and "LDGSTS" in sass
