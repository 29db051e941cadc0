"""Every Triton kernel compiles for sm_90, on a machine without a GPU, and hardly spills.

Interpreting and compiling cannot share a process: skipped when TRITON_INTERPRET is set.
"""

import os
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, so it needs a process without TRITON_INTERPRET", allow_module_level=True)

from triton.backends import nvidia  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from moe_router_kernels import fused  # noqa: E402

BIN = Path(nvidia.__file__).parent / "bin"
INTS, FLOATS = "*i32", "*fp32"
GATE = dict.fromkeys(["logits_ptr", "bias_ptr", "weight_ptr"], FLOATS)
GATE |= {"target_ptr": INTS, "load_ptr": INTS, "T": "i32", "G": "i32", "E": "i32"}
PLACE = dict.fromkeys(
    ["target_ptr", "before_ptr", "total_ptr", "src_ptr", "choice_ptr", "offsets_ptr", "row_ptr"],
    INTS,
)
PLACE |= dict.fromkeys(["T", "E", "G"], "i32")
MOVE = {"x_ptr": "*bf16", "row_ptr": INTS, "rows_ptr": "*bf16"}
MOVE |= dict.fromkeys(["T", "D", "stride_x"], "i32")
SCAN = dict.fromkeys(["load_ptr", "before_ptr", "total_ptr"], INTS)
SCAN |= {"blocks": "i32", "G": "i32"}


def spilled(kernel, types, constants, tmp_path):
    """Spill instructions in the machine code of sm_90."""
    signature = {n: "constexpr" if n in constants else types[n] for n in kernel.arg_names}
    at = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    compiled = triton.compile(ASTSource(kernel, signature, at), target=GPUTarget("cuda", 90, 32))
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    sass = subprocess.run([BIN / "nvdisasm", "-c", cubin], capture_output=True, text=True)
    assert sass.returncode == 0 and "EXIT" in sass.stdout, sass.stderr
    return sass.stdout.count("LDL") + sass.stdout.count("STL")


@pytest.mark.parametrize("groups, k, block", [(8, 2, 32), (128, 8, 16)])
@pytest.mark.parametrize("biased", [False, True])
def test_gate(groups, k, block, biased, tmp_path):
    constants = {"K": k, "K_PAD": k, "G_PAD": groups, "BLOCK_T": block}
    constants |= {"SOFTMAX": not biased, "BIASED": biased, "RENORMALISE": True}
    assert spilled(fused._gate_kernel, GATE, constants, tmp_path) <= 16


@pytest.mark.parametrize("groups, k, block", [(8, 2, 32), (128, 8, 16)])
def test_place(groups, k, block, tmp_path):
    constants = {"K": k, "K_PAD": k, "E_PAD": groups, "BLOCK_T": block}
    assert spilled(fused._place_kernel, PLACE, constants, tmp_path) <= 16


def test_scan(tmp_path):
    assert spilled(fused._scan_kernel, SCAN, {"BLOCK_N": 128, "BLOCK_G": 8}, tmp_path) == 0


def test_move(tmp_path):
    constants = {"K": 8, "BLOCK_T": 8, "BLOCK_D": 256}
    assert spilled(fused._move_kernel, MOVE, constants, tmp_path) == 0
