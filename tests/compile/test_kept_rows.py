"""The linear layer of kept tokens compiles for sm_90: no spills, loads in flight, tensor cores."""

import pytest

from tests.compile.test_sm90 import machine_code, spills

depth_gate = pytest.importorskip("moe_router_kernels.depth_gate")
kept_rows = pytest.importorskip("moe_router_kernels.kept_rows")
vector_linear = pytest.importorskip("moe_router_kernels.vector_linear")

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


@pytest.mark.parametrize("out", ["*bf16", "*fp32"])
def test_layers_of_one_token(out, tmp_path):
    types = dict.fromkeys(["x_ptr", "a_ptr", "b_ptr", "c_ptr"], "*bf16") | {"out_ptr": out}
    types |= dict.fromkeys(["A", "B", "C", "K"], "i32")
    constants = {"ROWS": vector_linear._ROWS, "BLOCK_K": vector_linear._SPAN}
    sass = machine_code(
        vector_linear._vector_kernel, types, constants, tmp_path, list(types), num_warps=8
    )
    assert spills(sass) == 0 and "LDG.E.128" in sass
