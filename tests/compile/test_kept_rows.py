"""The linear layer of kept tokens compiles for sm_90: no spills, loads in flight, tensor cores."""

import pytest

from tests.compile.test_sm90 import machine_code, spills

depth_gate = pytest.importorskip("moe_router_kernels.depth_gate")
kept_rows = pytest.importorskip("moe_router_kernels.kept_rows")

TYPES = dict.fromkeys(["x_ptr", "w_ptr", "out_ptr"], "*bf16") | {"kept_ptr": "*i8"}
TYPES |= dict.fromkeys(["T", "N", "K", "stride_x"], "i32")
ALIGNED = ["x_ptr", "w_ptr", "out_ptr", "N", "K", "stride_x"]


@pytest.mark.parametrize("tokens", [16, 64, 256])
def test_linear_of_kept(tokens, tmp_path):
    m, n, k = (16, 16, 256) if tokens == 16 else (64, 32, 128)
    constants = {"T_PAD": tokens, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "PRECISION": "tf32"}
    kernel, options = kept_rows._linear_kernel, {"num_warps": 4, "num_stages": 4}
    sass = machine_code(kernel, TYPES, constants, tmp_path, ALIGNED, **options)
    tensor_cores = "HMMA" if m == 16 else "HGMMA"
    assert spills(sass) == 0 and tensor_cores in sass and "LDGSTS" in sass


@pytest.mark.parametrize("block", [16, 2048])
def test_rms_logit(block, tmp_path):
    types = dict.fromkeys(["x_ptr", "w_ptr"], "*bf16") | {"bias_ptr": "*bf16", "eps": "fp32"}
    types |= {"logit_ptr": "*fp32", "D": "i32", "stride_x": "i32"}
    kernel = depth_gate._rms_logit_kernel
    pointers = ["x_ptr", "w_ptr", "D", "stride_x"]
    assert spills(machine_code(kernel, types, {"BLOCK": block}, tmp_path, pointers)) == 0
